import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerControl, TrainerState

from distill_trainer.errors import NonFiniteLossError
from distill_trainer.router import GAP_WARMUP_STEPS, KnowledgeGap
from distill_trainer.step_record import StepCallback, StepRecord


@pytest.fixture
def record():
    return StepRecord(Accelerator(cpu=True))


def micro_batch(kl=1.0, router=None, **metrics):
    """What the model returns for one micro-batch."""
    return {
        "losses": {"kl": torch.tensor(kl), "lm": torch.tensor(2.0, requires_grad=True)},
        "router": {} if router is None else {"ce": torch.tensor(router)},
        "metrics": {name: torch.tensor(value) for name, value in metrics.items()},
    }


def test_shares_of_micro_batches_add_up_and_steps_are_averaged(record):
    for kls in ((1.0, 3.0), (5.0, 7.0)):
        for kl in kls:
            record.add(micro_batch(kl=kl, router=kl / 2, capacity=0.25))
        record.end_step()
    assert record.means() == pytest.approx({"loss_kl": 8.0, "loss_lm": 4.0, "router_ce": 4.0, "capacity": 0.5})


def test_means_start_anew_after_each_reading(record):
    record.add(micro_batch(kl=1.0))
    record.end_step()
    record.means()
    record.add(micro_batch(kl=9.0))
    record.end_step()
    assert record.means()["loss_kl"] == 9.0
    assert record.means() == {}


def test_a_step_that_is_not_over_is_not_read(record):
    record.add(micro_batch())
    assert record.means() == {}


def test_nothing_of_the_graph_is_kept(record):
    record.add(micro_batch())
    assert not any(value.requires_grad for value in record._totals.values())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_broken_micro_batch_anywhere_in_the_step_names_its_loss(record, value, position):
    for index in range(3):
        record.add(micro_batch(kl=value if index == position else 1.0))
    assert record.nonfinite_losses() == ["kl"]
    record.end_step()
    record.add(micro_batch())
    assert record.nonfinite_losses() == []


def test_a_loss_that_overflows_only_as_a_sum_is_not_blamed(record):
    record.add(micro_batch(kl=3e38))
    record.add(micro_batch(kl=3e38))
    assert record.nonfinite_losses() == []


def test_the_gap_is_the_mean_over_all_anchors_of_the_step(record):
    record.add(micro_batch(gap_difference=6.0, gap_count=3.0))
    record.add(micro_batch(gap_difference=-2.0, gap_count=1.0))
    assert float(record.mean_gap_difference()) == pytest.approx(4.0 / 4)
    record.end_step()
    assert record.mean_gap_difference() is None
    assert not {"gap_difference", "gap_count"} & set(record.means())


@pytest.mark.parametrize(("difference", "count"), [(0.0, 0.0), (math.nan, 3.0), (math.inf, 2.0)])
def test_a_step_without_a_sound_gap_has_none(record, difference, count):
    record.add(micro_batch(gap_difference=difference, gap_count=count))
    assert record.mean_gap_difference() is None


def test_sizes_are_summed_over_the_micro_batches_of_a_step(record):
    for size in (3.0, 4.0):
        record.add(micro_batch() | {"sizes": {"feature": torch.tensor(size)}})
    assert {name: float(size) for name, size in record.total_sizes(2).items()} == {"feature": 7.0}
    record.end_step()
    assert record.total_sizes(2) == {}


class Optimizer:
    cleared = 0

    def zero_grad(self):
        self.cleared += 1


def steps(record, kls, limit, epoch_steps=10):
    """The callback after one step for each value, the optimizer and the gap."""
    gap, optimizer, state = KnowledgeGap(), Optimizer(), TrainerState(global_step=0)
    callback = StepCallback(record, gap, max_nonfinite_steps=limit)
    for kl in kls:
        record.add(micro_batch(kl=kl, gap_difference=kl, gap_count=1.0))
        callback.on_pre_optimizer_step(None, state, TrainerControl(), model=torch.nn.Linear(1, 1), optimizer=optimizer)
        state.global_step += 1
        state.epoch = state.global_step / epoch_steps
        callback.on_step_end(None, state, TrainerControl())
    return optimizer, gap


def test_a_broken_step_loses_its_gradients_and_a_sound_one_keeps_them(record):
    optimizer, gap = steps(record, [1.0, math.nan, 3.0, math.inf], limit=2)
    assert optimizer.cleared == 2
    # Only the sound steps count for the gap.
    assert int(gap.steps) == 2 and float(gap.running) == pytest.approx(2.0)


def test_the_gap_is_measured_on_text_that_the_student_reads_for_the_first_time(record):
    _, gap = steps(record, [3.0, 2.0, 1.0, 0.5], limit=2, epoch_steps=3)
    assert int(gap.steps) == 3 and float(gap.running) == pytest.approx(2.0)


@pytest.mark.parametrize(("count", "lines"), [(GAP_WARMUP_STEPS, 1), (GAP_WARMUP_STEPS + 1, 0)])
def test_a_first_pass_is_too_short_until_the_gap_ratio_can_move(record, caplog, count, lines):
    gap = KnowledgeGap()
    for _ in range(count):
        gap.update(torch.tensor(1.0))
    gap.running.fill_(0.5)
    args = SimpleNamespace(gap_schedule=True, use_router=False)
    StepCallback(record, gap, max_nonfinite_steps=2).on_epoch_end(args, TrainerState(epoch=1.0), TrainerControl())
    assert len(caplog.records) == lines == int(gap.ratio() == 1)


def test_the_limit_counts_steps_in_a_row(record):
    steps(record, [math.nan, 1.0, math.nan, 1.0, math.nan], limit=2)
    record.end_step()
    with pytest.raises(NonFiniteLossError, match="loss kl is not finite at step 3, time 2 in a row"):
        steps(record, [1.0, math.nan, math.nan], limit=2)
