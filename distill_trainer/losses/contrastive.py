"""InfoNCE between the hidden states of student and teacher at anchors."""

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_trainer.errors import ConfigurationError
from distill_trainer.losses.reduction import select_pairs, token_mean


def contrastive_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    mask: Tensor,
    *,
    temperature: float = 0.07,
    max_anchors: int = 256,
    groups: Tensor | None = None,
) -> Tensor:
    r"""InfoNCE: how well a student's state picks its own teacher state among those of the other anchors.

    -log(exp(cos(s_i, t_i) / temperature) / sum_j exp(cos(s_i, t_j) / temperature)), averaged over i
    (https://huggingface.co/papers/1807.03748, equation 4; between student and teacher as in
    https://huggingface.co/papers/1910.10699).

    A batch-level term: the negatives are the other anchors of the micro-batch, so values of micro-batches do not add
    up to the whole batch's, and the plain mean comes back.

    Args:
        student_features: `(..., hidden_size)`, projected to the teacher's width by the caller.
        teacher_features: Same shape. Receives no gradient.
        mask: True where an anchor counts, bool, `(...)`. Other positions may hold anything.
        temperature: Divides the cosines, above 0.
        max_anchors: Most anchors that are used, evenly spaced over the counted ones, 2 or above.
        groups: Id of each anchor, long, shape of `mask`. Anchors of one id (the same text repeated) are not each
            other's negatives. None: all differ.

    Returns:
        Scalar float32, in nats per anchor. Zero, with a gradient path, for fewer than two anchors.

    Raises:
        ConfigurationError: If the features differ in shape, or `max_anchors` is below 2.
    """
    if max_anchors < 2:
        raise ConfigurationError(f"max_anchors must be 2 or above, got {max_anchors}.")
    student, teacher = select_pairs(student_features, teacher_features, mask)
    count = min(len(student), max_anchors)
    chosen = torch.arange(count, device=student.device) * (len(student) - 1) // max(count - 1, 1)
    with torch.autocast(student.device.type, enabled=False):
        scores = F.normalize(student[chosen], dim=-1) @ F.normalize(teacher[chosen], dim=-1).T / temperature
    if groups is not None:
        own = groups[mask][chosen]
        repeated = (own[:, None] == own) & ~torch.eye(count, dtype=torch.bool, device=own.device)
        scores = scores.masked_fill(repeated, -torch.inf)
    targets = torch.arange(count, device=student.device)
    return token_mean(F.cross_entropy(scores, targets, reduction="none"))
