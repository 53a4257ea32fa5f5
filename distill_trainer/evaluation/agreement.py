"""Where two models agree: beliefs and attention of student and teacher at anchors, and the router's choices."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill_trainer.aligned import RoutedBatch
from distill_trainer.errors import UnsupportedModelError
from distill_trainer.evaluation.measure import evaluating, side_inputs
from distill_trainer.losses.attention import attention_rows, pool_spans
from distill_trainer.taps import decoder_layers, run_trunk

# Rows of the vocabulary at a time: 256 float32 rows of 152k tokens are 156 MB.
ANCHORS_PER_CHUNK = 256
ROUTER_KEYS = ("expert_load", "gate_load", "changed_fraction", "entropy", "top_k", "capacity", "gap")


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


def retention_sums(
    student_logits: Tensor,
    teacher_logits: Tensor,
    batch: dict[str, Tensor],
    teacher_log_probs: Callable[[Tensor], Tensor],
) -> Tensor:
    """Knowledge retention, summed over the anchors of a batch.

    Args:
        student_logits: `(batch_size, student_sequence_length, student_vocab_size)`.
        teacher_logits: `(batch_size, teacher_sequence_length, teacher_vocab_size)`.
        batch: A collated batch.
        teacher_log_probs: Maps teacher logits to log-probabilities over the student's vocabulary.

    Returns:
        `(4,)` float64: KL(teacher || student) in nats, top-1 agreement, top-5 overlap, number of anchors.
    """
    from distill_trainer.evaluation.metrics.knowledge_retention.knowledge_retention import retention_per_position

    mask = batch["anchor_mask"]
    student_index = anchor_index(batch, "student", mask, student_logits.device)
    teacher_index = anchor_index(batch, "teacher", mask, teacher_logits.device)
    student_chunks = student_logits[student_index].split(ANCHORS_PER_CHUNK)
    teacher_chunks = teacher_logits[teacher_index].split(ANCHORS_PER_CHUNK)
    sums = torch.zeros(4, dtype=torch.float64)
    for student_rows, teacher_rows in zip(student_chunks, teacher_chunks, strict=True):
        teacher_logprobs = teacher_log_probs(teacher_rows.float()).to(student_rows.device)
        values = retention_per_position(student_rows.float().log_softmax(dim=-1), teacher_logprobs)
        sums += torch.cat([values.sum(dim=0), values.new_tensor([len(values)])])
    return sums


def gap_closed(before: float | None, after: float | None, teacher: float | None) -> float | None:
    """Share of the distance from `before` to `teacher`, in bits per byte, that `after` has covered.

    None where a figure is missing or the teacher is not better than `before`, so there is no gap to close.
    """
    if before is None or after is None or teacher is None or before <= teacher:
        return None
    return (before - after) / (before - teacher)


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
        for batch in batches:
            try:
                student_spans = _last_layer_spans(student, batch, "student")
                teacher_spans = _last_layer_spans(teacher, batch, "teacher")
            except UnsupportedModelError:
                return None
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
    rows = attention_rows(taps.query, taps.key, positions, attention_mask.bool(), taps.scaling)
    return pool_spans(rows.mean(dim=1, keepdim=True), positions, batch["anchor_mask"].to(model.device))[:, 0].cpu()


def router_sums(routed: RoutedBatch) -> dict[str, Tensor]:
    """The router's choices, summed over the anchors of one batch.

    Args:
        routed: With a router's decision.

    Returns:
        float64: `expert_load` (routing weight) and `gate_load` (selections) `(num_experts,)`; scalars `changed`,
        `entropy` (nats), `capacity`, `gap` and `anchors`.
    """
    decision = routed.router
    # On the CPU, because not every accelerator has float64.
    logits, weights = decision.router_logits.cpu().double(), decision.routing_weights.cpu().double()
    selected, gate = decision.selected_experts.cpu(), routed.gate_experts.cpu()
    none = torch.zeros(logits.shape[-1], dtype=torch.float64)
    return {
        "expert_load": none.index_add(0, selected.flatten(), weights.flatten()),
        "gate_load": none.index_add(0, gate.flatten(), torch.ones(gate.numel(), dtype=torch.float64)),
        "changed": (selected[:, 0] != gate[:, 0]).double().sum(),
        "entropy": torch.special.entr(logits.softmax(dim=-1)).sum(),
        "capacity": decision.capacity.cpu().double().sum(),
        "gap": routed.gap.cpu().double().sum(),
        "anchors": torch.tensor(float(len(logits)), dtype=torch.float64),
    }


def router_figures(sums: dict[str, Tensor], top_k: int) -> dict[str, Any]:
    """The report's `router` part from sums over all anchors, see `router_sums`; all null without any sums.

    Returns:
        `expert_load` (share of the routing weight per expert), `gate_load` (share of the gate's selections),
        `changed_fraction` (anchors whose first expert is not the gate's first), mean `entropy` (nats), `capacity`
        and `gap` (nats), and `top_k`.
    """
    if not sums:
        return dict.fromkeys(ROUTER_KEYS)
    anchors = sums["anchors"].item()
    values = (
        (sums["expert_load"] / sums["expert_load"].sum()).tolist(),
        (sums["gate_load"] / sums["gate_load"].sum()).tolist(),
        sums["changed"].item() / anchors,
        sums["entropy"].item() / anchors,
        top_k,
        sums["capacity"].item() / anchors,
        sums["gap"].item() / anchors,
    )
    return dict(zip(ROUTER_KEYS, values, strict=True))
