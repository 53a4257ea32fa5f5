import copy
import math

import pytest
import torch
from builders import ASSETS, TEXTS, tiny_gpt2, tiny_llama, tiny_moe, tiny_trainer, tokenizer

from distill_trainer import evaluate_models
from distill_trainer.aligned import RoutedBatch
from distill_trainer.documents import load_sotu
from distill_trainer.errors import ConfigurationError, DataError
from distill_trainer.evaluation.compare import MODEL_KEYS
from distill_trainer.evaluation.measure import SIDES
from distill_trainer.evaluation.routing import ROUTER_KEYS, TOKEN_CLASSES

TOKENIZERS = {"student_tokenizer": tokenizer("student"), "teacher_tokenizer": tokenizer("teacher")}
SECTIONS = {
    *("schema", "teacher", "student_before", "student", "baseline", "student_aware_teacher", "compression"),
    *("retention", "attention", "router", "gap", "benchmarks", "passages", "samples", "data", "environment"),
}


def evaluate(**changes):
    """A report on tiny models over short texts, where nothing else is asked for."""
    settings = {"texts": TEXTS, "max_length": 24, "batch_size": 2, "command": ["run.py"], **TOKENIZERS}
    if "student" not in changes:
        settings["student"] = tiny_llama()
    if "teacher" not in changes:
        settings["teacher"] = tiny_moe()
    return evaluate_models(**(settings | changes))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return tiny_trainer(tmp_path_factory.mktemp("run"), initial_top_k=2)


@pytest.fixture(scope="module")
def routed_report(trainer):
    """With everything that a report can have."""
    return evaluate(
        student=trainer.student,
        teacher=trainer.teacher.model,
        # Weights this large make a student that is sure of the wrong tokens: the teacher knows more.
        student_before=tiny_llama(seed=5, initializer_range=1.0),
        baseline=tiny_llama(seed=6, initializer_range=0.3),
        route=trainer.route,
    )


def test_the_demo_models_are_compared_on_unseen_text():
    texts = [text[:1200] for text in load_sotu("unseen")[:2]]
    report = evaluate(
        student=ASSETS / "student",
        teacher=str(ASSETS / "teacher"),
        texts=texts,
        max_length=128,
        batch_size=4,
    )
    assert report.keys() == SECTIONS and report["schema"] == 1
    teacher, student = report["teacher"], report["student"]
    assert tuple(teacher) == tuple(student) == MODEL_KEYS
    assert all(value for model in (teacher, student) for value in model.values())
    # A trained teacher is far from the 8 bits of a random guess, and knows more than the student.
    assert 1.0 < teacher["bits_per_byte"] < student["bits_per_byte"] < 3.0
    assert teacher["active_parameters"] < teacher["parameters"]
    assert student["active_parameters"] == student["parameters"]
    assert report["data"]["eval_documents"] == 2
    assert report["data"]["eval_bytes"] == sum(len(text.encode()) for text in texts)
    assert report["data"]["scored_bytes"] == report["data"]["eval_bytes"]
    assert report["data"]["eval_max_length"] == 128 and report["data"]["eval_stride"] == 64
    for side, figures in (("student", student), ("teacher", teacher)):
        assert figures["disk_mb"] == (ASSETS / side / "model.safetensors").stat().st_size / 1e6
    assert 0.5 < report["data"]["anchor_fraction"] < 1 and report["benchmarks"] is None
    assert 0 < report["retention"]["top1_agreement"] < report["attention"]["similarity"] < 1
    assert report["student_before"] == dict.fromkeys(MODEL_KEYS) and report["baseline"] is None
    assert report["router"] == dict.fromkeys(ROUTER_KEYS)
    assert report["student_aware_teacher"] == {"bits_per_byte": None}


def test_ratios_and_shares_follow_from_the_figures_in_the_report(routed_report):
    report = routed_report
    assert report.keys() == SECTIONS
    roles = ("teacher", "student_before", "student", "baseline")
    assert all(tuple(report[role]) == MODEL_KEYS for role in roles)
    student, teacher = report["student"], report["teacher"]
    assert report["compression"] == {
        "parameter_ratio": teacher["parameters"] / student["parameters"],
        "size_reduction": 1 - student["size_mb"] / teacher["size_mb"],
        "speedup": student["bytes_per_second"] / teacher["bytes_per_second"],
        "generation_speedup": student["generated_bytes_per_second"] / teacher["generated_bytes_per_second"],
    }
    bits = {role: report[role]["bits_per_byte"] for role in roles}
    assert len(set(bits.values())) == 4
    gap = bits["student_before"] - bits["teacher"]
    closed = {role: (bits["student_before"] - bits[role]) / gap for role in ("student", "baseline")}
    assert gap > 0
    assert report["retention"]["gap_closed"] == pytest.approx(closed["student"])
    assert report["retention"]["gap_closed_baseline"] == pytest.approx(closed["baseline"])
    words_per_byte = sum(len(text.split()) for text in TEXTS) / sum(len(text.encode()) for text in TEXTS)
    for role in roles:
        expected = math.exp(bits[role] * math.log(2) / words_per_byte)
        assert report[role]["word_perplexity"] == pytest.approx(expected, rel=1e-6)


def test_a_router_that_was_not_trained_is_the_teachers_own_gate(routed_report):
    router, own = routed_report["router"], routed_report["teacher"]["bits_per_byte"]
    assert routed_report["student_aware_teacher"]["bits_per_byte"] == pytest.approx(own, rel=1e-6)
    assert router["changed_fraction"] == 0 and router["top_k"] == 2
    assert len(router["expert_load"]) == 4 and sum(router["expert_load"]) == pytest.approx(1)
    assert sum(router["gate_load"]) == pytest.approx(1)
    assert 0 < router["entropy"] <= math.log(4) and 0 < router["capacity"] < 1 and router["gap"] > 0


def test_the_routers_panel_covers_the_anchors_that_a_token_follows(routed_report, trainer):
    router = routed_report["router"]
    assert tuple(router) == ROUTER_KEYS
    count = sum(found["anchors"] for found in router["token_classes"])
    assert count == sum(found["anchors"] for found in router["reliability"]) > 50
    assert {found["name"] for found in router["token_classes"]} <= set(TOKEN_CLASSES)
    # The classes are a split of the whole.
    for key in ("expert_load", "gate_load"):
        for expert, share in enumerate(router[key]):
            parts = (found["anchors"] * found[key][expert] for found in router["token_classes"])
            assert sum(parts) / count == pytest.approx(share)
    predicted = [found["predicted"] for found in router["reliability"]]
    assert predicted == sorted(predicted) and all(0 < value < 1 for value in predicted)
    mean = sum(found["anchors"] * found["predicted"] for found in router["reliability"]) / count
    assert mean == pytest.approx(router["capacity"])
    assert 0 <= router["calibration_error"] <= 1
    assert router["examples"] and all(
        0 <= token["expert"] < 4 and token["expert"] == token["gate_expert"] and token["gap"] > 0
        for example in router["examples"]
        for token in example["tokens"]
    )
    whole = "".join(TEXTS)
    assert all("".join(t["text"] for t in example["tokens"]) in whole for example in router["examples"])


def test_the_gaps_deciles_are_those_of_each_student_at_the_same_anchors(routed_report, trainer):
    deciles = routed_report["gap"]["deciles"]
    anchors = sum(decile["anchors"] for decile in deciles)
    assert len(deciles) == 10 and max(d["anchors"] for d in deciles) - min(d["anchors"] for d in deciles) <= 1
    before = [decile["before"] for decile in deciles]
    assert before == sorted(before)
    students = {
        "before": tiny_llama(seed=5, initializer_range=1.0),
        "after": trainer.student,
        "baseline": tiny_llama(seed=6, initializer_range=0.3),
    }
    for key, student in students.items():
        alone = evaluate(student=student, teacher=trainer.teacher.model)
        mean = sum(decile["anchors"] * decile[key] for decile in deciles) / anchors
        assert mean == pytest.approx(alone["retention"]["kl_divergence"], rel=1e-5)
        # Nobody knows how far it was before.
        assert alone["gap"] == {"deciles": None}


ROLES = ("student_before", "baseline", "student", "teacher")


def test_groups_passages_and_samples_know_every_student(routed_report):
    report = routed_report
    for name, column in (("by_frequency", "kl_divergence"), ("by_position", "top1_agreement")):
        groups = report["retention"][name]
        assert groups and all(found[column].keys() == set(ROLES[:3]) for found in groups)
        assert all(value is not None for found in groups for value in found[column].values())
    # The positions are a split of all anchors.
    groups = report["retention"]["by_position"]
    mean = sum(found["anchors"] * found["kl_divergence"]["student"] for found in groups)
    assert mean / sum(found["anchors"] for found in groups) == pytest.approx(report["retention"]["kl_divergence"])
    for kind in ("best", "worst"):
        assert all(passage[role] > 0 for passage in report["passages"][kind] for role in ROLES)
    assert len(report["samples"]) == 3
    assert all(isinstance(sample[role], str) for sample in report["samples"] for role in ROLES)


def test_passages_of_all_the_text_have_the_bits_per_byte_of_the_report(monkeypatch):
    from distill_trainer.evaluation import passages

    # Each span between two anchors is a passage, and all are shown.
    monkeypatch.setattr(passages, "PASSAGE_BYTES", 1)
    monkeypatch.setattr(passages, "NUM_PASSAGES", 1_000)
    report = evaluate()
    found = report["passages"]["best"] + report["passages"]["worst"]
    assert sum(passage["bytes"] for passage in found) == report["data"]["scored_bytes"]
    for role in ("student", "teacher"):
        bits = sum(passage["bytes"] * passage[role] for passage in found) / report["data"]["scored_bytes"]
        assert bits == pytest.approx(report[role]["bits_per_byte"])


def test_the_gap_needs_no_router_and_no_baseline():
    report = evaluate(student_before=tiny_llama(seed=5))
    deciles = report["gap"]["deciles"]
    assert all(decile["before"] > 0 and decile["after"] > 0 and decile["baseline"] is None for decile in deciles)
    assert all(found["kl_divergence"]["baseline"] is None for found in report["retention"]["by_position"])
    assert all(passage["baseline"] is None for passage in report["passages"]["best"])
    assert all("baseline" not in sample for sample in report["samples"])


def test_the_student_aware_teacher_is_scored_with_the_routed_beliefs_at_anchors_and_its_own_elsewhere(trainer):
    teacher = trainer.teacher.model

    def certain(batch):
        """At every routed anchor, all belief on the token that follows."""
        routed = trainer.route(batch)
        rows = routed.mask.nonzero()[:, 0]
        positions = batch["teacher_positions"][routed.mask]
        logits = torch.zeros_like(routed.logits)
        logits[torch.arange(len(rows)), batch["teacher_input_ids"][rows, positions + 1]] = 100.0
        return RoutedBatch(**{**vars(routed), "logits": logits})

    def rest_of(model, report):
        """Bits of the tokens that no anchor precedes, under the teacher's own logits."""
        nll = 0.0
        for batch in batches:
            with torch.no_grad():
                logits = model(
                    input_ids=batch["teacher_input_ids"], attention_mask=batch["teacher_attention_mask"]
                ).logits.log_softmax(dim=-1)
            for row in range(len(batch["anchor_mask"])):
                positions = batch["teacher_positions"][row][batch["anchor_mask"][row]].tolist()
                for index in range(positions[0] + 1, positions[-1] + 1):
                    if index - 1 not in positions:
                        nll -= logits[row, index - 1, batch["teacher_input_ids"][row, index]].item()
        return nll / math.log(2) / report["data"]["scored_bytes"]

    batches = []
    report = evaluate(
        student=trainer.student, teacher=teacher, route=lambda batch: batches.append(batch) or certain(batch)
    )
    aware = report["student_aware_teacher"]["bits_per_byte"]
    assert aware == pytest.approx(rest_of(teacher, report), rel=1e-4)
    assert 0 < aware < report["teacher"]["bits_per_byte"]


def test_a_teacher_without_a_router_has_no_routing_figures(tmp_path):
    trainer = tiny_trainer(tmp_path, use_router=False)
    report = evaluate(student=trainer.student, teacher=trainer.teacher.model, route=trainer.route)
    assert report["router"] == dict.fromkeys(ROUTER_KEYS)
    assert report["student_aware_teacher"] == {"bits_per_byte": None}


def test_a_student_with_adapters_is_measured_and_writes(tmp_path):
    trainer = tiny_trainer(tmp_path, use_peft=True, lora_r=2)
    report = evaluate(student=trainer.student, teacher=trainer.teacher.model, route=trainer.route)
    plain = evaluate(student=tiny_llama(), teacher=trainer.teacher.model)
    # Adapters start at zero.
    assert report["student"]["bits_per_byte"] == pytest.approx(plain["student"]["bits_per_byte"], rel=1e-5)
    assert [s["student"] for s in report["samples"]] == [s["student"] for s in plain["samples"]]
    assert report["passages"]["best"] and report["retention"]["by_position"]


def test_figures_do_not_depend_on_how_windows_are_batched():
    small, large = evaluate(batch_size=1), evaluate(batch_size=5)
    for key in ("bits_per_byte", "token_perplexity"):
        assert large["student"][key] == pytest.approx(small["student"][key], rel=1e-5)
        assert large["teacher"][key] == pytest.approx(small["teacher"][key], rel=1e-5)
    for key in ("kl_divergence", "top1_agreement", "top5_overlap"):
        assert large["retention"][key] == pytest.approx(small["retention"][key], rel=1e-4)


def test_a_student_that_is_its_teacher_retains_everything():
    model = tiny_llama()
    report = evaluate(
        student=model, teacher=model, teacher_tokenizer=tokenizer("student"), student_before=tiny_llama(seed=3)
    )
    assert report["student"]["bits_per_byte"] == report["teacher"]["bits_per_byte"]
    assert report["retention"]["kl_divergence"] == pytest.approx(0, abs=1e-5)
    assert report["retention"]["top1_agreement"] == report["retention"]["top5_overlap"] == 1
    assert report["attention"]["similarity"] == pytest.approx(1)
    assert report["compression"]["parameter_ratio"] == 1 and report["compression"]["size_reduction"] == 0


def test_models_come_back_as_they_were():
    student, teacher = tiny_llama(attention_dropout=0.5).to(torch.bfloat16).train(), tiny_moe()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    implementation = student.config._attn_implementation
    report = evaluate(student=student, teacher=teacher)
    without_dropout = evaluate(student=copy.deepcopy(student).eval(), teacher=teacher)
    assert report["student"]["bits_per_byte"] == without_dropout["student"]["bits_per_byte"]
    assert report["retention"] == without_dropout["retention"]
    assert report["environment"]["speed_dtype"] == "float32"
    assert student.training and not teacher.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert student.config._attn_implementation == implementation


def test_other_students_given_by_path_are_loaded_in_the_students_dtype(tmp_path):
    tiny_llama(seed=4).save_pretrained(tmp_path / "before")
    report = evaluate(student=tiny_llama().to(torch.bfloat16), student_before=tmp_path / "before")
    assert report["student_before"]["size_mb"] == report["student"]["size_mb"]
    assert report["student_before"]["name"] == str(tmp_path / "before")


def test_what_the_run_knows_is_added_to_the_report():
    report = evaluate(
        names={"student": "mine"},
        seconds=1000.0,
        statistics={"train_documents": 7, "anchor_fraction": None, "datasets": ["sotu"]},
    )
    assert report["student"]["name"] == "mine" and report["teacher"]["name"] == "Qwen3MoeForCausalLM"
    assert report["data"]["train_documents"] == 7 and report["data"]["datasets"] == ["sotu"]
    assert report["data"]["anchor_fraction"] > 0 and report["data"]["train_bytes"] is None
    environment = report["environment"]
    assert environment["seconds"] == 1000 + environment["evaluation_seconds"] > 1000
    assert environment["command"] == "run.py"


def test_a_quantised_student_has_no_speed_up():
    student = tiny_llama()
    student.is_quantized = True
    report = evaluate(student=student)
    assert report["compression"]["speedup"] is None and report["compression"]["generation_speedup"] is None
    assert report["student"]["bytes_per_second"] > 0


def test_attention_is_sampled_evenly_from_many_batches(monkeypatch):
    from distill_trainer.evaluation import compare

    seen = []
    speeds = dict.fromkeys(("bytes_per_second", "generated_bytes_per_second"), 1.0)
    monkeypatch.setattr(compare, "ATTENTION_BATCHES", 2)
    monkeypatch.setattr(compare, "attention_similarity", lambda student, teacher, batches: seen.extend(batches))
    monkeypatch.setattr(compare, "measure_speed", lambda *arguments, **keywords: speeds)
    evaluate(texts=TEXTS, batch_size=1, max_length=1000)
    wanted = ["<|endoftext|>" + TEXTS[0], "<|endoftext|>" + TEXTS[3]]
    ids = SIDES["student"][0]
    assert [tokenizer("student").decode(batch[ids][0]) for batch in seen] == wanted


def test_the_stride_decides_how_much_context_a_token_has():
    bits = [evaluate(student=ASSETS / "student", stride=stride)["student"]["bits_per_byte"] for stride in (4, 24)]
    assert bits[0] < bits[1]
    report = evaluate(stride=4)
    assert report["data"]["eval_stride"] == 4
    assert report["data"]["scored_bytes"] == report["data"]["eval_bytes"]


def test_a_stride_longer_than_a_window_is_refused():
    with pytest.raises(ConfigurationError, match="eval_stride must be from 1 to max_length, which is 24, got 25"):
        evaluate(stride=25)


def test_every_student_is_measured_on_the_benchmarks():
    class Harness:
        def run(self, model, tokenizer, batch_size):
            return {"model": model, "tokenizer": tokenizer, "batch_size": batch_size}

        def table(self, results):
            return results

    before, student = tiny_llama(seed=3), tiny_llama()
    report = evaluate(student=student, student_before=before, benchmarks=Harness())
    assert list(report["benchmarks"]) == ["student_before", "student"]
    for role, model in (("student_before", before), ("student", student)):
        assert report["benchmarks"][role]["model"] is model
        assert report["benchmarks"][role]["tokenizer"] is tokenizer("student")
        assert report["benchmarks"][role]["batch_size"] == 2


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text_is_an_error_that_says_so(texts):
    with pytest.raises(DataError, match="texts must hold at least one document with text, got none"):
        evaluate(texts=texts)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a text", "texts must be a list of documents, got str. Put a single text in a list."),
        (None, "texts must be a list of documents, got NoneType."),
        (["a", 1], "texts must hold strings only, got int as document 1."),
        (["a", None], "texts must hold strings only, got NoneType as document 1."),
    ],
)
def test_texts_that_are_no_list_of_strings_are_refused(texts, message):
    with pytest.raises(DataError) as error:
        evaluate(texts=texts)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or above, got 0."),
        ({"batch_size": 1.5}, "batch_size must be a whole number, 1 or above, got 1.5."),
        ({"max_length": 1}, "max_length must be 2 or above, got 1."),
        ({"max_length": None}, "max_length must be 2 or above, got None."),
    ],
)
def test_sizes_that_cannot_work_are_refused(sizes, message):
    with pytest.raises(ConfigurationError) as error:
        evaluate(**sizes)
    assert str(error.value) == message


def test_windows_longer_than_a_models_learned_positions_are_refused():
    with pytest.raises(
        ConfigurationError, match="max_length must be at most 64, the learned positions of the student"
    ):
        evaluate(student=tiny_gpt2("student"), max_length=65)
    with pytest.raises(
        ConfigurationError, match=r"^max_length must be smaller, got 64: a window .* has \d+ of the tea"
    ):
        evaluate(teacher=tiny_gpt2("teacher", positions=8), max_length=64)
    report = evaluate(student=tiny_gpt2("student"), teacher=tiny_gpt2("teacher"), max_length=64)
    assert report["student"]["bits_per_byte"] and report["teacher"]["bits_per_byte"]


def test_a_text_of_one_token_is_scored_too():
    assert evaluate(texts=["a"])["data"]["scored_bytes"] == 1


def test_a_copy_that_waits_elsewhere_is_measured_where_the_student_is_and_goes_back():
    from distill_trainer.evaluation.compare import _on

    class Model:
        device = torch.device("cpu")

        def to(self, device):
            self.device = device

    model = Model()
    with pytest.raises(RuntimeError), _on(model, torch.device("meta")):
        assert model.device.type == "meta"
        raise RuntimeError
    assert model.device.type == "cpu"
