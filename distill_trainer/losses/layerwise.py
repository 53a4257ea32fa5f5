"""Layer-by-layer distance between student and teacher, unlocked from the bottom."""

import math
from collections.abc import Sequence

from torch import Tensor

from distill_trainer.errors import ConfigurationError
from distill_trainer.losses.feature import feature_loss


def num_unlocked(num_pairs: int, unlocked_fraction: float) -> int:
    """How many pairs of layers, from the bottom, `unlocked_fraction` opens: at least 1, a started pair counts."""
    # The small difference keeps 0.07 * 100 = 7.000000000000001 from counting as 8.
    return min(max(math.ceil(unlocked_fraction * num_pairs - 1e-6), 1), num_pairs)


def layerwise_loss(
    student_layers: Sequence[Tensor],
    teacher_layers: Sequence[Tensor],
    mask: Tensor,
    *,
    unlocked_fraction: float = 1.0,
    num_items_in_batch: Tensor | int | float | None = None,
) -> Tensor:
    """Mean of `feature_loss` over the unlocked pairs of layers.

    Mapping student layers to teacher layers follows Patient Knowledge Distillation
    (https://huggingface.co/papers/1908.09355).

    Args:
        student_layers: One `(..., hidden_size)` per pair from bottom to top, projected to the teacher's width.
        teacher_layers: The teacher's layer of each pair, same shapes. Receive no gradient.
        mask: True where an anchor counts, bool, `(...)`. Other positions may hold anything.
        unlocked_fraction: Share of the pairs, from the bottom, that count, from 0 (the first pair) to 1 (all).
        num_items_in_batch: See `token_mean`.

    Returns:
        Scalar float32 between 0 and 6 (without `num_items_in_batch`).

    Raises:
        ConfigurationError: If there are no pairs, the lists differ in length, or a pair differs in shape.
    """
    if not student_layers or len(student_layers) != len(teacher_layers):
        raise ConfigurationError(
            "student_layers and teacher_layers must be equally long and not empty, "
            f"got {len(student_layers)} and {len(teacher_layers)} layers."
        )
    count = num_unlocked(len(student_layers), unlocked_fraction)
    losses = [
        feature_loss(student, teacher, mask, num_items_in_batch=num_items_in_batch)
        for student, teacher in zip(student_layers[:count], teacher_layers[:count], strict=True)
    ]
    return sum(losses[1:], start=losses[0]) / count
