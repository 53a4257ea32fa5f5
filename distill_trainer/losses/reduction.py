"""What every loss does first and last: select the rows that count, reduce each to a value, and average the values."""

import torch
from torch import Tensor

from distill_trainer.errors import ConfigurationError


def select_pairs(student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of both sides where the mask is True, in float32, the teacher's detached.

    Args:
        student: `(..., size)`. Rows outside the mask may hold anything, NaN included.
        teacher: Same shape as `student`.
        mask: True where a row counts, bool, `(...)`.

    Returns:
        Student and teacher, each `(num_rows, size)`. Empty, with a gradient path, when nothing counts.

    Raises:
        ConfigurationError: If the two sides differ in shape, or the mask is not bool.
    """
    if student.shape != teacher.shape:
        raise ConfigurationError(
            f"student and teacher must have the same shape, got {tuple(student.shape)} and {tuple(teacher.shape)}. "
            "Align their positions and project them to one width first."
        )
    check_mask(mask)
    # Select before the arithmetic: multiplying by the mask afterwards would turn a NaN pad into a NaN gradient.
    return student[mask].float(), teacher[mask].detach().float()


def check_mask(mask: Tensor) -> None:
    """Raise a `ConfigurationError` unless the mask is bool: integers 0 and 1 would select rows 0 and 1."""
    if mask.dtype != torch.bool:
        raise ConfigurationError(f"mask must be a bool tensor, got {mask.dtype}. Call .bool() on it.")


def token_mean(
    per_token: Tensor, num_items_in_batch: Tensor | int | float | None = None, weights: Tensor | None = None
) -> Tensor:
    """Sum of the counted tokens' values over how many tokens the whole batch counts.

    Args:
        per_token: One value per counted token, `(num_tokens,)`. May be empty.
        num_items_in_batch: Counted tokens in the whole accumulated batch. None divides by `num_tokens`.
        weights: Factor of each token, `(num_tokens,)`, mean one over the batch. None weighs all alike.

    Returns:
        Scalar. Zero, with a gradient path, when `per_token` is empty.
    """
    if weights is not None:
        per_token = per_token * weights
    if num_items_in_batch is None:
        num_items_in_batch = max(per_token.numel(), 1)
    return per_token.sum() / num_items_in_batch


def row_dot(left: Tensor, right: Tensor) -> Tensor:
    """Dot product over the last dimension, `(..., size)` twice -> `(...)`, without a product as large as they are."""
    # A product of matrices, which an autocast context would compute in its own type.
    with torch.autocast(left.device.type, enabled=False):
        return (left.unsqueeze(-2) @ right.unsqueeze(-1)).squeeze(-1).squeeze(-1)
