import copy

import pytest
from builders import arguments, logged, tiny_llama, tiny_trainer
from transformers import TrainerCallback, TrainerControl, TrainerState

from distill_trainer.baseline import run_baseline, steps_of
from distill_trainer.early_stopping import ResumableEarlyStoppingCallback
from distill_trainer.errors import ConfigurationError
from distill_trainer.parsing import parse_arguments

EACH_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
# A rate at which the student gets worse after a while.
FALLING_APART = {"learning_rate": 3.0, "lr_scheduler_type": "constant", **EACH_STEP}


def stop_after(curve, patience, threshold):
    """Evaluations until a run stops, in our own words; None if it does not."""
    best, without = float("inf"), 0
    for count, value in enumerate(curve, 1):
        without = 0 if value < best - threshold else without + 1
        best = min(best, value)
        if without == patience:
            return count
    return None


CURVES = {
    "better each time": [5.0, 4.0, 3.0, 2.0, 1.0],
    "worse each time": [1.0, 2.0, 3.0, 4.0, 5.0],
    "better after a while": [3.0, 3.1, 2.95, 3.0, 3.2],
    "always the same": [3.0, 3.0, 3.0, 3.0, 3.0],
    "better by little": [3.0, 2.95, 2.91, 2.88, 2.5],
}


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
@pytest.mark.parametrize(("patience", "threshold"), [(1, 0.0), (2, 0.0), (2, 0.1)])
@pytest.mark.parametrize("resumed_after", [0, 1, 2, 3])
def test_a_run_stops_after_so_many_evaluations_without_a_better_one_also_if_resumed(
    tmp_path, curve, patience, threshold, resumed_after
):
    args = arguments(tmp_path, **EACH_STEP, load_best_model_at_end=True)
    expected = stop_after(curve, patience, threshold)
    if expected is not None and expected <= resumed_after:
        pytest.skip("there is nothing to resume")
    past = [entry for value in curve[:resumed_after] for entry in ({"loss": 1.0}, {"eval_bits_per_byte": value})]
    state = TrainerState(log_history=past, best_metric=min(curve[:resumed_after], default=None))
    control = TrainerControl()
    callback = ResumableEarlyStoppingCallback(patience, threshold)
    callback.on_train_begin(args, state, control)
    stopped = None
    for count, value in enumerate(curve[resumed_after:], resumed_after + 1):
        callback.on_evaluate(args, state, control, {"eval_bits_per_byte": value})
        state.best_metric = value if state.best_metric is None else min(state.best_metric, value)
        if control.should_training_stop and stopped is None:
            stopped = count
    assert stopped == expected


def test_a_student_that_falls_apart_stops_and_its_best_checkpoint_is_loaded(tmp_path):
    trainer = tiny_trainer(
        tmp_path, max_steps=12, rows=100, load_best_model_at_end=True, early_stopping_patience=2, **FALLING_APART
    )
    trainer.train()
    curve = logged(trainer, "eval_bits_per_byte")
    assert len(curve) == trainer.state.global_step == stop_after(curve, 2, 0.0) < 12
    # Fewer bits are better: a Trainer that is told nothing takes the largest value of a metric that is no loss.
    assert trainer.state.best_metric == min(curve) < curve[-1]
    assert trainer.evaluate()["eval_bits_per_byte"] == pytest.approx(min(curve), rel=1e-6)


@pytest.mark.parametrize("best", [True, False])
def test_the_report_knows_where_each_training_stopped_by_its_own_evaluations(tmp_path, best):
    settings = {"max_steps": 6, "rows": 100, "early_stopping_patience": 1, "load_best_model_at_end": best}
    student = tiny_llama()
    before = copy.deepcopy(student)
    trainer = tiny_trainer(tmp_path, student=student, **settings, **FALLING_APART)
    trainer.train()
    # The baseline gets better each time, to its end.
    trainer.args.learning_rate = 1e-4
    baseline = run_baseline(trainer, before)
    steps = steps_of(trainer, baseline)
    curve = logged(trainer, "eval_bits_per_byte")
    scored = curve.index(min(curve)) + 1 if best else len(curve)
    assert steps == {
        "planned": 6,
        "student": {"ended": stop_after(curve, 1, 0.0), "scored": scored},
        "baseline": {"ended": 6, "scored": 6},
    }
    assert len(curve) < 6 and steps_of(trainer, None)["baseline"] is None


class StopAt(TrainerCallback):
    """Ends a run as an interrupt would, after the checkpoint of a step."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def test_a_resumed_run_stops_where_the_uninterrupted_one_did(tmp_path):
    settings = {"max_steps": 12, "rows": 100, "early_stopping_patience": 3, **FALLING_APART}
    settings |= {"load_best_model_at_end": True}
    whole = tiny_trainer(tmp_path / "whole", **settings)
    whole.train()
    stopped = whole.state.global_step
    first = tiny_trainer(tmp_path / "first", callbacks=[StopAt(stopped - 1)], **settings)
    first.train()
    resumed = tiny_trainer(tmp_path / "first", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"first/checkpoint-{stopped - 1}"))
    assert resumed.state.global_step == stopped < 12
    assert logged(resumed, "eval_bits_per_byte") == logged(whole, "eval_bits_per_byte")


def test_a_run_without_patience_goes_on(tmp_path):
    trainer = tiny_trainer(tmp_path, learning_rate=0.0, router_learning_rate=0.0, **EACH_STEP)
    trainer.train()
    assert trainer.state.global_step == 4


def test_the_command_line_sets_patience_and_threshold(tmp_path):
    flags = ["--early_stopping_patience", "3", "--early-stopping-threshold", "0.01", "--eval_strategy", "epoch"]
    *_, training = parse_arguments([*flags, "--output_dir", str(tmp_path)])
    assert (training.early_stopping_patience, training.early_stopping_threshold) == (3, 0.01)
    assert (training.metric_for_best_model, training.greater_is_better) == ("eval_bits_per_byte", False)


REFUSED = {
    "no patience": ({"early_stopping_patience": 0}, "early_stopping_patience must be 1 or above, got 0"),
    "a negative threshold": ({"early_stopping_threshold": -1.0}, "early_stopping_threshold must be 0 or above"),
    "no evaluation": (
        {"early_stopping_patience": 2, "eval_strategy": "no"},
        "eval_strategy must be steps or epoch with early_stopping_patience, got no",
    ),
    "no evaluation for the best": (
        {"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "no"},
        "eval_strategy must be steps or epoch with load_best_model_at_end, got no",
    ),
    "a metric that is not measured": (
        {"early_stopping_patience": 2, "eval_strategy": "steps", "metric_for_best_model": "eval_perplexity"},
        "metric_for_best_model must be eval_bits_per_byte or eval_loss with early_stopping_patience, got eval_p",
    ),
    "the worst as the best": (
        {"early_stopping_patience": 2, "eval_strategy": "steps", "greater_is_better": True},
        "greater_is_better must be false with early_stopping_patience, got true",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_settings_that_cannot_work_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        arguments(tmp_path, **({"eval_strategy": "epoch"} | changes))
