"""Distance between hidden states at anchors, blind to their scale."""

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_trainer.losses.reduction import select_pairs, token_mean

RMS_EPS = 1e-6
# Largest size of a channel, in upper quartiles over the channels: 4.6 standard deviations of a normal distribution.
OUTLIER_LIMIT = 4.0


def tame_outliers(states: Tensor) -> Tensor:
    """The states with every channel cut to `OUTLIER_LIMIT` times the upper quartile of the row's sizes.

    A few channels of a residual stream can be a thousand times larger than the rest
    (https://huggingface.co/papers/2402.17762). Uncut, they alone would say how far two states are apart. Cut, however
    large they are, three of them have 6 % of the weight among a thousand channels, and 26 % among two hundred.

    Args:
        states: `(..., hidden_size)`.

    Returns:
        Same shape; the input itself, in value, where nothing stands out.
    """
    # A quartile, because what stands out would raise the mean by which it is found. Sorted, because kthvalue refuses
    # to run where deterministic algorithms are asked for.
    quartile = states.abs().sort(dim=-1).values[..., (3 * states.shape[-1] - 1) // 4, None]
    bound = torch.where(quartile > 0, OUTLIER_LIMIT * quartile, torch.inf)
    return states.clamp(-bound, bound)


def feature_distance(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    r"""(1 - cosine) + mean squared error of two RMS-normalised vectors without their outliers, per row.

    Vectors of RMS 1 have mean((a - b) ** 2) = 2 (1 - cosine), so the sum is 3/2 of the squared error. It is computed
    in that form, because it is exactly 0 for equal vectors, which 1 - cosine is not in float32.

    The distance lies between 0 and 6, whatever the scale of either side, and massive channels do not settle it: see
    `tame_outliers`.

    Args:
        student_features: Float32, `(num_rows, hidden_size)`.
        teacher_features: Same shape.

    Returns:
        `(num_rows,)`.
    """
    student, teacher = (
        F.rms_norm(tame_outliers(x), x.shape[-1:], eps=RMS_EPS) for x in (student_features, teacher_features)
    )
    return 1.5 * (student - teacher).square().mean(dim=-1)


def feature_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    mask: Tensor,
    *,
    num_items_in_batch: Tensor | int | float | None = None,
) -> Tensor:
    """Mean `feature_distance` between the states of student and teacher at anchors.

    Matching hidden states through a projection follows FitNets (https://huggingface.co/papers/1412.6550).

    Args:
        student_features: `(..., hidden_size)`, projected to the teacher's width by the caller.
        teacher_features: Same shape. Receives no gradient.
        mask: True where an anchor counts, bool, `(...)`. Other positions may hold anything.
        num_items_in_batch: See `token_mean`.

    Returns:
        Scalar float32 between 0 and 6 (without `num_items_in_batch`).

    Raises:
        ConfigurationError: If the features differ in shape.
    """
    student, teacher = select_pairs(student_features, teacher_features, mask)
    return token_mean(feature_distance(student, teacher), num_items_in_batch)
