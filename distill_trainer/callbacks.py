"""Callbacks that move `ScheduledValues` along their curves, by step progress alone, so that resume needs no state."""

from collections.abc import Mapping, Sequence

from transformers import TrainerCallback, TrainerState
from transformers.integrations import get_reporting_integration_callbacks

from distill_trainer.errors import ConfigurationError
from distill_trainer.schedules import ScheduledValues, linear, phase, phase_weights, stepped, unlocked_fraction

# Share of the training steps after which top-k and temperatures have reached their final values.
WARMUP_RATIO = 0.5


class _ScheduleCallback(TrainerCallback):
    """Calls `update` with the fraction of training that is done, before each optimizer step."""

    def update(self, progress: float) -> None:
        """Write the values at `progress`, 0 at the first step."""
        raise NotImplementedError

    def on_train_begin(self, args, state: TrainerState, control, **kwargs):
        # Also here, so that what runs before the first step, such as an evaluation, sees the values of a resumed run.
        self.update(state.global_step / state.max_steps)

    def on_step_begin(self, args, state: TrainerState, control, **kwargs):
        self.update(state.global_step / state.max_steps)


class TopKScheduleCallback(_ScheduleCallback):
    """Step the router's top-k from `start` to `end` over the first part of training, an equal share for each k.

    Args:
        values: The values that the trainer reads; `top_k` is set in place before each optimizer step.
        start: Experts per anchor at step 0.
        end: Experts per anchor from step `warmup_ratio * max_steps` on, and for a share of the steps before it.
        warmup_ratio: Fraction of `max_steps` that the change takes, above 0 up to 1.

    Raises:
        ConfigurationError: If `warmup_ratio` is out of range.
    """

    def __init__(self, values: ScheduledValues, *, start: int, end: int, warmup_ratio: float):
        self.values, self.start, self.end = values, start, end
        self.warmup_ratio = _checked_ratio(warmup_ratio)

    def update(self, progress: float) -> None:
        """Set `top_k`."""
        self.values.top_k = stepped(self.start, self.end, progress / self.warmup_ratio)


class TemperatureScheduleCallback(_ScheduleCallback):
    """Move a temperature linearly from `start` to `end` over the first part of training.

    Args:
        values: The values that the trainer reads; set in place before each optimizer step.
        start: Temperature at step 0.
        end: Temperature from step `warmup_ratio * max_steps` on.
        warmup_ratio: Fraction of `max_steps` that the change takes, above 0 up to 1.
        attribute: Which temperature: `temperature` of the logit distillation, or `router_temperature`.

    Raises:
        ConfigurationError: If `warmup_ratio` is out of range, or the attribute is no temperature.
    """

    def __init__(
        self,
        values: ScheduledValues,
        *,
        start: float,
        end: float,
        warmup_ratio: float,
        attribute: str = "temperature",
    ):
        if attribute not in ("temperature", "router_temperature"):
            raise ConfigurationError(f"attribute must be temperature or router_temperature, got {attribute}.")
        self.values, self.start, self.end, self.attribute = values, start, end, attribute
        self.warmup_ratio = _checked_ratio(warmup_ratio)

    def update(self, progress: float) -> None:
        """Set the temperature."""
        setattr(self.values, self.attribute, linear(self.start, self.end, progress / self.warmup_ratio))


class _RouterTemperatureScheduleCallback(TemperatureScheduleCallback):
    """A class of its own, because the Trainer warns of two callbacks of one class."""


class LossWeightScheduleCallback(_ScheduleCallback):
    """Switch losses on phase by phase, and unlock the layers of the layer-wise loss in the third.

    Phase 1 trains on KL and LM, phase 2 adds attention and feature, phase 3 all.

    Args:
        values: The values that the trainer reads; `loss_weights` and `unlocked_fraction` are set before each
            optimizer step.
        weights: Weight of each loss of `LOSS_NAMES` once its phase has come.
        phase_boundaries: Fractions of `max_steps` at which phases 2 and 3 start; `(0, 0)` has all losses on at once.
    """

    def __init__(self, values: ScheduledValues, *, weights: Mapping[str, float], phase_boundaries: Sequence[float]):
        self.values, self.weights, self.phase_boundaries = values, weights, phase_boundaries

    def update(self, progress: float) -> None:
        """Set the loss weights and the unlocked fraction."""
        self.values.loss_weights = phase_weights(self.weights, phase(progress, self.phase_boundaries))
        self.values.unlocked_fraction = unlocked_fraction(progress, self.phase_boundaries[1])


class RouterLearningCallback(TrainerCallback):
    """Let the router learn in some steps only; in the others it routes without a gradient, which is cheaper.

    The capacity is fitted in either, because the student goes on changing.

    Args:
        values: The values that the trainer reads; `router_learns` is set before each optimizer step.
        interval: It learns in every so many steps, from the first on.
        until: Fraction of `max_steps` after which it learns no more.
    """

    def __init__(self, values: ScheduledValues, *, interval: int, until: float):
        self.values, self.interval, self.until = values, interval, until

    def on_step_begin(self, args, state: TrainerState, control, **kwargs):
        done = state.global_step >= self.until * state.max_steps
        self.values.router_learns = state.global_step % self.interval == 0 and not done


def _checked_ratio(warmup_ratio: float) -> float:
    if not 0 < warmup_ratio <= 1:
        raise ConfigurationError(f"warmup_ratio must be above 0 and up to 1, got {warmup_ratio}.")
    return warmup_ratio


def training_schedules(
    values: ScheduledValues,
    *,
    top_k: tuple[int, int],
    temperature: tuple[float, float],
    router_temperature: tuple[float, float],
    weights: Mapping[str, float],
    phase_boundaries: Sequence[float],
    router_interval: int,
    router_until: float,
) -> list[TrainerCallback]:
    """The callbacks of a training run. Top-k and temperatures go from start to end over its first half.

    Args:
        values: What the callbacks write.
        top_k: Start and end.
        temperature: Start and end.
        router_temperature: Start and end.
        weights: See `LossWeightScheduleCallback`.
        phase_boundaries: Likewise.
        router_interval: See `RouterLearningCallback`.
        router_until: Likewise.
    """
    return [
        TopKScheduleCallback(values, start=top_k[0], end=top_k[1], warmup_ratio=WARMUP_RATIO),
        TemperatureScheduleCallback(values, start=temperature[0], end=temperature[1], warmup_ratio=WARMUP_RATIO),
        _RouterTemperatureScheduleCallback(
            values,
            start=router_temperature[0],
            end=router_temperature[1],
            warmup_ratio=WARMUP_RATIO,
            attribute="router_temperature",
        ),
        LossWeightScheduleCallback(values, weights=weights, phase_boundaries=phase_boundaries),
        RouterLearningCallback(values, interval=router_interval, until=router_until),
    ]


def check_reporters(names: Sequence[str]) -> None:
    """Fail before any model is loaded if metrics cannot go where they should.

    Args:
        names: Integrations of the Trainer, such as `wandb` or `tensorboard`.

    Raises:
        ConfigurationError: If one is unknown, not installed, or needs a login.
    """
    for name in names:
        try:
            (callback,) = get_reporting_integration_callbacks([name])
            callback()
        except (ValueError, RuntimeError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise ConfigurationError(
                f"report_to must name integrations that work here, got {name}: {reason}"
            ) from error
    if "wandb" in names:
        import wandb

        try:
            wandb.login()
        except wandb.errors.UsageError as error:
            raise ConfigurationError(
                "report_to must not be wandb without a login. Run `wandb login`, or set WANDB_MODE=offline."
            ) from error
