"""Figures of the report out of what the passes over the held-out text summed up."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from distill_trainer.evaluation.agreement import gap_deciles


def bits_of(scores: dict[str, Any]) -> float:
    """Bits per byte of summed `nll` (nats) and `bytes`."""
    from distill_trainer.evaluation.metrics.bits_per_byte.bits_per_byte import bits_per_byte

    return bits_per_byte(scores["nll"], scores["bytes"])


def likelihoods_of(scores: dict[str, float], words_per_byte: float) -> dict[str, float | None]:
    """Bits per byte, and perplexity per word and per token, of what `total_score` summed over all batches."""
    from distill_trainer.evaluation.metrics.perplexity.perplexity import perplexity

    words = words_per_byte * scores["bytes"]
    return {
        "bits_per_byte": bits_of(scores),
        # A text without any white space has one word; a text of nothing but blanks has none.
        "word_perplexity": perplexity(scores["nll"], words) if words else None,
        "token_perplexity": perplexity(scores["nll"], scores["tokens"]),
    }


def compression_of(
    figures: dict[str, dict | None], student: PreTrainedModel, teacher: PreTrainedModel
) -> dict[str, float | None]:
    """The student's figures against the teacher's; speeds only where both ran on hardware of one kind."""
    from distill_trainer.evaluation.metrics.compression.compression import compression

    ratios = compression(figures["student"], figures["teacher"])
    quantized = any(getattr(model, "is_quantized", False) for model in (student, teacher))
    if student.device.type != teacher.device.type or quantized:
        # Other hardware or another arithmetic: the ratios would say nothing about the models.
        ratios |= {"speedup": None, "generation_speedup": None}
    return ratios


def retention_of(values: Tensor, figures: dict[str, dict | None]) -> dict[str, float | None]:
    """Means of `retention_values` over all anchors, and how much of the gap to the teacher was closed."""
    from distill_trainer.evaluation.metrics.knowledge_retention.knowledge_retention import gap_closed

    divergence, agreement, overlap = values.mean(dim=0).tolist()
    bits = {role: (model or {}).get("bits_per_byte") for role, model in figures.items()}
    return {
        "kl_divergence": divergence,
        "top1_agreement": agreement,
        "top5_overlap": overlap,
        "gap_closed": gap_closed(bits["student_before"], bits["student"], bits["teacher"]),
        "gap_closed_baseline": gap_closed(bits["student_before"], bits["baseline"], bits["teacher"]),
    }


def deciles_of(retention: dict[str, Tensor]) -> list[dict[str, float | int | None]] | None:
    """See `gap_deciles`; from `retention_values` by role."""
    gaps = {role: values[:, 0] for role, values in retention.items()}
    return gap_deciles(gaps.get("student_before"), gaps["student"], gaps.get("baseline"))
