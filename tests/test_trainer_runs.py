"""Runs of `DistillationTrainer` that must be the same run, and runs that break."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import logged, tiny_llama, tiny_moe, tiny_trainer
from one_rank import CONTRASTIVE, two_steps
from transformers import TrainerCallback

from distill_trainer.errors import NonFiniteLossError
from distill_trainer.logit_pass import LogitPass
from distill_trainer.router import GAP_WARMUP_STEPS

COMPARED = ("loss", "grad_norm", "distill/loss_kl", "distill/router_ce", "distill/loss_lm", "distill/gap")


def assert_same_run(first, second, tolerance=1e-6, names=COMPARED):
    for name in names:
        values = [[entry[name] for entry in run["log"] if name in entry] for run in (first, second)]
        assert values[0] == pytest.approx(values[1], rel=1e-4), name
    assert first["gradients"].keys() == second["gradients"].keys()
    for kind in ("gradients", "weights"):
        for name, value in first[kind].items():
            torch.testing.assert_close(second[kind][name], value, atol=tolerance, rtol=1e-3)


@pytest.fixture(scope="module")
def one_big_batch(tmp_path_factory):
    """Two steps of 8 windows in one micro-batch each."""
    return two_steps(tmp_path_factory.mktemp("big"), per_device_train_batch_size=8)


@pytest.mark.parametrize(("size", "accumulation"), [(2, 4), (1, 8)])
def test_accumulated_micro_batches_equal_one_large_batch(tmp_path, one_big_batch, size, accumulation):
    split = two_steps(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
    assert_same_run(one_big_batch, split)


# One step reads all windows: the order says only which rank and which micro-batch gets which.
BALANCED = [
    {"loss_balancing": "ema", "data_curriculum": "length", "train_sampling_strategy": "random"},
    {"loss_balancing": "gradient-norm", "data_curriculum": "teacher_loss", "train_sampling_strategy": "random"},
]


@pytest.mark.parametrize("changes", BALANCED, ids=lambda changes: changes["loss_balancing"])
def test_balanced_losses_do_not_depend_on_how_a_batch_is_divided(tmp_path, changes):
    whole = two_steps(tmp_path / "whole", per_device_train_batch_size=8, **changes)
    split = two_steps(tmp_path / "split", per_device_train_batch_size=2, gradient_accumulation_steps=4, **changes)
    assert (whole["weights"]["balance.sizes"][:4] > 0).all()
    assert_same_run(whole, split)
    assert_same_run(whole, in_two_processes(tmp_path, changes))


def test_two_processes_equal_one_large_batch(tmp_path):
    one = two_steps(tmp_path / "one", per_device_train_batch_size=8, **CONTRASTIVE)
    assert_same_run(one, in_two_processes(tmp_path, CONTRASTIVE), names=(*COMPARED, "distill/loss_contrastive"))


def in_two_processes(tmp_path, changes):
    """`two_steps` with 4 of the 8 windows in each of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tests = Path(__file__).parent
    processes = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(tests)]),
            "ACCELERATE_USE_CPU": "true",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, str(tests / "one_rank.py"), str(tmp_path / "result.pt"), json.dumps(changes)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    outputs = [process.communicate(timeout=300)[0].decode() for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return torch.load(tmp_path / "result.pt", weights_only=False)


def run_of(folder, checkpoint=None, seed=0, **changes):
    settings = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2} | changes
    trainer = tiny_trainer(folder, student=tiny_llama(seed, attention_dropout=0.2), **settings)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def without_timings(entries):
    return [{n: v for n, v in entry.items() if not n.startswith(("train_", "total_"))} for entry in entries]


@pytest.mark.parametrize(
    ("use_peft", "own"),
    [
        (False, {}),
        (True, {}),
        (False, {"loss_balancing": "ema", "data_curriculum": "length"}),
        (True, {"loss_balancing": "gradient-norm", "data_curriculum": "teacher_loss", "phase_boundaries": [0.2, 0.6]}),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, use_peft, own):
    changes = {"use_peft": use_peft, "lora_r": 4, "lora_dropout": 0.1, "max_steps": 6, "num_train_epochs": 1} | own
    whole = run_of(tmp_path / "whole", **changes)
    # Other initial weights show that all of them come from the checkpoint; a frozen base does not, with adapters.
    seed = 0 if use_peft else 7
    resumed = run_of(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-2"), seed, **changes)
    found, expected = (run.distillation_model.state_dict() for run in (resumed, whole))
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert without_timings(resumed.state.log_history) == without_timings(whole.state.log_history)


def test_the_knowledge_gap_is_resumed(tmp_path):
    steps = GAP_WARMUP_STEPS + 4
    changes = {"max_steps": steps, "save_steps": GAP_WARMUP_STEPS + 2, "gradient_accumulation_steps": 1}
    changes |= {"logging_steps": 2, "lr_scheduler_type": "constant"}
    runs = []
    for folder, checkpoint in (("whole", None), ("resumed", f"whole/checkpoint-{GAP_WARMUP_STEPS + 2}")):
        trainer = tiny_trainer(
            tmp_path / folder,
            # A student that is sure of nonsense learns fast from a teacher that holds nothing for likely.
            student=tiny_llama(initializer_range=1.0),
            teacher=tiny_moe(initializer_range=0.02),
            save_strategy="steps",
            rows=100,
            **changes,
        )
        trainer.train(resume_from_checkpoint=checkpoint and str(tmp_path / checkpoint))
        runs.append(trainer)
    whole, resumed = runs
    ratios = logged(whole, "distill/gap_ratio")
    assert ratios[0] == 1.0 and 0 < ratios[-1] < 1
    assert logged(whole, "distill/weight_kl")[-1] == pytest.approx(0.7 * ratios[-1])
    assert logged(whole, "distill/weight_lm")[-1] == pytest.approx(1 - 0.7 * ratios[-1])
    assert without_timings(resumed.state.log_history) == without_timings(whole.state.log_history)


class WeightsBeforeEachStep(TrainerCallback):
    """Keeps a copy of the weights before each step."""

    def __init__(self):
        self.weights = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.weights.append({name: value.clone() for name, value in model.state_dict().items()})


def poison(monkeypatch, calls):
    """Make the KL loss NaN in the micro-batches with these numbers."""
    original, count = LogitPass.losses, iter(range(10**6))

    def poisoned(*args, **kwargs):
        total, parts = original(*args, **kwargs)
        factor = math.nan if next(count) in calls else 1.0
        return total * factor, parts | {"kl": parts["kl"] * factor}

    monkeypatch.setattr(LogitPass, "losses", poisoned)


def test_a_step_with_a_loss_that_is_not_finite_is_left_out_and_training_goes_on(tmp_path, monkeypatch):
    poison(monkeypatch, {2})
    watch = WeightsBeforeEachStep()
    trainer = tiny_trainer(tmp_path, callbacks=[watch], gradient_accumulation_steps=2, weight_decay=0.1)
    trainer.train()
    parameters = [name for name, _ in trainer.distillation_model.named_parameters()]
    assert all(torch.equal(watch.weights[1][name], watch.weights[2][name]) for name in parameters)
    assert any(not torch.equal(watch.weights[2][name], watch.weights[3][name]) for name in parameters)
    assert all(value.isfinite().all() for value in trainer.distillation_model.state_dict().values())
    # Nothing is turned into a zero: the log shows it.
    losses = logged(trainer, "distill/loss_kl")
    assert math.isnan(losses[1]) and math.isfinite(losses[2])


def test_too_many_such_steps_in_a_row_stop_the_run_with_the_losss_name(tmp_path, monkeypatch):
    # Steps 1 and 3 are broken, then 5 to 7: the count starts anew after a sound step.
    poison(monkeypatch, {0, 2, 4, 5, 6})
    trainer = tiny_trainer(tmp_path, max_steps=9, max_nonfinite_steps=3)
    with pytest.raises(NonFiniteLossError, match=r"loss kl is not finite at step 7, time 3 in a row") as error:
        trainer.train()
    assert "\n" not in str(error.value)


def test_a_broken_student_stops_the_run_with_all_losses_that_it_breaks(tmp_path):
    student = tiny_llama()
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    trainer = tiny_trainer(tmp_path, student=student, max_nonfinite_steps=1)
    with pytest.raises(NonFiniteLossError, match="kl and layerwise and lm.* is not finite at step 1"):
        trainer.train()


def infinite_gradient_at(steps):
    """A student whose gradient, not its loss, is infinite at the given backward passes, counted from 1."""
    student = tiny_llama()
    calls = []

    def poison_gradient(gradient):
        calls.append(None)
        return torch.full_like(gradient, math.inf) if len(calls) in steps else gradient

    student.model.layers[0].mlp.up_proj.weight.register_hook(poison_gradient)
    return student


def test_a_step_with_an_infinite_gradient_of_finite_losses_is_left_out(tmp_path):
    watch = WeightsBeforeEachStep()
    trainer = tiny_trainer(tmp_path, student=infinite_gradient_at({2}), callbacks=[watch], weight_decay=0.1)
    trainer.train()
    parameters = [name for name, _ in trainer.distillation_model.named_parameters()]
    assert all(torch.equal(watch.weights[1][name], watch.weights[2][name]) for name in parameters)
    assert any(not torch.equal(watch.weights[2][name], watch.weights[3][name]) for name in parameters)
    assert all(value.isfinite().all() for value in trainer.distillation_model.state_dict().values())


def test_infinite_gradients_in_a_row_stop_the_run(tmp_path):
    trainer = tiny_trainer(tmp_path, student=infinite_gradient_at({2, 3}), max_nonfinite_steps=2)
    with pytest.raises(NonFiniteLossError, match="gradient is not finite at step 3, time 2 in a row"):
        trainer.train()
