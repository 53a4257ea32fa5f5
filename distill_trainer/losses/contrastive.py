"""InfoNCE between the hidden states of student and teacher at anchors."""

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_trainer.errors import ConfigurationError
from distill_trainer.losses.feature import tame_outliers
from distill_trainer.losses.reduction import select_pairs, token_mean

# Anchors of a batch that are compared, over all ranks: each has at most 255 negatives, however large the batch.
MAX_ANCHORS = 256


def evenly_spaced(count: int, limit: int, device: torch.device | None = None) -> Tensor:
    """Indices of at most `limit` of `count` rows, from the first to the last, `(min(count, limit),)`."""
    chosen = min(count, limit)
    return torch.arange(chosen, device=device) * (count - 1) // max(chosen - 1, 1)


def contrastive_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    mask: Tensor,
    *,
    temperature: float = 0.07,
    max_anchors: int = MAX_ANCHORS,
    texts: Tensor | None = None,
    other_features: Tensor | None = None,
    other_texts: Tensor | None = None,
) -> Tensor:
    r"""InfoNCE: how well a student's state picks its own teacher state among those of the other anchors.

    -log(exp(cos(s_i, t_i) / temperature) / sum_j exp(cos(s_i, t_j) / temperature)), averaged over i
    (https://huggingface.co/papers/1807.03748, equation 4; between student and teacher as in
    https://huggingface.co/papers/1910.10699; the temperature is that of
    https://huggingface.co/papers/1805.01978). The states are taken without their outliers, see `tame_outliers`. The
    sum holds each anchor's own teacher state and at most `max_anchors - 1 + num_others` negatives, so time and memory
    are bounded by `max_anchors` times as many.

    A batch-level term: the negatives are the other anchors of the micro-batch, so values of micro-batches do not add
    up to the whole batch's, and the plain mean comes back.

    Args:
        student_features: `(..., hidden_size)`, projected to the teacher's width by the caller.
        teacher_features: Same shape. Receives no gradient.
        mask: True where an anchor counts, bool, `(...)`. Other positions may hold anything.
        temperature: Divides the cosines, above 0.
        max_anchors: Most anchors that are used, evenly spaced over the counted ones, 2 or above.
        texts: What each anchor has read last, as integers, long, `(..., num_integers)`. Anchors that agree in all of
            them (the same text repeated) are not each other's negatives. None: all differ.
        other_features: Teacher states that are negatives only, such as those of other ranks, `(num_others,
            hidden_size)`. Receive no gradient. None: there are none.
        other_texts: What these have read last, `(num_others, num_integers)`. Needed with `texts`.

    Returns:
        Scalar float32, in nats per anchor. Zero, with a gradient path, where no anchor has a negative.

    Raises:
        ConfigurationError: If the features differ in shape, or `max_anchors` is below 2.
    """
    if max_anchors < 2:
        raise ConfigurationError(f"max_anchors must be 2 or above, got {max_anchors}.")
    student, teacher = select_pairs(student_features, teacher_features, mask)
    chosen = evenly_spaced(len(student), max_anchors, student.device)
    student, candidates = student[chosen], teacher[chosen]
    if other_features is not None:
        candidates = torch.cat([candidates, other_features.detach().float()])
    with torch.autocast(student.device.type, enabled=False):
        # With a massive channel in all states their cosines would be one.
        student, candidates = (F.normalize(tame_outliers(x), dim=-1) for x in (student, candidates))
        scores = student @ candidates.T / temperature
    if texts is not None:
        own = texts[mask][chosen]
        read = own if other_texts is None else torch.cat([own, other_texts])
        repeated = (own[:, None] == read).all(dim=-1)
        # Each is its own positive, which is no negative either way.
        scores = scores.masked_fill(repeated.fill_diagonal_(False), -torch.inf)
    targets = torch.arange(len(student), device=student.device)
    return token_mean(F.cross_entropy(scores, targets, reduction="none"))
