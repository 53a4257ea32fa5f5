import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from builders import (
    FAMILIES,
    TEACHER_ROWS,
    TEXTS,
    arguments,
    collated,
    last_router,
    logged,
    tiny_gpt2,
    tiny_llama,
    tiny_moe,
    tiny_trainer,
    tokenizer,
    windows,
)
from datasets import Dataset, IterableDataset
from test_moe import tiny_jetmoe
from transformers import TrainerCallback

from distill_trainer.errors import ConfigurationError, DataError, UnsupportedModelError
from distill_trainer.router import GAP_WARMUP_STEPS
from distill_trainer.schedules import LOSS_NAMES
from distill_trainer.trainer import DistillationTrainer

ONLY_TEXT = {f"{name}_weight": 0.0 for name in LOSS_NAMES if name != "lm"}


def test_learned_positions_that_are_too_few_are_refused_before_a_text_is_read(tmp_path):
    unread = SimpleNamespace(column_names=["text"])  # anything else asked of it would raise

    def trainer(student, teacher, dataset, max_length):
        return DistillationTrainer(
            student,
            teacher,
            arguments(tmp_path, max_length=max_length, attention_weight=0.0),
            train_dataset=dataset,
            processing_class=tokenizer("student"),
            teacher_processing_class=tokenizer("teacher"),
        )

    with pytest.raises(
        ConfigurationError, match="max_length must be at most 64, the learned positions of the student GPT"
    ):
        trainer(tiny_gpt2(), tiny_moe(), unread, 65)
    texts = Dataset.from_dict({"text": TEXTS})
    with pytest.raises(
        ConfigurationError, match="max_length must be smaller, got 64: .* whose learned positions are 8"
    ):
        trainer(tiny_llama(), tiny_gpt2("teacher", positions=8), texts, 64)
    trainer(tiny_gpt2(), tiny_gpt2("teacher"), texts, 64).train()


def test_what_trains_moves_and_the_teacher_does_not(tmp_path):
    trainer = tiny_trainer(tmp_path)
    before = copy.deepcopy(trainer.distillation_model.state_dict())
    teacher = copy.deepcopy(trainer.teacher.model.state_dict())
    trainer.train()
    still = {n for n, p in trainer.distillation_model.named_parameters() if torch.equal(before[n], p)}
    assert not still
    assert all(torch.equal(teacher[n], value) for n, value in trainer.teacher.model.state_dict().items())
    assert not trainer.teacher.model.training


def test_training_lowers_the_students_and_the_routers_loss(tmp_path):
    # One batch over and over: every loss but the contrastive one is a function of the weights alone.
    trainer = tiny_trainer(
        tmp_path,
        max_steps=12,
        per_device_train_batch_size=10,
        temperature=1.0,
        final_top_k=1,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
    )
    trainer.train()
    for name in ("kl", "lm", "feature"):
        curve = logged(trainer, f"distill/loss_{name}")
        assert len(curve) == 12 and curve[-1] < curve[0], name
    assert logged(trainer, "distill/router_ce")[-1] < logged(trainer, "distill/router_ce")[0]


def test_two_learning_rates_follow_the_schedule_and_norms_do_not_decay(tmp_path):
    rates = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            rates.append([group["lr"] for group in optimizer.param_groups])

    trainer = tiny_trainer(tmp_path, callbacks=[Watch()], weight_decay=0.1, gradient_accumulation_steps=2)
    trainer.train()
    groups = trainer.optimizer.param_groups
    # Student and rest, each with and without decay; four optimizer steps on the line to 0.
    for step, found in enumerate(rates):
        remaining = 1 - step / 4
        assert found == pytest.approx([1e-2 * remaining] * 2 + [2e-2 * remaining] * 2)
    assert logged(trainer, "learning_rate") == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    decaying = {names[id(p)] for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    plain = {names[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1} and not decaying & plain
    assert decaying | plain == set(names.values())
    assert plain == {name for name in names.values() if "norm" in name or name.endswith("bias")}
    for group, expected in zip(groups, (True, True, False, False), strict=True):
        assert all(names[id(p)].startswith("student.") is expected for p in group["params"])


def test_all_scheduled_and_measured_values_are_in_the_log(tmp_path):
    trainer = tiny_trainer(tmp_path, final_top_k=4, eval_strategy="steps", eval_steps=2)
    trainer.train()
    measured = [f"loss_{name}" for name in LOSS_NAMES] + [f"expert_load_{e}" for e in range(4)]
    measured += [f"weight_{name}" for name in LOSS_NAMES]
    parts = "ce", "student_kl", "anchor_kl", "anchor", "balance", "capacity_bce", "entropy"
    measured += [f"router_{name}" for name in parts]
    measured += ["temperature", "router_temperature", "top_k", "capacity", "gap", "gap_ratio", "changed_fraction"]
    for name in measured:
        values = logged(trainer, f"distill/{name}")
        assert len(values) == 4 and all(math.isfinite(value) for value in values), name
    assert logged(trainer, "distill/temperature") == pytest.approx([4.0, 2.5, 1.0, 1.0])
    assert logged(trainer, "distill/top_k") == [1, 3, 4, 4]
    assert len(logged(trainer, "eval_loss")) == len(logged(trainer, "eval_bits_per_byte")) == 2
    assert all("step" in entry for entry in trainer.state.log_history)


def test_the_logged_loss_is_the_weighted_sum_of_the_logged_losses(tmp_path):
    trainer = tiny_trainer(tmp_path, gradient_accumulation_steps=2)
    trainer.train()
    for entry in trainer.state.log_history[:-1]:
        total = sum(entry[f"distill/weight_{name}"] * entry[f"distill/loss_{name}"] for name in LOSS_NAMES)
        for name, weight in (
            ("ce", 1),
            ("student_kl", 0.1),
            ("anchor", 0.1),
            ("balance", 0.01),
            ("capacity_bce", entry["epoch"] <= 1),
        ):
            total += weight * entry[f"distill/router_{name}"]
        assert entry["loss"] == pytest.approx(total, rel=1e-4)


def test_logged_values_are_means_over_the_steps_between_logs(tmp_path):
    every, second = (tiny_trainer(tmp_path, logging_steps=steps) for steps in (1, 2))
    every.train()
    second.train()
    for name in ("distill/loss_kl", "distill/gap", "loss"):
        single = logged(every, name)
        expected = [(single[0] + single[1]) / 2, (single[2] + single[3]) / 2]
        assert logged(second, name) == pytest.approx(expected, rel=1e-5)


def test_losses_join_at_the_phase_boundaries(tmp_path):
    trainer = tiny_trainer(tmp_path, phase_boundaries=[0.25, 0.5])
    trainer.train()
    present = [
        {name for name in LOSS_NAMES if f"distill/loss_{name}" in entry} for entry in trainer.state.log_history[:4]
    ]
    second = {"kl", "lm", "feature", "attention"}
    assert present == [{"kl", "lm"}, second, set(LOSS_NAMES), set(LOSS_NAMES)]


def test_a_loss_without_weight_has_no_modules_and_is_not_computed(tmp_path):
    off = {"feature_weight": 0.0, "layerwise_weight": 0.0, "contrastive_weight": 0.0, "attention_weight": 0.0}
    trainer = tiny_trainer(tmp_path, **off)
    trainer.train()
    names = {name.split(".")[0] for name, _ in trainer.distillation_model.named_parameters()}
    assert names == {"student", "routing"}
    assert logged(trainer, "distill/loss_kl") and not logged(trainer, "distill/loss_feature")


def test_the_weights_stay_when_the_gap_schedule_is_off(tmp_path):
    # This teacher knows less than the student, so that the schedule would take its weight away.
    trainer = tiny_trainer(tmp_path, gap_schedule=False, max_steps=GAP_WARMUP_STEPS + 4, rows=100)
    trainer.train()
    assert set(logged(trainer, "distill/weight_kl")) == {0.7}
    assert trainer.distillation_model.gap.ratio() < 1


@pytest.mark.parametrize(("rows", "lines"), [(4, 1), (100, 0)])
def test_a_first_pass_too_short_for_the_gap_schedule_is_told(tmp_path, caplog, rows, lines):
    trainer = tiny_trainer(tmp_path, max_steps=8, rows=rows, gap_schedule=True)
    trainer.train()
    assert set(logged(trainer, "distill/gap_ratio")) == {1.0}
    assert sum("first pass over the data had" in record.getMessage() for record in caplog.records) == lines


def test_an_adapter_run_trains_adapters_only_and_leaves_a_plain_student(tmp_path):
    trainer = tiny_trainer(tmp_path, use_peft=True, lora_r=4, save_strategy="steps", save_steps=4)
    before = copy.deepcopy(trainer.distillation_model.state_dict())
    trainer.train()
    moved = {n for n, p in trainer.distillation_model.named_parameters() if not torch.equal(before[n], p)}
    student = {name for name in moved if name.startswith("student.")}
    assert student and all("lora_" in name for name in student) and any(n.startswith("routing.") for n in moved)
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "checkpoint-4" / "model.safetensors").exists()


def late_first_anchors():
    """Windows whose first anchor is not their first token, as where the tokenizers meet late."""
    names = ("student_positions", "teacher_positions")
    long = windows().filter(lambda window: len(window["student_positions"]) > 4).select(range(5))
    return long.map(lambda window: {name: window[name][2:] for name in names})


def bits_per_byte(student, dataset):
    """A plain loop over the windows, each alone."""
    nats = num_bytes = tokens = 0.0
    for window in dataset:
        ids = torch.tensor([window["input_ids"]])
        with torch.no_grad():
            logprobs = student(input_ids=ids).logits[0].double().log_softmax(-1)
        first, last = window["student_positions"][0], window["student_positions"][-1]
        for position in range(first + 1, last + 1):
            nats -= logprobs[position - 1, ids[0, position]].item()
            tokens += 1
        num_bytes += window["scored_bytes"]
    return nats / num_bytes / math.log(2), nats / tokens


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("dataset", [lambda: windows().select(range(5)), late_first_anchors], ids=["early", "late"])
def test_evaluation_equals_a_plain_loop_over_the_windows(tmp_path, padding_side, batch_size, dataset):
    student = tiny_llama(initializer_range=0.2).eval()
    expected = bits_per_byte(student, dataset())
    trainer = DistillationTrainer(
        student,
        tiny_moe(),
        arguments(tmp_path, per_device_eval_batch_size=batch_size),
        eval_dataset=dataset(),
        processing_class=tokenizer("student", padding_side),
        teacher_processing_class=tokenizer("teacher", padding_side),
    )
    metrics = trainer.evaluate()
    assert (metrics["eval_bits_per_byte"], metrics["eval_loss"]) == pytest.approx(expected, rel=1e-5)


def test_evaluation_does_not_depend_on_schedules_or_losses(tmp_path):
    trainer = tiny_trainer(tmp_path, phase_boundaries=[0.5, 0.75])
    found = []
    for temperature, top_k, weights in ((4.0, 1, {}), (1.0, 4, dict.fromkeys(LOSS_NAMES, 9.0))):
        trainer.values.temperature, trainer.values.top_k, trainer.values.loss_weights = temperature, top_k, weights
        found.append(trainer.evaluate()["eval_bits_per_byte"])
    alone = tiny_trainer(tmp_path, teacher=None, **ONLY_TEXT)
    assert found[0] == found[1] == alone.evaluate()["eval_bits_per_byte"]


def test_evaluating_during_training_changes_nothing(tmp_path):
    plain, watched = tiny_trainer(tmp_path), tiny_trainer(tmp_path, eval_strategy="steps", eval_steps=1)
    plain.train()
    watched.train()
    for name, value in plain.distillation_model.state_dict().items():
        assert torch.equal(watched.distillation_model.state_dict()[name], value)
    assert logged(plain, "distill/loss_kl") == logged(watched, "distill/loss_kl")


def test_text_alone_needs_no_teacher_and_is_plain_fine_tuning(tmp_path):
    student = tiny_llama()
    reference = copy.deepcopy(student)
    trainer = tiny_trainer(
        tmp_path,
        student=student,
        teacher=None,
        max_steps=1,
        optim="sgd",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        **ONLY_TEXT,
    )
    trainer.train()
    assert trainer.teacher is None and trainer.distillation_model.routing is None
    assert {name.split(".")[0] for name, _ in trainer.distillation_model.named_parameters()} == {"student"}
    losses = []
    for window in windows().select(range(2)):
        ids = torch.tensor([window["input_ids"]])
        losses.append(F.cross_entropy(reference(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none"))
    loss = torch.cat(losses).mean()
    loss.backward()
    assert logged(trainer, "loss") == pytest.approx([loss.item()], rel=1e-5)
    for (name, before), after in zip(reference.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(after, before - 1e-2 * before.grad, atol=1e-6, rtol=1e-5, msg=name)


def test_losses_that_need_a_teacher_are_an_error_without_one(tmp_path):
    with pytest.raises(ConfigurationError, match="teacher_model must be given unless lm_weight"):
        tiny_trainer(tmp_path, teacher=None)


def test_a_dense_teacher_trains_without_a_router_and_says_so(tmp_path, caplog):
    trainer = tiny_trainer(tmp_path, teacher=tiny_llama(seed=3, vocab_size=4100))
    trainer.train()
    said = "The teacher LlamaForCausalLM is dense: it teaches without a router."
    assert [record.getMessage() for record in caplog.records].count(said) == 1
    assert trainer.distillation_model.routing is None and len(logged(trainer, "distill/loss_kl")) == 4
    assert not logged(trainer, "distill/top_k") and not logged(trainer, "distill/router_ce")


@pytest.mark.parametrize("router_layers", ["last", "last:2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_its_routers_and_never_the_teacher(tmp_path, family, router_layers):
    teacher = tiny_moe(family)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    # The attention of gpt-oss has sinks, which cannot be compared.
    attention = {"attention_weight": 0.0} if family == "gpt_oss" else {}
    trainer = tiny_trainer(tmp_path, teacher=teacher, max_steps=2, router_layers=router_layers, **attention)
    routers = trainer.distillation_model.routing.routers
    assert list(routers) == (["1", "2"] if router_layers == "last:2" else ["2"])
    trainer.train()
    assert all(router.query.weight.ne(0).any() for router in routers.values())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_attention_that_cannot_be_compared_is_an_error_that_names_the_setting(tmp_path):
    with pytest.raises(UnsupportedModelError, match="attention of GptOssForCausalLM .* Set attention_weight to 0"):
        tiny_trainer(tmp_path, teacher="gpt_oss")


def test_layers_that_are_targets_only_have_routers_that_learn(tmp_path):
    trainer = tiny_trainer(tmp_path, router_layers=["0"], layer_map=["0:0", "1:2"])
    routers = trainer.distillation_model.routing.routers
    assert list(routers) == ["0", "2"]
    trainer.train()
    assert all(router.query.weight.ne(0).any() for router in routers.values())
    assert len(logged(trainer, "distill/router_student_feature")) == 4


def test_the_students_weight_reaches_the_routers_of_targets(tmp_path):
    routers = []
    for weight in (0.0, 5.0):
        trainer = tiny_trainer(
            tmp_path, router_layers=["0"], layer_map=["0:0", "1:2"], router_student_weight=weight, max_steps=1
        )
        trainer.train()
        routers.append(trainer.distillation_model.routing.routers["0"].query.weight.detach())
    assert not torch.equal(*routers)


def test_the_routers_parts_and_samples_are_those_of_the_settings(tmp_path):
    routing = tiny_trainer(tmp_path, router_parts=["gap"], expert_sampling=3).distillation_model.routing
    assert routing.num_samples == 3 and [router.parts for router in routing.routers.values()] == [("gap",)]


def test_checkpointing_reaches_the_layers_that_run_again(tmp_path):
    assert tiny_trainer(tmp_path, router_layers="all", gradient_checkpointing=True).teacher.checkpointing
    assert not tiny_trainer(tmp_path, router_layers="all").teacher.checkpointing


def test_sampling_needs_experts_in_the_last_layer(tmp_path):
    with pytest.raises(ConfigurationError, match="expert_sampling must be 0 where layers above .* got 3"):
        tiny_trainer(tmp_path, teacher=tiny_moe(mlp_only_layers=[2]), expert_sampling=3)


def test_a_target_that_no_loss_compares_is_an_error(tmp_path):
    with pytest.raises(ConfigurationError, match="router_layers must list layers that .* got 1. See feature_layers"):
        tiny_trainer(tmp_path, router_layers=["1"], layer_map=["0:0", "1:2"])


def test_the_router_learns_in_its_steps_only(tmp_path):
    trainer = tiny_trainer(tmp_path, router_layers="all", router_interval=2, router_until=0.5, max_steps=8)
    moved, before = [], None
    fitted, new_to_the_student = [], []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            fitted.append(bool(model.routing.routers["0"].capacity_output.weight.grad.ne(0).any()))
            new_to_the_student.append(state.epoch < 1)

        def on_step_end(self, args, state, control, model=None, **kwargs):
            nonlocal before
            now = model.routing.routers["0"].query.weight.detach().clone()
            moved.append(bool((now != (0 if before is None else before)).any()))
            before = now

    trainer.add_callback(Watch())
    trainer.train()
    assert moved == [True, False, True, False, False, False, False, False]
    # The student goes on changing, and the estimate of its capacity with it, while the text is new to it.
    assert fitted == new_to_the_student and set(fitted) == {True, False}
    assert len(logged(trainer, "distill/router_ce")) == 8


def test_a_large_gradient_of_the_router_does_not_shorten_the_students_step(tmp_path):
    students, routers = [], []
    for weight in (0.0, 1e4):
        trainer = tiny_trainer(
            tmp_path / str(weight), max_steps=1, max_grad_norm=0.1, router_balance_weight=weight, optim="sgd"
        )
        trainer.train()
        students.append(trainer.student.state_dict())
        routers.append(last_router(trainer.distillation_model).query.weight.detach())
        assert logged(trainer, "grad_norm")[0] > 0.1, "there is something to clip"
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])
    # At a learning rate of 0.02 a clipped step of the router is no longer than 0.002.
    assert not torch.equal(*routers) and routers[1].norm() <= 0.002 * 1.001


@pytest.mark.parametrize("kl_method", ["projected", "alm", "uld"])
def test_sampled_experts_train_student_and_router(tmp_path, kl_method):
    trainer = tiny_trainer(tmp_path, expert_sampling=3, kl_method=kl_method)
    trainer.train()
    assert last_router(trainer.distillation_model).query.weight.ne(0).any()
    assert all(value == value and value > 0 for value in logged(trainer, "distill/loss_kl"))


def test_a_mixture_whose_experts_cannot_be_found_is_an_error_before_any_data_is_read(tmp_path):
    with pytest.raises(UnsupportedModelError, match="cannot be found"):
        DistillationTrainer(
            tiny_llama(),
            _jetmoe(),
            arguments(tmp_path),
            train_dataset=Dataset.from_dict({"wrong": [1]}),
            processing_class=tokenizer("student"),
            teacher_processing_class=tokenizer("teacher"),
        )


def _jetmoe():
    model = tiny_jetmoe()
    model.resize_token_embeddings(4100)
    return model


def test_more_experts_than_the_teacher_has_are_cut_with_one_warning(tmp_path, caplog):
    trainer = tiny_trainer(tmp_path, initial_top_k=7, final_top_k=9)
    trainer.train()
    assert set(logged(trainer, "distill/top_k")) == {4}
    assert sum("top_k is cut to 4" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(("top_k", "used"), [((None, None), {2}), ((1, None), {1, 2}), ((None, 4), {2, 3, 4})])
def test_as_many_experts_are_used_as_the_gate_chooses_unless_told(tmp_path, caplog, top_k, used):
    initial, final = top_k
    trainer = tiny_trainer(tmp_path, initial_top_k=initial, final_top_k=final, max_steps=6)
    assert trainer.values.top_k == min(used)
    trainer.train()
    assert set(logged(trainer, "distill/top_k")) == used
    assert not [record for record in caplog.records if "gate chooses" in record.getMessage()]


@pytest.mark.parametrize(("final_top_k", "lines"), [(1, 1), (2, 0)])
def test_fewer_experts_than_the_gate_chooses_are_told(tmp_path, caplog, final_top_k, lines):
    tiny_trainer(tmp_path, initial_top_k=1, final_top_k=final_top_k)
    said = "The teacher's gate chooses 2 experts, final_top_k ends at 1"
    assert sum(said in record.getMessage() for record in caplog.records) == lines


def test_plain_text_is_prepared_by_the_trainer(tmp_path):
    trainer = DistillationTrainer(
        tiny_llama(),
        tiny_moe(),
        arguments(tmp_path, max_steps=1),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        eval_dataset=Dataset.from_dict({"text": TEXTS[:2]}),
        processing_class=tokenizer("student"),
        teacher_processing_class=tokenizer("teacher"),
    )
    trainer.train()
    assert trainer.train_dataset["input_ids"] == windows()["input_ids"]
    assert trainer.data_statistics["train"]["documents"] == len(TEXTS)
    assert math.isfinite(trainer.evaluate()["eval_bits_per_byte"])


@pytest.mark.parametrize("columns", [{"text": []}, {}])
def test_a_dataset_without_documents_is_an_error(tmp_path, columns):
    with pytest.raises(DataError, match=r"^The dataset must hold documents, got none\.$"):
        DistillationTrainer(
            tiny_llama(),
            tiny_moe(),
            arguments(tmp_path),
            train_dataset=Dataset.from_dict(columns),
            processing_class=tokenizer("student"),
            teacher_processing_class=tokenizer("teacher"),
        )


def test_a_model_without_a_name_needs_its_tokenizer(tmp_path):
    with pytest.raises(ConfigurationError, match="teacher_processing_class must be given"):
        DistillationTrainer(tiny_llama(), tiny_moe(), arguments(tmp_path), processing_class=tokenizer("student"))


def test_models_may_be_given_as_folders(tmp_path):
    for side, model in (("student", tiny_llama()), ("teacher", tiny_moe())):
        model.save_pretrained(tmp_path / side)
        tokenizer(side).save_pretrained(tmp_path / side)
    trainer = DistillationTrainer(
        str(tmp_path / "student"),
        str(tmp_path / "teacher"),
        arguments(tmp_path / "out", max_steps=1),
        train_dataset=windows(),
    )
    trainer.train()
    assert trainer.teacher.num_experts == 4 and len(logged(trainer, "distill/loss_kl")) == 1


def test_the_routers_choice_for_a_batch_can_be_looked_at(tmp_path):
    trainer = tiny_trainer(tmp_path, final_top_k=2)
    trainer.train()
    batch = trainer.data_collator(list(windows().select(range(3))))
    routed = trainer.route(batch)
    assert routed.selected_experts.shape == routed.routing_weights.shape == (int(routed.mask.sum()), 2)
    assert not routed.logits.requires_grad
    assert routed.logits.shape == (int(routed.mask.sum()), TEACHER_ROWS)


def test_routing_a_batch_tells_of_layers_that_are_rerouted_as_targets_too(tmp_path):
    trainer = tiny_trainer(tmp_path, router_layers=["0", "1"], layer_map=["0:0", "1:1"])
    assert tuple(trainer.route(collated()).decisions) == (0, 1, 2)


def test_activation_checkpointing_changes_nothing(tmp_path):
    plain, recomputed = tiny_trainer(tmp_path), tiny_trainer(tmp_path, gradient_checkpointing=True)
    plain.train()
    recomputed.train()
    assert logged(recomputed, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-4)


def test_bf16_autocast_trains(tmp_path):
    trainer = tiny_trainer(tmp_path, bf16=True)
    trainer.train()
    assert all(math.isfinite(value) for value in logged(trainer, "loss"))
    assert all(p.dtype == torch.float32 for p in trainer.distillation_model.parameters())


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        learning_rate=3.0,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    curve = logged(trainer, "eval_bits_per_byte")
    assert curve[-1] > min(curve)
    assert trainer.evaluate()["eval_bits_per_byte"] == pytest.approx(min(curve), rel=1e-6)


def logged_names(trainer):
    """What the Trainer's integrations call everything that was logged during the run."""
    logs = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    names = {name for entry in logs for name in entry if name not in ("step", "epoch")}
    assert {"loss", "distill/loss_kl", "distill/gap", "distill/expert_load_0", "eval_bits_per_byte"} <= names
    return {f"eval/{n.removeprefix('eval_')}" if n.startswith("eval_") else f"train/{n}" for n in names}


WATCHED = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}


def test_tensorboard_gets_all_our_curves(tmp_path, monkeypatch):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = tiny_trainer(tmp_path, report_to="tensorboard", **WATCHED)
    trainer.train()
    events = event_accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    assert logged_names(trainer) <= set(events.Tags()["scalars"])
    for tag, name in (("train/distill/loss_kl", "distill/loss_kl"), ("eval/bits_per_byte", "eval_bits_per_byte")):
        scalars = events.Scalars(tag)
        assert [event.step for event in scalars] == [1, 2]
        assert [event.value for event in scalars] == pytest.approx(logged(trainer, name), rel=1e-6)


def test_wandb_gets_all_our_curves_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    trainer = tiny_trainer(tmp_path, report_to="wandb", **WATCHED)
    try:
        trainer.train()
        summary = dict(wandb.run.summary)
    finally:
        wandb.finish()
    assert summary["train/global_step"] == 2
    assert logged_names(trainer) <= set(summary)
    for name in ("loss_kl", "router_ce", "top_k"):
        assert summary[f"train/distill/{name}"] == logged(trainer, f"distill/{name}")[-1]
    assert summary["eval/bits_per_byte"] == logged(trainer, "eval_bits_per_byte")[-1]
    assert list(tmp_path.rglob("*.wandb"))


def test_trackio_gets_all_our_curves(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    trainer = tiny_trainer(tmp_path, report_to="trackio", project="curves", run_name="tiny", **WATCHED)
    trainer.train()
    stored = storage.get_logs("curves", "tiny")
    assert logged_names(trainer) <= {name for metrics in stored for name in metrics}
    curve = [metrics["eval/bits_per_byte"] for metrics in stored if "eval/bits_per_byte" in metrics]
    assert curve == pytest.approx(logged(trainer, "eval_bits_per_byte"), rel=1e-6)


@pytest.mark.parametrize("texts", [[], ["", "x"]])
def test_a_stream_without_a_window_is_one_line(tmp_path, texts):
    trainer = DistillationTrainer(
        tiny_llama(),
        tiny_moe(),
        arguments(tmp_path, max_steps=1),
        train_dataset=IterableDataset.from_generator(lambda: iter({"text": text} for text in texts)),
        processing_class=tokenizer("student"),
        teacher_processing_class=tokenizer("teacher"),
    )
    with pytest.raises(DataError, match="The training dataset must hold windows with two anchors, got an empty"):
        trainer.train()
