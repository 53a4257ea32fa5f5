"""What one causal language model scores and costs: likelihood, speed, memory and size."""

import functools
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

SIDES = {
    "student": ("input_ids", "attention_mask", "student_positions"),
    "teacher": ("teacher_input_ids", "teacher_attention_mask", "teacher_positions"),
}


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put the models into evaluation mode without gradients, and back into their own modes afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        with torch.no_grad():
            for model in models:
                model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


def side_inputs(batch: dict[str, Tensor], side: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and anchor positions of one side ("student" or "teacher") of a collated batch."""
    input_ids, attention_mask, positions = (batch[key].to(device) for key in SIDES[side])
    return input_ids, attention_mask, positions


def forward_logits(model: PreTrainedModel, batch: dict[str, Tensor], side: str = "student") -> Tensor:
    """Logits of a model on its side of a batch, `(batch_size, sequence_length, vocab_size)`, in the model's dtype."""
    input_ids, attention_mask, _ = side_inputs(batch, side, model.device)
    positions = {}
    if not bool(attention_mask[:, 0].all()):
        # Left padding: count positions from the first real token, as at inference.
        positions["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions).logits


def scored_tokens(batch: dict[str, Tensor], side: str, device: torch.device) -> Tensor:
    """True at the real tokens after the row's first anchor up to and including its last one.

    They cover exactly the row's `scored_bytes`, whichever tokenizer cut them. A row with fewer than two anchors has
    none.

    Returns:
        Bool, `(batch_size, sequence_length)`.
    """
    input_ids, attention_mask, positions = side_inputs(batch, side, device)
    anchor_mask = batch["anchor_mask"].to(device)
    first = positions.masked_fill(~anchor_mask, input_ids.shape[1]).amin(dim=1, keepdim=True)
    last = positions.masked_fill(~anchor_mask, -1).amax(dim=1, keepdim=True)
    indices = torch.arange(input_ids.shape[1], device=device)
    return (indices > first) & (indices <= last) & attention_mask.bool()


def token_nats(logits: Tensor, batch: dict[str, Tensor], side: str = "student") -> Tensor:
    """Negative log-likelihood of every scored token of one batch under logits that are already at hand.

    Args:
        logits: `(batch_size, sequence_length, vocab_size)`; position t predicts token t + 1, the shift is made here.
        batch: A collated batch.
        side: "student" or "teacher": whose tokens are scored.

    Returns:
        `(batch_size, sequence_length)`, nats, float64 on the CPU, at the token's own position; 0 at other tokens.
    """
    labels = batch[SIDES[side][0]].to(logits.device)[:, 1:]
    counted = scored_tokens(batch, side, logits.device)[:, 1:]
    nats = torch.zeros(logits.shape[:2], dtype=torch.float64)
    # Row by row: the float32 copy then never holds more than one sequence.
    for row, (row_logits, row_labels, row_counted) in enumerate(zip(logits[:, :-1], labels, counted, strict=True)):
        losses = F.cross_entropy(row_logits[row_counted].float(), row_labels[row_counted], reduction="none")
        nats[row, 1:][row_counted.cpu()] = losses.cpu().double()
    return nats


def total_score(nats: Tensor, batch: dict[str, Tensor], side: str = "student") -> dict[str, float | int]:
    """`nll` in nats, `bytes` and `tokens` of one batch, summed, from its `token_nats`."""
    tokens = int(scored_tokens(batch, side, nats.device).sum())
    return {"nll": nats.sum().item(), "bytes": int(batch["scored_bytes"].sum()), "tokens": tokens}


def score_logits(logits: Tensor, batch: dict[str, Tensor], side: str = "student") -> dict[str, float | int]:
    """What `total_score` gives for the `token_nats` of these logits."""
    return total_score(token_nats(logits, batch, side), batch, side)


def active_parameters(model: PreTrainedModel) -> int:
    """Parameters that one token meets: all but the experts, and `top_k / num_experts` of each layer's experts.

    Experts are found by structure (the fused experts interface of transformers), so a dense model counts in full.
    """
    active = float(model.num_parameters())
    for block in model.modules():
        experts = getattr(block, "experts", None)
        if hasattr(experts, "_apply_gate"):
            router = getattr(block, "gate", getattr(block, "router", None))
            top_k = getattr(router, "top_k", None) or model.config.get_text_config().num_experts_per_tok
            size = sum(parameter.numel() for parameter in experts.parameters())
            active -= size * (1 - min(top_k / experts.num_experts, 1))
    return round(active)


def model_size(model: PreTrainedModel) -> dict[str, float | int]:
    """`parameters`, `active_parameters` and `size_mb` (10^6 bytes, in the dtype the weights have now).

    Tied weights count once, as in a saved checkpoint.
    """
    size_mb = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 1e6
    return {
        "parameters": model.num_parameters(),
        "active_parameters": active_parameters(model),
        "size_mb": size_mb,
    }


def floating_dtype(model: nn.Module) -> torch.dtype:
    """The narrowest dtype that holds every floating parameter exactly."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return functools.reduce(torch.promote_types, dtypes)


@contextmanager
def cast_up(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Hold the floating parameters in a wider `dtype` for a while; going back loses nothing.

    Buffers keep their dtype: the frequencies of a rotary embedding stay in float32 beside half-precision weights.
    """
    own = {parameter: parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    try:
        for parameter in own:
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, own_dtype in own.items():
            parameter.data = parameter.data.to(own_dtype)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_speed(
    model: PreTrainedModel,
    batch: dict[str, Tensor],
    side: str = "student",
    *,
    dtype: torch.dtype | None = None,
    repeats: int = 5,
    warmup: int = 2,
) -> dict[str, float | str | None]:
    """Throughput of the forward pass on one batch: the median of `repeats` passes behind `warmup` untimed ones.

    Args:
        model: Any causal language model.
        batch: A collated batch.
        side: "student" or "teacher": whose token ids the model reads.
        dtype: Dtype for the pass, at least as wide as the model's own, so that models compare. None keeps the own.
            A quantised model always keeps its own.
        repeats: Timed passes.
        warmup: Untimed passes before them.

    Returns:
        `tokens_per_second` (the batch's scored tokens), `bytes_per_second` (its scored bytes), and `peak_memory_mb`,
        see `peak_memory`. Sequence ends outside the scored span cost time and count for nothing, for every model
        alike.
    """
    if dtype is None or getattr(model, "is_quantized", False):
        dtype = floating_dtype(model)
    device, seconds = model.device, []
    tokens = int(scored_tokens(batch, side, device).sum())
    with evaluating(model), cast_up(model, dtype):
        before = _reset_peak_memory(device)
        for _ in range(warmup + repeats):
            _synchronize(device)
            start = time.perf_counter()
            forward_logits(model, batch, side)
            _synchronize(device)
            seconds.append(time.perf_counter() - start)
        memory = peak_memory(model, before)
    median = statistics.median(seconds[warmup:])
    return {
        "tokens_per_second": tokens / median,
        "bytes_per_second": int(batch["scored_bytes"].sum()) / median,
        "peak_memory_mb": memory,
    }


def _reset_peak_memory(device: torch.device) -> int:
    """Bytes that the CUDA allocator holds now, after its peak was reset; 0 on other devices."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def memory_kind(device: torch.device) -> str:
    """What `peak_memory_mb` means on a device."""
    return "CUDA allocator, this model alone" if device.type == "cuda" else "resident set of the whole process"


def peak_memory(model: PreTrainedModel, allocated_before: int = 0) -> float | None:
    """Memory in 10^6 bytes: on CUDA the weights plus the pass's peak above `allocated_before`, else the process's RSS.

    On a CPU the figure covers everything in the process, other models and the data included, so it is an upper bound
    and does not compare models.
    """
    if model.device.type == "cuda":
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        return (torch.cuda.max_memory_allocated(model.device) - allocated_before + weights) / 1e6
    import psutil  # comes with accelerate, needed here only

    return psutil.Process().memory_info().rss / 1e6
