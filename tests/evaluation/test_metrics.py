import math
import socket
from itertools import count

import evaluate
import pytest
import torch
from builders import TEXTS, tiny_llama, tokenizer

from distill_trainer.evaluation.measure import evaluating, forward_logits, score_logits
from distill_trainer.evaluation.metrics import METRICS
from distill_trainer.evaluation.metrics.attention_similarity.attention_similarity import similarity_per_row
from distill_trainer.evaluation.metrics.bits_per_byte.bits_per_byte import bits_per_byte
from distill_trainer.evaluation.metrics.compression.compression import compression
from distill_trainer.evaluation.metrics.knowledge_retention.knowledge_retention import (
    gap_closed,
    retention_per_position,
)
from distill_trainer.evaluation.metrics.perplexity.perplexity import perplexity
from distill_trainer.evaluation.windows import evaluation_batches

NAMES = ("attention_similarity", "bits_per_byte", "compression", "knowledge_retention", "perplexity")


@pytest.fixture
def load(tmp_path, monkeypatch):
    """`evaluate.load` of one of the metrics from its path, with the network cut."""

    def refuse(*arguments):
        raise AssertionError("a metric reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    # evaluate copies a script there, and puts the folder on the path.
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    numbers = count()
    return lambda name: evaluate.load(
        str(METRICS / name), cache_dir=str(tmp_path), experiment_id=f"{name}-{next(numbers)}"
    )


def distributions(rows, size, seed):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)).softmax(dim=-1)


def retention_loop(student, teacher):
    """Means over positions of divergence, top-1 agreement and top-5 overlap, from probabilities."""
    divergence = agreed = shared = 0.0
    for q, p in zip(student.tolist(), teacher.tolist(), strict=True):
        divergence += sum(b * math.log(b / a) for a, b in zip(q, p, strict=True) if b)
        student_order = sorted(range(len(q)), key=lambda v: -q[v])
        teacher_order = sorted(range(len(p)), key=lambda v: -p[v])
        agreed += student_order[0] == teacher_order[0]
        shared += len({*student_order[:5]} & {*teacher_order[:5]}) / 5
    return [value / len(student) for value in (divergence, agreed, shared)]


def similarity_loop(student, teacher):
    values = []
    for p, q in zip(student.tolist(), teacher.tolist(), strict=True):
        middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        halves = [sum(a * math.log2(a / m) for a, m in zip(row, middle, strict=True) if a) for row in (p, q)]
        values.append(1 - sum(halves) / 2)
    return values


def test_every_metric_is_listed_here_and_describes_itself(load):
    assert sorted(path.name for path in METRICS.iterdir() if (path / f"{path.name}.py").exists()) == sorted(NAMES)
    for name in NAMES:
        metric = load(name)
        assert metric.name == name and metric.description and "Returns" in metric.inputs_description


def test_bits_per_byte(load):
    nlls, lengths = [13.2, 0.7, 55.0], [9, 1, 40]
    bits = sum(nll / math.log(2) for nll in nlls)
    assert bits_per_byte(sum(nlls), sum(lengths)) == pytest.approx(bits / 50)
    assert load("bits_per_byte").compute(predictions=nlls, references=lengths)["bits_per_byte"] == pytest.approx(
        bits / 50
    )
    # A byte that is one of 256 at random takes 8 bits.
    assert bits_per_byte(10 * math.log(256), 10) == pytest.approx(8)
    with pytest.raises(ValueError, match="num_bytes must be at least 1, got 0"):
        bits_per_byte(0.0, 0)


def test_perplexity(load):
    nlls, units = [2.0, 7.5], [3.0, 4.5]
    expected = math.exp(9.5 / 7.5)
    assert perplexity(sum(nlls), sum(units)) == pytest.approx(expected)
    assert load("perplexity").compute(predictions=nlls, references=units)["perplexity"] == pytest.approx(expected)
    assert perplexity(5 * math.log(17), 5) == pytest.approx(17)
    assert perplexity(1e6, 1) == math.inf
    with pytest.raises(ValueError, match="num_units must be above 0"):
        perplexity(1.0, 0)


def test_compression(load):
    student = {"parameters": 20, "size_mb": 5.0, "bytes_per_second": 900.0, "generated_bytes_per_second": 60.0}
    teacher = {"parameters": 100, "size_mb": 50.0, "bytes_per_second": 300.0, "generated_bytes_per_second": 30.0}
    expected = {"parameter_ratio": 5.0, "size_reduction": 0.9, "speedup": 3.0, "generation_speedup": 2.0}
    assert compression(student, teacher) == pytest.approx(expected)
    metric = load("compression")
    assert metric.compute(predictions=[student], references=[teacher]) == pytest.approx(expected)
    without = metric.compute(predictions=[student | {"bytes_per_second": None}], references=[teacher])
    assert without == pytest.approx(expected | {"speedup": None})
    with pytest.raises(ValueError, match="predictions must be one model, got 2"):
        load("compression").compute(predictions=[student] * 2, references=[teacher] * 2)


def test_knowledge_retention(load):
    student, teacher = distributions(12, 9, seed=0), distributions(12, 9, seed=1)
    expected = retention_loop(student, teacher)
    assert 0 < expected[1] < 1 and 0 < expected[2] < 1
    values = retention_per_position(student.log(), teacher.log())
    assert values.mean(dim=0).tolist() == pytest.approx(expected, rel=1e-5)
    found = load("knowledge_retention").compute(predictions=student.log().tolist(), references=teacher.log().tolist())
    assert found == pytest.approx(
        dict(zip(("kl_divergence", "top1_agreement", "top5_overlap"), expected, strict=True)), rel=1e-5
    )


def test_knowledge_retention_allows_tokens_that_the_teacher_rules_out():
    student, teacher = distributions(4, 8, seed=2), distributions(4, 8, seed=3)
    teacher[:, 6:] = 0
    teacher /= teacher.sum(dim=-1, keepdim=True)
    values = retention_per_position(student.log(), teacher.log())
    assert values.mean(dim=0).tolist() == pytest.approx(retention_loop(student, teacher), rel=1e-5)
    perfect = retention_per_position(teacher.log(), teacher.log())
    assert perfect.tolist() == [[0.0, 1.0, 1.0]] * 4


def test_knowledge_retention_is_not_symmetric_and_keeps_small_vocabularies():
    student, teacher = distributions(3, 4, seed=4), distributions(3, 4, seed=5)
    there, back = (
        retention_per_position(student.log(), teacher.log()),
        retention_per_position(teacher.log(), student.log()),
    )
    assert not torch.allclose(there[:, 0], back[:, 0])
    # All four tokens are among the five likeliest of both.
    assert there[:, 2].tolist() == [1.0] * 3


def test_attention_similarity(load):
    student, teacher = distributions(5, 7, seed=6), distributions(5, 7, seed=7)
    student[0] = torch.eye(7)[0]
    expected = similarity_loop(student, teacher)
    assert similarity_per_row(student, teacher).tolist() == pytest.approx(expected, rel=1e-5)
    found = load("attention_similarity").compute(predictions=student.tolist(), references=teacher.tolist())
    assert found["similarity"] == pytest.approx(sum(expected) / 5, rel=1e-5)


def test_attention_similarity_is_1_for_equal_and_0_for_disjoint_rows_of_any_length(load):
    rows = [[1.0, 0.0], [0.0, 0.25, 0.75]]
    metric = load("attention_similarity")
    assert metric.compute(predictions=rows, references=rows)["similarity"] == pytest.approx(1)
    assert similarity_per_row(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item() == pytest.approx(0)


@pytest.mark.parametrize(
    ("before", "after", "teacher", "closed"),
    [
        (3.0, 2.5, 2.0, 0.5),
        (3.0, 3.5, 2.0, -0.5),
        (3.0, 1.5, 2.0, 1.5),
        (2.0, 1.9, 2.0, None),
        (2.0, 1.9, 2.5, None),
        (None, 1.9, 2.5, None),
        (3.0, None, 2.5, None),
        (3.0, 2.0, None, None),
    ],
)
def test_the_closed_gap_is_a_share_of_what_the_teacher_knew_more(before, after, teacher, closed):
    assert gap_closed(before, after, teacher) == closed


def test_knowledge_retention_tells_the_closed_gap_of_models_whose_bits_per_byte_are_known(load):
    rows = distributions(2, 6, seed=8).log().tolist()
    bits = {"before": 3.0, "after": 2.5, "teacher": 2.0}
    found = load("knowledge_retention").compute(predictions=rows, references=rows, bits_per_byte=bits)
    expected = {"kl_divergence": 0.0, "top1_agreement": 1.0, "top5_overlap": 1.0, "gap_closed": 0.5}
    assert found == pytest.approx(expected, abs=1e-6)


FIGURES = {"parameters": 2, "size_mb": 1.0, "bytes_per_second": 4.0, "generated_bytes_per_second": 3.0}
INPUTS = {
    "bits_per_byte": ([3.5, 8.0, 0.25], [2, 9, 1]),
    "perplexity": ([3.5, 8.0, 0.25], [1.0, 3.5, 0.5]),
    "knowledge_retention": [distributions(3, 6, seed=seed).log().tolist() for seed in (9, 10)],
    "attention_similarity": [distributions(3, 6, seed=seed).tolist() for seed in (11, 12)],
    "compression": ([FIGURES], [FIGURES | {"parameters": 6}]),
}


@pytest.mark.parametrize("name", NAMES)
def test_batches_add_up_to_the_whole(load, name):
    predictions, references = INPUTS[name]
    whole = load(name).compute(predictions=predictions, references=references)
    metric = load(name)
    for rows in (slice(0, 1), slice(1, None)):
        if predictions[rows]:
            metric.add_batch(predictions=predictions[rows], references=references[rows])
    assert metric.compute() == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_combines(load, name):
    predictions, references = INPUTS[name]
    alone = load(name).compute(predictions=predictions, references=references)
    both = evaluate.combine({"one": load(name), "two": load(name)})
    both.add_batch(predictions=predictions, references=references)
    expected = {f"{prefix}_{key}": value for prefix in ("one", "two") for key, value in alone.items()}
    assert both.compute() == pytest.approx(expected)


LOGPROBS, SHARES = [[math.log(0.5)] * 2], [[0.5, 0.5]]


@pytest.mark.parametrize(
    ("name", "predictions", "references", "message"),
    [
        ("compression", [FIGURES | {"size_mb": 0.0}], [FIGURES], "size_mb of the student must be above 0, got 0.0"),
        ("compression", [FIGURES], [FIGURES | {"parameters": 0}], "parameters of the teacher must be above 0, got 0"),
        ("knowledge_retention", LOGPROBS, [[math.log(0.25)] * 4], "of one length"),
        ("knowledge_retention", [[1.0, 2.0]], LOGPROBS, "predictions must be log-probabilities"),
        ("knowledge_retention", LOGPROBS, [[math.nan] * 2], "references must be log-probabilities"),
        ("attention_similarity", SHARES, [[0.5, 0.2, 0.3]], "Row 0 has 2 spans in predictions and 3 in references"),
        ("attention_similarity", SHARES, [[2.0, 1.0]], "Row 0 of references must be shares that sum to 1, got 3"),
        ("attention_similarity", [[1.5, -0.5]], SHARES, "Row 0 of predictions must be shares"),
        ("attention_similarity", [[]], [[]], "Row 0 of predictions must be shares"),
        ("attention_similarity", [], [], "predictions must hold at least one row, got none."),
        ("bits_per_byte", [1.0, -3.0], [3, 3], "Row 1 of predictions must be 0 nats or more, got -3.0."),
        ("bits_per_byte", [math.nan], ["text"], "Row 0 of predictions must be 0 nats or more, got nan."),
        ("bits_per_byte", [1.0, 2.0], [6, -3], "Row 1 of references must be a number of bytes, 0 or more, got -3"),
        ("bits_per_byte", [1.0, 2.0], [2.0, 1.5], "Row 1 of references must be a number of bytes, 0 or more, got 1.5"),
        ("bits_per_byte", [1.0], [math.nan], "Row 0 of references must be a number of bytes, 0 or more, got nan"),
        ("bits_per_byte", [], [], "predictions must hold the likelihood of at least one text, got none."),
        ("perplexity", [1.0, -3.0], [3.0, 3.0], "Row 1 of predictions must be 0 nats or more, got -3.0."),
        ("perplexity", [math.nan], ["a text"], "Row 0 of predictions must be 0 nats or more, got nan."),
        ("perplexity", [1.0, 2.0], [2.0, -1.0], "Row 1 of references must be 0 units or more, got -1.0."),
        ("perplexity", [1.0], [math.nan], "Row 0 of references must be 0 units or more, got nan."),
        ("perplexity", [], [], "predictions must hold the likelihood of at least one text, got none."),
        (
            "compression",
            [FIGURES],
            [{"parameters": 6, "size_mb": 1.0}],
            "Row 0 of references must have bytes_per_second, generated_bytes_per_second, got parameters, size_mb.",
        ),
    ],
)
def test_what_is_no_input_of_a_metric_is_refused(load, name, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        load(name).compute(predictions=predictions, references=references)


@pytest.mark.parametrize("bits", [{"before": 1.0}, {"before": 1.0, "after": 1.0, "teacher": 1.0, "x": 1.0}, {}])
def test_bits_per_byte_of_other_models_than_three_are_refused(load, bits):
    with pytest.raises(ValueError, match="bits_per_byte must have before, after and teacher, got (before|none)"):
        load("knowledge_retention").compute(predictions=LOGPROBS, references=LOGPROBS, bits_per_byte=bits)


def test_the_likelihoods_of_texts_give_bits_per_byte_and_word_perplexity_together(load):
    texts, nlls = ["Größe zählt,  sagt man", "12", "日本語"], [20.0, 3.0, 9.0]
    both = evaluate.combine([load("bits_per_byte"), load("perplexity")])
    for text, nll in zip(texts, nlls, strict=True):
        both.add_batch(predictions=[nll], references=[text])
    num_bytes, words = 25 + 2 + 9, 4 + 1 + 1
    expected = {"bits_per_byte": 32 / math.log(2) / num_bytes, "word_perplexity": math.exp(32 / words)}
    assert both.compute() == pytest.approx(expected)
    assert both.compute(predictions=nlls, references=texts) == pytest.approx(expected)


def test_perplexity_is_what_the_metric_of_the_evaluate_library_finds_for_a_model(load):
    """Its algorithm: each text behind a start token, the mean cross-entropy of its tokens, and the exponential."""
    loaded, model = tokenizer("student", "right"), tiny_llama(initializer_range=0.3).eval()
    encoded = loaded(TEXTS, padding=True, return_tensors="pt")
    start = torch.full((len(TEXTS), 1), loaded.eos_token_id)
    ids = torch.cat([start, encoded["input_ids"]], dim=1)
    mask = torch.cat([torch.ones_like(start), encoded["attention_mask"]], dim=1)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits[:, :-1]
    losses = torch.nn.CrossEntropyLoss(reduction="none")(logits.transpose(1, 2), ids[:, 1:])
    published = torch.exp((losses * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)).tolist()
    for text, expected in zip(TEXTS, published, strict=True):
        # What the report's own path scores, in one window.
        batches, _ = evaluation_batches([text], loaded, loaded, max_length=128, stride=64, batch_size=1)
        with evaluating(model):
            scores = score_logits(forward_logits(model, batches[0]), batches[0])
        found = load("perplexity").compute(predictions=[scores["nll"]], references=[scores["tokens"]])
        assert found["perplexity"] == pytest.approx(expected, rel=1e-4)
