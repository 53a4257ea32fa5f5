"""Where two models agree: beliefs and attention of student and teacher at anchors."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill_trainer.anchors import Anchors
from distill_trainer.errors import UnsupportedModelError
from distill_trainer.evaluation.measure import evaluating, side_inputs
from distill_trainer.taps import check_attention, decoder_layers, run_trunk

# Rows of the vocabulary at a time: 256 float32 rows of 152k tokens are 156 MB.
ANCHORS_PER_CHUNK = 256
GAP_GROUPS = 10


def anchor_index(batch: dict[str, Tensor], side: str, mask: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and position of the anchors that are True in `mask` `(batch_size, num_anchors_in_row)`, in its order."""
    positions, mask = side_inputs(batch, side, device)[2], mask.to(device)
    return mask.nonzero()[:, 0], positions[mask]


def replace_at_anchors(values: Tensor, rows: Tensor, batch: dict[str, Tensor], mask: Tensor) -> Tensor:
    """The teacher's `values` with other rows at some of the anchors, changed in place.

    Args:
        values: `(batch_size, teacher_sequence_length, ...)`.
        rows: `(num_anchors, ...)`, in the order of `mask.nonzero()`.
        batch: A collated batch.
        mask: Which anchors they are, bool, the shape of the batch's `anchor_mask`.
    """
    index = anchor_index(batch, "teacher", mask, values.device)
    return values.index_put_(index, rows.to(device=values.device, dtype=values.dtype))


def retention_values(
    student_logits: Tensor,
    teacher_logits: Tensor,
    batch: dict[str, Tensor],
    teacher_log_probs: Callable[[Tensor], Tensor],
) -> Tensor:
    """Knowledge retention at each anchor of a batch that a token follows.

    Args:
        student_logits: `(batch_size, student_sequence_length, student_vocab_size)`.
        teacher_logits: `(batch_size, teacher_sequence_length, teacher_vocab_size)`.
        batch: A collated batch.
        teacher_log_probs: Maps teacher logits to log-probabilities over the student's vocabulary.

    Returns:
        `(num_anchors, 3)` float64 on the CPU: KL(teacher || student) in nats, top-1 agreement, top-5 overlap.
    """
    from distill_trainer.evaluation.metrics.knowledge_retention.knowledge_retention import retention_per_position

    # Where no token follows, the window ends; there is a later one that holds this anchor, or the document ends too.
    mask = Anchors.of(batch).mask
    student_index = anchor_index(batch, "student", mask, student_logits.device)
    teacher_index = anchor_index(batch, "teacher", mask, teacher_logits.device)
    student_chunks = student_logits[student_index].split(ANCHORS_PER_CHUNK)
    teacher_chunks = teacher_logits[teacher_index].split(ANCHORS_PER_CHUNK)
    values = []
    for student_rows, teacher_rows in zip(student_chunks, teacher_chunks, strict=True):
        teacher_logprobs = teacher_log_probs(teacher_rows.float()).to(student_rows.device)
        values.append(retention_per_position(student_rows.float().log_softmax(dim=-1), teacher_logprobs))
    return torch.cat(values)


def quantile_groups(values: Tensor, num_groups: int) -> list[Tensor]:
    """Indices of `values` `(num_values,)` in groups of equal size (one more or less), the lowest values first.

    Equal values stay together, so the order of the anchors decides nothing; where many are equal, groups differ in
    size and there may be fewer.
    """
    # How many values lie below each one.
    ranks = torch.searchsorted(values.sort().values, values.contiguous())
    groups = ranks * num_groups // max(len(values), 1)
    found = ((groups == group).nonzero()[:, 0] for group in range(num_groups))
    return [members for members in found if len(members)]


def gap_deciles(
    before: Tensor | None, after: Tensor, baseline: Tensor | None
) -> list[dict[str, float | int | None]] | None:
    """Where training closed the gap: anchors in ten groups by the gap before training, the smallest first.

    Args:
        before: KL(teacher || student) of the student before training, nats, `(num_anchors,)`. None if unknown.
        after: The same of the distilled student.
        baseline: The same of the student that was trained without a teacher. None if unknown.

    Returns:
        For each group its `anchors` and the mean gap `before`, `after` and of the `baseline` (None without one); None
        without `before`.
    """
    if before is None:
        return None
    return [
        {
            "anchors": len(members),
            "before": before[members].mean().item(),
            "after": after[members].mean().item(),
            "baseline": None if baseline is None else baseline[members].mean().item(),
        }
        for members in quantile_groups(before, GAP_GROUPS)
    ]


def attention_similarity(
    student: PreTrainedModel, teacher: PreTrainedModel, batches: Iterable[dict[str, Tensor]]
) -> float | None:
    """One minus the Jensen-Shannon divergence (bits) of both models' last attention layers, averaged over anchors.

    Attention is averaged over heads and pooled over the spans of text between anchors, which both models share. The
    first anchor of a row sees one span only and is left out.

    Args:
        student: Any causal language model.
        teacher: Likewise.
        batches: Collated batches.

    Returns:
        Similarity from 0 to 1, or None if the attention of a model cannot be read or there are no two anchors.
    """
    from distill_trainer.evaluation.metrics.attention_similarity.attention_similarity import similarity_per_row

    values = []
    with evaluating(student, teacher):
        try:
            check_attention(student)
            check_attention(teacher)
        except UnsupportedModelError:
            return None
        for batch in batches:
            student_spans = _last_layer_spans(student, batch, "student")
            teacher_spans = _last_layer_spans(teacher, batch, "teacher")
            # The spans are those of the whole window, the rows those of the anchors that count.
            counted = batch["anchor_mask"].cpu().clone()
            counted[:, 0] = False
            values.append(similarity_per_row(student_spans[counted], teacher_spans[counted]))
    return torch.cat(values).mean().item() if sum(map(len, values)) else None


def _last_layer_spans(model: PreTrainedModel, batch: dict[str, Tensor], side: str) -> Tensor:
    """Mean attention over heads of the last layer at the anchors, pooled over the spans between them.

    Returns:
        `(batch_size, num_anchors, num_anchors)`, on the CPU.
    """
    input_ids, attention_mask, positions = side_inputs(batch, side, model.device)
    last = len(decoder_layers(model)) - 1
    taps = run_trunk(model, input_ids, attention_mask, attention_layers=(last,)).attentions[last]
    anchor_mask = batch.get("window_anchor_mask", batch["anchor_mask"]).to(model.device)
    return taps.over_spans(positions, attention_mask, anchor_mask)[:, 0].cpu()
