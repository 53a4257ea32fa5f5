"""Where two models agree: beliefs and attention of student and teacher at anchors, and the router's choices."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill_trainer.evaluation.measure import evaluating, side_inputs
from distill_trainer.losses.attention import pool_spans

# Rows of the vocabulary at a time: 256 float32 rows of 152k tokens are 156 MB.
ANCHORS_PER_CHUNK = 256


def at_anchors(values: Tensor, batch: dict[str, Tensor], side: str) -> Tensor:
    """Rows of `values` `(batch_size, sequence_length, ...)` at the anchors, in the order of `anchor_mask.nonzero()`."""
    positions = side_inputs(batch, side, values.device)[2]
    anchor_mask = batch["anchor_mask"].to(values.device)
    return values[anchor_mask.nonzero()[:, 0], positions[anchor_mask]]


def replace_at_anchors(values: Tensor, rows: Tensor, batch: dict[str, Tensor], side: str) -> Tensor:
    """`values` with `rows` `(num_anchors, ...)` at the anchors, in the order of `at_anchors`, changed in place."""
    positions = side_inputs(batch, side, values.device)[2]
    anchor_mask = batch["anchor_mask"].to(values.device)
    index = anchor_mask.nonzero()[:, 0], positions[anchor_mask]
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

    student_rows = at_anchors(student_logits, batch, "student").split(ANCHORS_PER_CHUNK)
    teacher_rows = at_anchors(teacher_logits, batch, "teacher").split(ANCHORS_PER_CHUNK)
    sums = torch.zeros(4, dtype=torch.float64)
    for student_chunk, teacher_chunk in zip(student_rows, teacher_rows):
        teacher_chunk = teacher_log_probs(teacher_chunk.float()).to(student_chunk.device)
        values = retention_per_position(student_chunk.float().log_softmax(dim=-1), teacher_chunk)
        sums += torch.cat([values.sum(dim=0), values.new_tensor([len(values)])]).cpu()
    return sums


def gap_closed(before: float | None, after: float | None, teacher: float | None) -> float | None:
    """Share of the distance from `before` to `teacher`, in bits per byte, that `after` has covered.

    None where a figure is missing or the teacher is not better than `before`, so there is no gap to close.
    """
    if before is None or after is None or teacher is None or before <= teacher:
        return None
    return (before - after) / (before - teacher)


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Only the eager implementation returns attention maps."""
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def _last_layer_spans(model: PreTrainedModel, row: dict[str, Tensor], side: str) -> Tensor | None:
    """Mean attention over heads of the last attention layer at the anchors, pooled over the spans between them.

    Returns:
        `(num_anchors, num_anchors)`, or None if the model gives no attention maps.
    """
    input_ids, attention_mask, positions = side_inputs(row, side, model.device)
    outputs = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, output_attentions=True)
    maps = [layer for layer in outputs.attentions or () if layer is not None and layer.ndim == 4]
    if not maps:
        return None
    index = positions[:, None, :, None].expand(-1, 1, -1, maps[-1].shape[-1])
    rows = maps[-1].float().mean(dim=1, keepdim=True).gather(2, index)
    return pool_spans(rows, positions, row["anchor_mask"].to(model.device))[0, 0].cpu()


def attention_similarity(
    student: PreTrainedModel, teacher: PreTrainedModel, batches: Iterable[dict[str, Tensor]], max_rows: int = 8
) -> float | None:
    """One minus the Jensen-Shannon divergence (bits) of both models' last attention layers, averaged over anchors.

    Attention is averaged over heads and pooled over the spans of text between anchors, which both models share. The first
    anchor of a row has one span only and is left out. Both models keep their attention implementation.

    Args:
        student: Any causal language model.
        teacher: Likewise.
        batches: Collated batches.
        max_rows: Windows to look at. One at a time: eager maps of all layers are large.

    Returns:
        Similarity from 0 to 1, or None if a model gives no attention maps.
    """
    from distill_trainer.evaluation.metrics.attention_similarity.attention_similarity import similarity_per_row

    rows = ({key: value[i : i + 1] for key, value in batch.items()} for batch in batches for i in _full_rows(batch))
    values = []
    with evaluating(student, teacher), ExitStack() as stack:
        stack.enter_context(_eager_attention(student))
        stack.enter_context(_eager_attention(teacher))
        for _, row in zip(range(max_rows), rows):
            spans = [_last_layer_spans(model, row, side) for model, side in ((student, "student"), (teacher, "teacher"))]
            if spans[0] is None or spans[1] is None:
                return None
            counted = row["anchor_mask"][0].cpu().nonzero()[1:, 0]
            values.append(similarity_per_row(spans[0][counted], spans[1][counted]))
    return torch.cat(values).mean().item() if values else None


def _full_rows(batch: dict[str, Tensor]) -> list[int]:
    """Rows with at least two anchors."""
    return (batch["anchor_mask"].sum(dim=1) > 1).nonzero()[:, 0].tolist()


def router_sums(routed) -> dict[str, Tensor]:
    """The router's choices, summed over the anchors of one batch.

    Args:
        routed: `selected_experts` and `routing_weights` `(num_anchors, top_k)`, the gate's own `gate_experts`
            `(num_anchors, gate_top_k)`, `router_logits` `(num_anchors, num_experts)`, `capacity` and `gap`
            `(num_anchors,)`. Experts stand with the likeliest first.

    Returns:
        float64: `expert_load` (routing weight) and `gate_load` (selections) `(num_experts,)`; scalars `changed`,
        `entropy` (nats), `capacity`, `gap` and `anchors`.
    """
    logits = routed.router_logits.double()
    num_experts = logits.shape[-1]
    logprobs = logits.log_softmax(dim=-1)
    gate_ones = torch.ones_like(routed.gate_experts, dtype=torch.float64)
    sums = {
        "expert_load": _per_expert(routed.selected_experts, routed.routing_weights, num_experts),
        "gate_load": _per_expert(routed.gate_experts, gate_ones, num_experts),
        "changed": (routed.selected_experts[:, 0] != routed.gate_experts[:, 0]).double().sum(),
        "entropy": -torch.xlogy(logprobs.exp(), logprobs.exp()).sum(),
        "capacity": routed.capacity.double().sum(),
        "gap": routed.gap.double().sum(),
        "anchors": torch.tensor(float(len(logits)), dtype=torch.float64),
    }
    return {key: value.detach().cpu() for key, value in sums.items()}


def _per_expert(experts: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    totals = torch.zeros(num_experts, dtype=torch.float64, device=experts.device)
    return totals.index_add(0, experts.flatten(), weights.double().flatten())


def router_figures(sums: dict[str, Tensor], top_k: int) -> dict[str, float | int | list[float]]:
    """The report's `router` part from sums over all anchors, see `router_sums`.

    Returns:
        `expert_load` (share of the routing weight per expert), `gate_load` (share of the gate's selections),
        `changed_fraction` (anchors whose first expert is not the gate's first), mean `entropy` (nats), `capacity`
        and `gap` (nats), and `top_k`.
    """
    anchors = sums["anchors"].item()
    return {
        "expert_load": (sums["expert_load"] / sums["expert_load"].sum()).tolist(),
        "gate_load": (sums["gate_load"] / sums["gate_load"].sum()).tolist(),
        "changed_fraction": sums["changed"].item() / anchors,
        "entropy": sums["entropy"].item() / anchors,
        "top_k": top_k,
        "capacity": sums["capacity"].item() / anchors,
        "gap": sums["gap"].item() / anchors,
    }
