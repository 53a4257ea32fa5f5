import pytest
from transformers import TrainerState

from distill_trainer.callbacks import (
    LossWeightScheduleCallback,
    RouterLearningCallback,
    TemperatureScheduleCallback,
    TopKScheduleCallback,
)
from distill_trainer.errors import ConfigurationError
from distill_trainer.schedules import LOSS_NAMES, ScheduledValues

MAX_STEPS = 40
WEIGHTS = dict(zip(LOSS_NAMES, (0.7, 0.1, 0.1, 0.05, 0.05, 0.3), strict=True))


def all_callbacks():
    values = ScheduledValues()
    return values, [
        TopKScheduleCallback(values, start=1, end=4, warmup_ratio=0.5),
        TemperatureScheduleCallback(values, start=4.0, end=1.0, warmup_ratio=0.8),
        TemperatureScheduleCallback(values, start=2.0, end=0.5, warmup_ratio=1.0, attribute="router_temperature"),
        LossWeightScheduleCallback(values, weights=WEIGHTS, phase_boundaries=(0.3, 0.6)),
    ]


def run(first_step: int = 0, event: str = "on_step_begin"):
    """Values that the trainer reads at each step of a run from `first_step` on."""
    values, callbacks = all_callbacks()
    trace = []
    for step in range(first_step, MAX_STEPS):
        for callback in callbacks:
            getattr(callback, event)(None, TrainerState(global_step=step, max_steps=MAX_STEPS), None)
        trace.append(ScheduledValues(**{**vars(values), "loss_weights": dict(values.loss_weights)}))
    return trace


def test_a_resumed_run_continues_the_same_values():
    assert run(first_step=17) == run()[17:]


def test_values_are_right_before_the_first_step_of_a_resumed_run():
    assert run(event="on_train_begin") == run()


def test_top_k_has_its_final_value_from_the_end_of_the_warm_up_on():
    top_k = [values.top_k for values in run()]
    assert top_k[:20] == [1] * 5 + [2] * 5 + [3] * 5 + [4] * 5
    assert set(top_k[20:]) == {4}


def test_temperatures_anneal_independently_and_the_first_step_has_the_start():
    trace = run()
    assert (trace[0].temperature, trace[0].router_temperature) == (4.0, 2.0)
    assert trace[16].temperature == pytest.approx(2.5)
    assert {values.temperature for values in trace[32:]} == {1.0}
    assert trace[20].router_temperature == pytest.approx(1.25)


def test_loss_weights_follow_the_phases_and_layers_unlock_in_the_third():
    trace = run()
    phases = [sum(weight > 0 for weight in values.loss_weights.values()) for values in trace]
    assert phases == [2] * 12 + [4] * 12 + [6] * 16
    assert trace[-1].loss_weights == WEIGHTS
    unlocked = [values.unlocked_fraction for values in trace]
    assert unlocked[:25] == [0.0] * 25 and unlocked[28] == pytest.approx(0.5) and unlocked[32:] == [1.0] * 8


def test_a_schedule_leaves_the_values_of_the_others_alone():
    values = ScheduledValues(temperature=9.0, router_temperature=8.0, loss_weights={"kl": 1.0})
    TopKScheduleCallback(values, start=3, end=3, warmup_ratio=1.0).on_step_begin(
        None, TrainerState(global_step=1, max_steps=2), None
    )
    assert values == ScheduledValues(9.0, 8.0, 3, {"kl": 1.0}, 1.0)


@pytest.mark.parametrize("ratio", [0, -0.1, 1.5])
@pytest.mark.parametrize("callback", [TopKScheduleCallback, TemperatureScheduleCallback])
def test_a_warmup_ratio_out_of_range_is_refused(callback, ratio):
    with pytest.raises(ConfigurationError, match=f"warmup_ratio must be above 0 and up to 1, got {ratio}"):
        callback(ScheduledValues(), start=1, end=4, warmup_ratio=ratio)


def test_an_unknown_temperature_is_refused():
    with pytest.raises(ConfigurationError, match="got temprature"):
        TemperatureScheduleCallback(ScheduledValues(), start=1, end=4, warmup_ratio=1, attribute="temprature")


@pytest.mark.parametrize(
    ("interval", "until", "expected"),
    [(1, 1.0, list(range(12))), (4, 1.0, [0, 4, 8]), (1, 0.5, [0, 1, 2, 3, 4, 5]), (4, 0.5, [0, 4])],
)
def test_the_router_learns_in_these_steps(interval, until, expected):
    values = ScheduledValues()
    callback = RouterLearningCallback(values, interval=interval, until=until)
    learned = []
    for step in range(12):
        callback.on_step_begin(None, TrainerState(global_step=step, max_steps=12), None)
        learned += [step] * values.router_learns
    assert learned == expected
