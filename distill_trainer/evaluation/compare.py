"""`evaluate_models`: every figure of the report, with all models scored on the same bytes of held-out text."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill_trainer.aligned import RoutedBatch
from distill_trainer.alignment import VocabularyProjection
from distill_trainer.data import DistillationCollator, prepare_dataset
from distill_trainer.errors import DataError
from distill_trainer.evaluation.agreement import (
    attention_similarity,
    gap_closed,
    gap_deciles,
    replace_at_anchors,
    retention_values,
)
from distill_trainer.evaluation.breakdown import retention_breakdown
from distill_trainer.evaluation.environment import describe_environment
from distill_trainer.evaluation.measure import (
    evaluating,
    floating_dtype,
    forward_logits,
    measure_speed,
    model_size,
    token_nats,
    total_score,
)
from distill_trainer.evaluation.passages import best_and_worst
from distill_trainer.evaluation.routing import RoutingRecord, true_token_answers
from distill_trainer.evaluation.samples import choose_prompts, write_on
from distill_trainer.loading import load_causal_lm

NAME = (str, Path)
# Attention differs little from window to window: so many batches, spread evenly, tell enough.
ATTENTION_BATCHES = 8
MODEL_KEYS = (
    *("name", "parameters", "active_parameters", "size_mb", "bits_per_byte", "word_perplexity", "token_perplexity"),
    *("tokens_per_second", "bytes_per_second", "peak_memory_mb"),
)


def evaluate_models(
    *,
    student: PreTrainedModel | str | Path,
    teacher: PreTrainedModel | str | Path,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int = 512,
    batch_size: int = 4,
    student_before: PreTrainedModel | str | Path | None = None,
    baseline: PreTrainedModel | str | Path | None = None,
    route: Callable[[dict[str, Tensor]], RoutedBatch] | None = None,
    statistics: dict[str, Any] | None = None,
    names: dict[str, str] | None = None,
    seconds: float = 0.0,
    command: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Report on a student and its teacher: likelihood per byte, cost, agreement and routing.

    A window's score covers the bytes between its first and its last anchor, for every model. All speeds are measured
    in the widest dtype among the models.

    Args:
        student: The distilled student, or its name or path. A model that is given by name is loaded to the device of
            one that is not, else to the GPU if there is one, in the dtype it is stored in.
        teacher: Its teacher. It stays on its device.
        student_tokenizer: Also the tokenizer of `student_before` and `baseline`.
        teacher_tokenizer: Tokenizer of the teacher.
        texts: Held-out documents.
        max_length: Longest window, in student tokens.
        batch_size: Windows per batch.
        student_before: The student as it was before training. None leaves its figures null. This and `baseline` are
            measured on the student's device, which holds all students at once for that; by name they are loaded in
            its dtype.
        baseline: The student fine-tuned on the same batches without a teacher. None leaves its figures null.
        route: Maps a batch to the student-aware teacher at its anchors, as `DistillationTrainer.route` does. None, or
            a result without a router's decision, leaves these figures null.
        statistics: What is known about the training data, merged into the report's `data`.
        names: Names by role (`teacher`, `student`, ...); others are read from the models.
        seconds: Time the run took before this evaluation, which is added.
        command: Arguments of the command that ran. None takes `sys.argv`. Secrets are left out.

    Returns:
        The report; its keys are always present and null where there is nothing to tell. `word_perplexity` counts
        words separated by white space, scaled by the share of the texts' bytes that was scored.

    Raises:
        DataError: If no window of the texts can be scored.
    """
    start = time.perf_counter()
    devices = [model.device for model in (student, teacher) if not isinstance(model, NAME)]
    device = devices[0] if devices else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student, teacher = _loaded(student, device), _loaded(teacher, device)
    batches, data = _collate(texts, student_tokenizer, teacher_tokenizer, max_length, batch_size)
    others = {"student_before": student_before, "baseline": baseline}
    students = {
        role: _loaded(m, student.device, floating_dtype(student)) for role, m in others.items() if m is not None
    }
    students["student"] = student
    joint = _joint_pass(students, teacher, student_tokenizer, teacher_tokenizer, batches, route)
    words_per_byte = sum(len(text.split()) for text in texts) / data["eval_bytes"]
    dtype = torch.promote_types(floating_dtype(student), floating_dtype(teacher))
    figures: dict[str, dict | None] = {"student_before": dict.fromkeys(MODEL_KEYS), "baseline": None}
    samples = choose_prompts(texts)
    for role, model in {"teacher": teacher, **students}.items():
        side = "teacher" if role == "teacher" else "student"
        with _on(model, teacher.device if role == "teacher" else student.device):
            speed = measure_speed(model, max(batches, key=_scored_bytes), side, dtype=dtype)
            written = write_on(model, teacher_tokenizer if role == "teacher" else student_tokenizer, samples)
        samples = [sample | {role: text} for sample, text in zip(samples, written, strict=True)]
        name = (names or {}).get(role) or getattr(model.config, "_name_or_path", "") or type(model).__name__
        likelihoods = _likelihoods(joint["scores"][role], words_per_byte)
        figures[role] = {"name": name, **model_size(model), **likelihoods, **speed}
    environment = describe_environment(student, teacher, dtype, command)
    similarity = attention_similarity(student, teacher, batches[:: -(-len(batches) // ATTENTION_BATCHES)])
    environment["evaluation_seconds"] = time.perf_counter() - start
    environment["seconds"] = seconds + environment["evaluation_seconds"]
    return {
        "schema": 1,
        **{role: figures[role] for role in ("teacher", "student_before", "student", "baseline")},
        "student_aware_teacher": joint["student_aware_teacher"],
        "compression": _compression(figures, student, teacher),
        "retention": _retention(joint["retention"]["student"], figures)
        | retention_breakdown(joint["retention"], batches),
        "attention": {"similarity": similarity},
        "router": joint["router"],
        "gap": {"deciles": _gap_deciles(joint["retention"])},
        "passages": best_and_worst(joint["token_nats"], batches, student_tokenizer),
        "samples": samples,
        "data": data | {key: value for key, value in (statistics or {}).items() if value is not None},
        "environment": environment,
    }


def _loaded(
    model: PreTrainedModel | str | Path, device: torch.device, dtype: torch.dtype | str = "auto"
) -> PreTrainedModel:
    return load_causal_lm(str(model), dtype=dtype).to(device) if isinstance(model, NAME) else model


@contextmanager
def _on(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Hold a model on a device for a while: a copy that waits in main memory is measured where the others are."""
    own = model.device
    if own != device:
        model.to(device)
    try:
        yield
    finally:
        if own != device:
            model.to(own)


def _scored_bytes(batch: dict[str, Tensor]) -> int:
    return int(batch["scored_bytes"].sum())


def _joint_pass(
    students: dict[str, PreTrainedModel],
    teacher: PreTrainedModel,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    batches: list[dict[str, Tensor]],
    route: Callable[[dict[str, Tensor]], RoutedBatch] | None,
) -> dict[str, Any]:
    """All that needs the logits of several models side by side, in one pass over the batches.

    Only `students["student"]` is looked at together with the router.
    """
    device, projection = students["student"].device, None
    retention: dict[str, list[Tensor]] = {role: [] for role in students}
    routing = RoutingRecord(teacher_tokenizer, batches)
    scores = {role: {"nll": 0.0, "bytes": 0, "tokens": 0} for role in (*students, "teacher", "aware")}
    by_token: dict[str, list[Tensor]] = {role: [] for role in scores}

    def add(role: str, logits: Tensor, batch: dict[str, Tensor], side: str) -> None:
        by_token[role].append(token_nats(logits, batch, side))
        for key, value in total_score(by_token[role][-1], batch, side).items():
            scores[role][key] += value

    with ExitStack() as stack:
        for model in students.values():
            stack.enter_context(_on(model, device))
        stack.enter_context(evaluating(*students.values(), teacher))
        for batch in batches:
            batch = {key: value.to(device) for key, value in batch.items()}
            teacher_logits = forward_logits(teacher, batch, "teacher")
            add("teacher", teacher_logits, batch, "teacher")
            for role, model in students.items():
                logits = forward_logits(model, batch, "student")
                add(role, logits, batch, "student")
                if projection is None:
                    sizes = teacher_logits.shape[-1], logits.shape[-1]
                    projection = VocabularyProjection.from_tokenizers(teacher_tokenizer, student_tokenizer, *sizes)
                    projection = projection.to(teacher_logits.device)
                retention[role].append(retention_values(logits, teacher_logits, batch, projection.log_probs))
                if role == "student":
                    answers = true_token_answers(logits, batch)
                del logits
            routed = route(batch) if route else None
            if routed is None or routed.router is None:
                continue
            # The router speaks at anchors only; everywhere else the teacher keeps its own belief.
            replace_at_anchors(teacher_logits, routed.logits, batch, routed.mask)
            add("aware", teacher_logits, batch, "teacher")
            routing.add(routed, answers, batch)
    aware = scores.pop("aware")
    return {
        "scores": scores,
        "token_nats": {role: by_token[role] for role in scores},
        "retention": {role: torch.cat(values) for role, values in retention.items()},
        "student_aware_teacher": {"bits_per_byte": _bits_per_byte(aware) if aware["bytes"] else None},
        "router": routing.figures(),
    }


def _collate(
    texts: Sequence[str],
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    batch_size: int,
) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """The texts as collated batches, and what the report's `data` says of them."""
    if not any(texts):
        raise DataError("texts must hold at least one document with text, got none. Raise validation_fraction.")
    documents = Dataset.from_dict({"text": list(texts)})
    windows, counted = prepare_dataset(documents, student_tokenizer, teacher_tokenizer, max_length=max_length)
    rows = list(windows)
    collator = DistillationCollator(student_tokenizer, teacher_tokenizer)
    batches = [collator(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    return batches, {
        "train_documents": None,
        "train_bytes": None,
        "eval_documents": counted["documents"],
        "eval_bytes": counted["bytes"],
        "scored_bytes": sum(map(_scored_bytes, batches)),
        "dropped": counted["dropped"],
        "anchor_fraction": counted["anchor_fraction"],
    }


def _bits_per_byte(scores: dict[str, Any]) -> float:
    from distill_trainer.evaluation.metrics.bits_per_byte.bits_per_byte import bits_per_byte

    return bits_per_byte(scores["nll"], scores["bytes"])


def _likelihoods(scores: dict[str, float], words_per_byte: float) -> dict[str, float | None]:
    from distill_trainer.evaluation.metrics.perplexity.perplexity import perplexity

    words = words_per_byte * scores["bytes"]
    return {
        "bits_per_byte": _bits_per_byte(scores),
        # A text without any white space has one word; a text of nothing but blanks has none.
        "word_perplexity": perplexity(scores["nll"], words) if words else None,
        "token_perplexity": perplexity(scores["nll"], scores["tokens"]),
    }


def _compression(
    figures: dict[str, dict | None], student: PreTrainedModel, teacher: PreTrainedModel
) -> dict[str, float | None]:
    from distill_trainer.evaluation.metrics.compression.compression import compression

    ratios = compression(figures["student"], figures["teacher"])
    quantized = any(getattr(model, "is_quantized", False) for model in (student, teacher))
    if student.device.type != teacher.device.type or quantized:
        # Other hardware or another arithmetic: the ratio would say nothing about the models.
        ratios["speedup"] = None
    return ratios


def _retention(values: Tensor, figures: dict[str, dict | None]) -> dict[str, float | None]:
    divergence, agreement, overlap = values.mean(dim=0).tolist()
    bits = {role: (model or {}).get("bits_per_byte") for role, model in figures.items()}
    return {
        "kl_divergence": divergence,
        "top1_agreement": agreement,
        "top5_overlap": overlap,
        "gap_closed": gap_closed(bits["student_before"], bits["student"], bits["teacher"]),
        "gap_closed_baseline": gap_closed(bits["student_before"], bits["baseline"], bits["teacher"]),
    }


def _gap_deciles(retention: dict[str, Tensor]) -> list[dict[str, float | int | None]] | None:
    gaps = {role: values[:, 0] for role, values in retention.items()}
    return gap_deciles(gaps.get("student_before"), gaps["student"], gaps.get("baseline"))
