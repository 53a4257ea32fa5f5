"""What changes during training, and the curves along which it changes. Everything is a function of step progress."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

LOSS_NAMES = ("kl", "feature", "attention", "layerwise", "contrastive", "lm")
# Those over the vocabulary, whose gradients one pass forms together.
LOGIT_LOSSES = ("kl", "lm")

# Orders of the training windows; the last two name the column that says how difficult a window is.
DATA_CURRICULA = ("none", "length", "teacher_loss")

# Losses that each phase adds to those of the phases before it.
PHASE_LOSSES = {1: ("kl", "lm"), 2: ("attention", "feature"), 3: ("layerwise", "contrastive")}


@dataclass
class ScheduledValues:
    """Values that callbacks change during training and the trainer reads at each step.

    Attributes:
        temperature: Softmax temperature of the logit distillation.
        router_temperature: Softmax temperature of the student-aware router.
        top_k: Experts that the router selects per anchor.
        loss_weights: Weight of each loss of `LOSS_NAMES` in the current phase; 0 skips a loss.
        unlocked_fraction: Share of the mapped layers, from the bottom, that the layer-wise loss uses.
        router_learns: Whether the router gets a gradient in this step.
    """

    temperature: float = 1.0
    router_temperature: float = 1.0
    top_k: int = 1
    loss_weights: dict[str, float] = field(default_factory=dict)
    unlocked_fraction: float = 1.0
    router_learns: bool = True


def linear(start: float, end: float, progress: float) -> float:
    """Value at `progress` on the straight line from `start` (progress 0) to `end` (progress 1), constant outside."""
    return start + (end - start) * min(max(progress, 0.0), 1.0)


def stepped(start: int, end: int, progress: float) -> int:
    """Integer at `progress` on the way from `start` to `end`, up or down, constant outside of progress 0 to 1.

    Every integer holds for an equal share, so 1 to 4 reaches 4 at progress 0.75 and keeps it for the last quarter.
    """
    taken = int(linear(0, abs(end - start) + 1, progress))
    return end if taken >= abs(end - start) else start + (taken if end > start else -taken)


def phase(progress: float, boundaries: Sequence[float]) -> int:
    """Phase of training, 1 to 3: the second starts at `boundaries[0]`, the third at `boundaries[1]`, as fractions."""
    return 1 + sum(progress >= boundary for boundary in boundaries)


def phase_weights(weights: Mapping[str, float], phase: int) -> dict[str, float]:
    """Loss weights in a phase: those of losses that a later phase adds are 0, the others are unchanged."""
    active = {name for first, names in PHASE_LOSSES.items() if first <= phase for name in names}
    return {name: weight if name in active else 0.0 for name, weight in weights.items()}


def effective_logit_weights(kl_weight: float, lm_weight: float | None, gap_ratio: float) -> tuple[float, float]:
    """Weights of the KL and the LM loss at a knowledge gap, so that LM takes over as the student catches up.

    Args:
        kl_weight: Weight of the KL loss at the full gap, its ceiling.
        lm_weight: Weight of the LM loss. None is 1 minus the effective KL weight, at least 0.
        gap_ratio: Running knowledge gap over its value at the start of training, cut to 0 to 1. 1 changes nothing.
    """
    kl_weight = linear(0.0, kl_weight, gap_ratio)
    return kl_weight, max(1.0 - kl_weight, 0.0) if lm_weight is None else lm_weight


def competence(progress: float, start: float = 0.01) -> float:
    """Share of the training windows, from the easiest, that may be drawn; 1 at the end.

    The square-root model of https://huggingface.co/papers/1903.09848: windows join the slower the more there are
    already, so that each has its time.

    Args:
        progress: Fraction of the curriculum that is done.
        start: Share at progress 0.
    """
    return math.sqrt(linear(start**2, 1.0, progress))


def unlocked_fraction(progress: float, start: float) -> float:
    """Share of the mapped layers that is unlocked: 0 until `start`, 1 from halfway between `start` and the end on.

    Args:
        progress: Fraction of training that is done.
        start: Progress at which the layer-wise loss begins; 0.6 has all layers unlocked at 0.8.
    """
    return 0.0 if start >= 1 else linear(0.0, 1.0, (progress - start) / ((1 - start) / 2))
