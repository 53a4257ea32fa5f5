"""Attention at anchors, comparable across tokenizers: the mass that each span of text between anchors receives."""

import torch
from torch import Tensor

from distill_trainer.losses.reduction import select_pairs, token_mean

# Span masses below this count as this: the gradient of the logarithm stays finite in float32.
MASS_FLOOR = 1e-12


def attention_rows(
    query: Tensor, key: Tensor, positions: Tensor, key_mask: Tensor, scaling: float, *, visible: Tensor | None = None
) -> Tensor:
    """Rows of the causal attention matrix at the anchors: softmax(q k^T * scaling) over the keys up to each anchor.

    Only these rows are formed, so the extra memory is `num_anchors` rows, not `sequence_length`. Soft caps and sinks
    are left out.

    Args:
        query: Behind the position embedding, `(batch_size, num_heads, sequence_length, head_dim)`.
        key: Likewise, `(batch_size, num_key_value_heads, sequence_length, head_dim)`; each key head serves
            `num_heads / num_key_value_heads` consecutive query heads.
        positions: Index of each anchor's token, long, `(batch_size, num_anchors)`.
        key_mask: True for real tokens, bool, `(batch_size, sequence_length)`.
        scaling: Factor of the scores, as the model uses it.
        visible: True where a query sees a key, bool, `(batch_size, 1, sequence_length, sequence_length)`, for sliding
            windows and the like. None: all keys up to it.

    Returns:
        Float32, `(batch_size, num_heads, num_anchors, sequence_length)`. Rows sum to 1. A row at a padding token is
        finite and means nothing.
    """
    num_heads, num_key_heads, head_dim = query.shape[1], key.shape[1], query.shape[3]
    # Zeros in place of what padding holds: a NaN there would reach real tokens through the backward of the product.
    real_rows = key_mask.gather(1, positions)
    rows = query.gather(2, positions[:, None, :, None].expand(-1, num_heads, -1, head_dim))
    rows = rows.masked_fill(~real_rows[:, None, :, None], 0).float() * scaling
    key = key.masked_fill(~key_mask[:, None, :, None], 0).float()
    allowed = key_mask[:, None] & (torch.arange(key.shape[2], device=key.device) <= positions[..., None])
    if visible is not None:
        allowed = allowed & visible[:, 0].gather(1, positions[..., None].expand(-1, -1, key.shape[2]))
    with torch.autocast(query.device.type, enabled=False):
        grouped = rows.unflatten(1, (num_key_heads, num_heads // num_key_heads)).flatten(2, 3)
        scores = (grouped @ key.transpose(2, 3)).reshape(*rows.shape[:3], -1)
    # The smallest float and not -inf: a row at a padding token has no key at all, and must not be NaN.
    return scores.masked_fill_(~allowed[:, None], torch.finfo(torch.float32).min).softmax(dim=-1)


def pool_spans(rows: Tensor, positions: Tensor, anchor_mask: Tensor) -> Tensor:
    """Attention mass of each span between anchors.

    Span m holds the keys in (positions[m - 1], positions[m]], span 0 all up to positions[0], a BOS included. Both
    models read the same text in a span, however each one cuts it into tokens. Pooling is linear, so a caller who needs
    the mean over heads only may average `rows` first.

    Args:
        rows: See `attention_rows`, `(batch_size, num_heads, num_anchors, sequence_length)`.
        positions: Index of each anchor's token, increasing, long, `(batch_size, num_anchors)`.
        anchor_mask: True for real anchors, bool, `(batch_size, num_anchors)`.

    Returns:
        Float32, `(batch_size, num_heads, num_anchors, num_anchors)`. Row a is a distribution over the spans 0..a.
    """
    ends = positions.masked_fill(~anchor_mask, -1)
    starts = torch.cat([torch.full_like(ends[:, :1], -1), ends.cummax(dim=1).values[:, :-1]], dim=1)
    tokens = torch.arange(rows.shape[-1], device=rows.device)[None, :, None]
    # A product with 0 and 1, for a scatter would add in random order on a GPU. The end of a padded anchor is -1.
    members = ((tokens > starts[:, None]) & (tokens <= ends[:, None])).float()
    with torch.autocast(rows.device.type, enabled=False):
        return (rows.float().flatten(1, 2) @ members).unflatten(1, rows.shape[1:3])


def attention_loss(
    student_rows: Tensor,
    teacher_rows: Tensor,
    mask: Tensor,
    *,
    num_items_in_batch: Tensor | int | float | None = None,
) -> Tensor:
    r"""KL(teacher || student) between the heads' mean attention over spans, at each anchor.

    Transfer of attention distributions by KL follows MiniLM (https://huggingface.co/papers/2002.10957);
    pooling over spans makes it independent of the tokenizers, averaging over heads of the number of heads.

    Args:
        student_rows: See `pool_spans`, `(batch_size, num_student_heads, num_anchors, num_anchors)`.
        teacher_rows: `(batch_size, num_teacher_heads, num_anchors, num_anchors)`. Receives no gradient.
        mask: True where an anchor counts, bool, `(batch_size, num_anchors)`. Other rows may hold anything.
        num_items_in_batch: See `token_mean`.

    Returns:
        Scalar float32, in nats per anchor. A row of a single span adds 0.

    Raises:
        ConfigurationError: If the rows differ in shape apart from the heads.
    """
    student, teacher = (rows.mean(dim=1, dtype=torch.float32) for rows in (student_rows, teacher_rows))
    student, teacher = (rows.clamp(min=MASS_FLOOR) for rows in select_pairs(student, teacher, mask))
    return token_mean((teacher * (teacher.log() - student.log())).sum(dim=-1), num_items_in_batch)
