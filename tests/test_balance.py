import math

import pytest
import torch
from builders import (
    ALL,
    collated,
    distillation_model,
    logged,
    run,
    tiny_llama,
    tiny_teacher,
    tiny_trainer,
    weights_of,
)
from transformers import TrainerCallback

from distill_trainer.balance import GRADIENT_INTERVAL, GROUPS, HORIZON, LOGIT, LossBalance, value_sizes
from distill_trainer.errors import ConfigurationError
from distill_trainer.schedules import LOGIT_LOSSES, LOSS_NAMES
from distill_trainer.trainer import DistillationTrainer

WEIGHTS = {"kl": 0.6, "feature": 0.1, "attention": 0.2, "layerwise": 0.05, "contrastive": 0.15, "lm": 0.3}
SIZES = {"logit": 3.0, "feature": 0.5, "attention": 0.01, "layerwise": 40.0, "contrastive": 4.0}


def totals(sizes, power=1):
    return {name: torch.tensor(size) ** power for name, size in sizes.items()}


def measured(sizes=SIZES, method="ema"):
    balance = LossBalance(method)
    balance.update(totals(sizes, balance.power))
    return balance


def of_group(weights, group):
    return sum(weights[name] for name in (LOGIT_LOSSES if group == LOGIT else [group]))


@pytest.mark.parametrize("method", ["ema", "gradient-norm"])
def test_a_balanced_loss_has_the_share_of_its_weight_and_their_sum_stays(method):
    balanced = measured(method=method).balanced(WEIGHTS)
    parts = {group: of_group(balanced, group) * SIZES[group] for group in GROUPS}
    before = sum(of_group(WEIGHTS, group) * SIZES[group] for group in GROUPS)
    assert sum(parts.values()) == pytest.approx(before, rel=1e-6)
    for group, part in parts.items():
        assert part / before == pytest.approx(of_group(WEIGHTS, group) / sum(WEIGHTS.values()), rel=1e-6)


def test_kl_and_lm_stand_to_each_other_as_before():
    balanced = measured().balanced(WEIGHTS)
    assert balanced["kl"] / balanced["lm"] == pytest.approx(2.0) and balanced["kl"] != pytest.approx(0.6)


@pytest.mark.parametrize("missing", ["feature", "logit"])
def test_a_loss_that_has_not_been_measured_keeps_its_weight(missing):
    balance = measured({name: size for name, size in SIZES.items() if name != missing})
    balanced = balance.balanced(WEIGHTS)
    kept = LOGIT_LOSSES if missing == LOGIT else [missing]
    assert {name for name in WEIGHTS if balanced[name] == WEIGHTS[name]} == set(kept)
    assert LossBalance("ema").balanced(WEIGHTS) == WEIGHTS


def test_a_skipped_loss_stays_skipped_and_takes_no_part():
    skipped = WEIGHTS | {"layerwise": 0.0, "kl": 0.0, "lm": 0.0}
    balanced = measured().balanced(skipped)
    assert balanced["layerwise"] == balanced["kl"] == balanced["lm"] == 0.0
    parts = [balanced[name] * SIZES[name] / WEIGHTS[name] for name in ("feature", "attention", "contrastive")]
    assert parts == pytest.approx([(0.1 * 0.5 + 0.2 * 0.01 + 0.15 * 4) / 0.45] * 3)


def test_one_loss_alone_keeps_its_weight():
    alone = dict.fromkeys(LOSS_NAMES, 0.0) | {"lm": 1.0}
    assert measured().balanced(alone)["lm"] == pytest.approx(1.0)


@pytest.mark.parametrize("method", ["ema", "gradient-norm"])
def test_the_running_size_is_a_mean_that_forgets(method):
    balance, sizes = LossBalance(method), [1.0, 3.0, *(2.0 + math.sin(i) for i in range(200))]
    expected, interval = 0.0, GRADIENT_INTERVAL if method == "gradient-norm" else 1
    for count, size in enumerate(sizes, 1):
        balance.update(totals({"feature": size}, balance.power))
        expected += max(1 / count, interval / HORIZON) * (size - expected)
        if count == 2:
            assert expected == 2.0
    assert float(balance.sizes[GROUPS.index("feature")]) == pytest.approx(expected, rel=1e-5)
    assert balance.counts.tolist() == [202.0 * (name == "feature") for name in GROUPS]


@pytest.mark.parametrize("size", [0.0, math.nan, math.inf])
def test_what_says_nothing_of_a_size_is_passed_over(size):
    balance = LossBalance("ema")
    for value in (size, 2.0, size, 4.0):
        balance.update(totals({"feature": value, "attention": 1.0}))
    index = GROUPS.index("feature")
    assert (float(balance.sizes[index]), float(balance.counts[index])) == (3.0, 2.0)
    assert float(balance.counts[GROUPS.index("attention")]) == 4.0


def test_gradients_are_measured_at_intervals_and_when_a_loss_is_new():
    balance, first = LossBalance("gradient-norm"), dict.fromkeys(LOSS_NAMES, 0.0) | {"kl": 0.7, "lm": 0.3}
    assert balance.is_due(3, first)
    balance.update(totals({"logit": 1.0}, 2))
    assert [step for step in range(25) if balance.is_due(step, first)] == [0, 10, 20]
    assert balance.is_due(3, WEIGHTS)
    assert not LossBalance("ema").is_due(0, WEIGHTS)


def test_values_are_those_of_the_losses_with_kl_and_lm_as_one():
    losses = {name: torch.tensor(float(index + 1), requires_grad=True) for index, name in enumerate(LOSS_NAMES)}
    sizes = value_sizes(losses, WEIGHTS)
    expected = {name: float(losses[name]) for name in GROUPS if name != LOGIT}
    expected[LOGIT] = (0.6 * float(losses["kl"]) + 0.3 * float(losses["lm"])) / 0.9
    assert {name: float(size) for name, size in sizes.items()} == pytest.approx(expected)
    assert not any(size.requires_grad for size in sizes.values())
    assert set(value_sizes({"feature": losses["feature"]}, WEIGHTS)) == {"feature"}


def norms_one_by_one(model, teacher, batch, weights):
    """Norm of each loss's gradient at the embedded tokens, from a forward pass of its own with all others off."""
    norms = {}
    for group in GROUPS:
        names = LOGIT_LOSSES if group == LOGIT else [group]
        kept = []
        hook = model.causal_lm.get_input_embeddings().register_forward_hook(
            lambda *call, kept=kept: kept.append(call[-1])
        )
        result = run(model, teacher, batch, frozenset(names), weights={n: weights[n] * (n in names) for n in weights})
        hook.remove()
        loss = result["logit_loss"] / of_group(weights, LOGIT) if group == LOGIT else result["losses"][group]
        (gradient,) = torch.autograd.grad(loss, kept)
        norms[group] = float(gradient.double().norm())
    return norms


@pytest.mark.parametrize("scale", [1.0, 2.0**12])
def test_measured_gradients_are_those_of_the_losses_one_by_one(scale):
    teacher = tiny_teacher()
    model, batch = distillation_model(teacher), collated()
    expected = norms_one_by_one(model, teacher, batch, WEIGHTS)
    result = run(model, teacher, batch, ALL, weights=WEIGHTS, gradient_scale=scale)
    found = {name: math.sqrt(square) for name, square in result["sizes"].items()}
    assert found == pytest.approx(expected, rel=1e-4) and min(expected.values()) > 0
    # The graph and the gradients of the logit losses are there still.
    (result["logit_loss"] + result["losses"]["feature"]).backward()


def test_measuring_the_gradients_changes_no_loss_and_no_gradient():
    gradients = []
    for scale in (None, 1.0):
        teacher = tiny_teacher()
        model = distillation_model(teacher)
        result = run(model, teacher, collated(), ALL, weights=WEIGHTS, gradient_scale=scale)
        others = [result["losses"][name] for name in LOSS_NAMES if name not in LOGIT_LOSSES]
        (result["logit_loss"] + sum(others) + sum(result["router"].values())).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert (result["sizes"] == {}) is (scale is None)
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("frozen", ["embeddings", "checkpointed layers"])
def test_gradients_can_be_measured_where_the_embeddings_are_frozen_or_activations_recomputed(frozen):
    teacher, student = tiny_teacher(), tiny_llama()
    model = distillation_model(teacher, student)
    expected = run(model, teacher, collated(), ALL, gradient_scale=1.0)["sizes"]
    if frozen == "embeddings":
        student.get_input_embeddings().requires_grad_(False)
    else:
        student.train()
        model.activation_checkpointing_enable()
    result = run(model, teacher, collated(), ALL, gradient_scale=1.0)
    assert {n: float(v) for n, v in result["sizes"].items()} == pytest.approx(
        {n: float(v) for n, v in expected.items()}
    )
    result["logit_loss"].backward()


class Watch(TrainerCallback):
    """Keeps the running sizes after each step."""

    def __init__(self):
        self.sizes, self.counts = [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.sizes.append(model.balance.sizes.clone())
        self.counts.append(model.balance.counts.tolist())


def test_each_optimizer_step_counts_once_however_many_micro_batches_it_has(tmp_path):
    watch = Watch()
    trainer = tiny_trainer(tmp_path, loss_balancing="ema", gradient_accumulation_steps=2, phase_boundaries=[0.5, 0.75])
    trainer.add_callback(watch)
    trainer.train()
    by_name = dict(zip(GROUPS, zip(*watch.counts, strict=True), strict=True))
    assert by_name["logit"] == (1, 2, 3, 4) and by_name["attention"] == (0, 0, 1, 2)
    assert by_name["layerwise"] == by_name["contrastive"] == (0, 0, 0, 1)
    # What joined last has been seen once: its running size is the logged value of that step.
    for name in ("layerwise", "contrastive"):
        assert float(watch.sizes[-1][GROUPS.index(name)]) == pytest.approx(logged(trainer, f"distill/loss_{name}")[-1])


@pytest.mark.parametrize("method", ["ema", "gradient-norm"])
def test_the_balanced_weights_are_those_that_train(tmp_path, method):
    trainer = tiny_trainer(tmp_path, loss_balancing=method, max_steps=2, gradient_accumulation_steps=2)
    plain = tiny_trainer(tmp_path, max_steps=1, gradient_accumulation_steps=2)
    trainer.train()
    plain.train()
    # The first step has no sizes yet, and is the plain one.
    assert logged(trainer, "loss")[0] == logged(plain, "loss")[0]
    assert logged(trainer, "grad_norm")[0] == logged(plain, "grad_norm")[0]
    balanced = {name: logged(trainer, f"distill/weight_{name}")[0] for name in LOSS_NAMES}
    assert all(balanced[name] != pytest.approx(weight) for name, weight in trainer.args.loss_weights().items())
    second = trainer.state.log_history[1]
    total = sum(balanced[name] * second[f"distill/loss_{name}"] for name in LOSS_NAMES)
    for name, weight in {"ce": 1, "student_kl": 0.1, "anchor": 0.1, "balance": 0.01, "capacity_bce": 1}.items():
        total += weight * second[f"distill/router_{name}"]
    assert second["loss"] == pytest.approx(total, rel=1e-4)


def test_gradients_are_measured_in_their_steps_only(tmp_path):
    watch = Watch()
    trainer = tiny_trainer(tmp_path, loss_balancing="gradient-norm", max_steps=GRADIENT_INTERVAL + 2, rows=30)
    trainer.add_callback(watch)
    trainer.train()
    assert [counts[0] for counts in watch.counts] == [1] * GRADIENT_INTERVAL + [2, 2]
    assert torch.equal(watch.sizes[0], watch.sizes[GRADIENT_INTERVAL - 1])


@pytest.mark.parametrize(
    "changes", [{"use_peft": True, "lora_r": 4}, {"bf16": True}, {"gradient_checkpointing": True}]
)
def test_gradient_norms_balance_every_kind_of_run(tmp_path, changes):
    trainer = tiny_trainer(tmp_path, loss_balancing="gradient-norm", max_steps=2, **changes)
    trainer.train()
    balance = trainer.distillation_model.balance
    assert (balance.sizes > 0).all() and all(math.isfinite(value) for value in logged(trainer, "loss"))


@pytest.mark.parametrize("engine", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_gradient_norms_are_refused_where_the_weights_are_sharded(tmp_path, monkeypatch, engine):
    set_up = DistillationTrainer.create_accelerator_and_postprocess

    def sharded(trainer):
        set_up(trainer)
        setattr(trainer, engine, True)

    tiny_trainer(tmp_path, loss_balancing="gradient-norm")
    monkeypatch.setattr(DistillationTrainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(ConfigurationError, match=r"^loss_balancing must be none or ema with FSDP or DeepSpeed"):
        tiny_trainer(tmp_path, loss_balancing="gradient-norm")


def test_the_text_alone_is_the_same_run_with_any_balancing(tmp_path):
    alone = {f"{name}_weight": 0.0 for name in LOSS_NAMES if name != "lm"}
    curves = []
    for method in ("none", "ema", "gradient-norm"):
        trainer = tiny_trainer(tmp_path / method, teacher=None, loss_balancing=method, **alone)
        trainer.train()
        curves.append(logged(trainer, "loss"))
    assert curves[0] == curves[1] == curves[2]
    twin = tiny_trainer(tmp_path, loss_balancing="ema").args.lm_only(str(tmp_path))
    assert twin.loss_balancing == "none" and weights_of({"lm"}) == twin.loss_weights()
