"""`evaluate_models`: every figure of the report, with all models scored on the same bytes of held-out text."""

import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill_trainer.alignment import VocabularyProjection
from distill_trainer.errors import DataError
from distill_trainer.evaluation.agreement import (
    attention_similarity,
    gap_closed,
    replace_at_anchors,
    retention_sums,
    router_figures,
    router_sums,
)
from distill_trainer.evaluation.measure import (
    evaluating,
    floating_dtype,
    forward_logits,
    measure_speed,
    memory_kind,
    model_size,
    score_logits,
    score_tokens,
)
from distill_trainer.loading import load_causal_lm

VERSIONS = ("distill_trainer", "torch", "transformers", "datasets", "accelerate", "tokenizers")
NAME = (str, Path)
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
    route: Callable[[dict[str, Tensor]], Any] | None = None,
    statistics: dict[str, Any] | None = None,
    names: dict[str, str] | None = None,
    seconds: float | None = None,
    command: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Report on a student and its teacher: likelihood per byte, cost, agreement and routing.

    A window's score covers the bytes between its first and its last anchor, for every model. All speeds are measured
    in the widest dtype among the models.

    Args:
        student: The distilled student, or its name or path.
        teacher: Its teacher. Models given as objects stay on their device and in their dtype; named ones are loaded
            in the dtype they are stored in, except that `student_before` and `baseline` take the student's.
        student_tokenizer: Also the tokenizer of `student_before` and `baseline`.
        teacher_tokenizer: Tokenizer of the teacher.
        texts: Held-out documents.
        max_length: Longest window, in student tokens.
        batch_size: Windows per batch.
        student_before: The student as it was before training. None leaves its figures null.
        baseline: The student fine-tuned on the same batches without a teacher. None leaves its figures null.
        route: Maps a batch (on the student's device) to the router's choices at its N anchors, in the order of
            `anchor_mask.nonzero()`: `logits` `(N, teacher_vocab_size)` of the student-aware teacher, and what
            `agreement.router_sums` reads. None: no router.
        statistics: What is known about the training data, merged into the report's `data`.
        names: Names by role (`teacher`, `student`, ...); others are read from the models.
        seconds: Time the run took so far. None reports the time of this evaluation.
        command: Arguments of the command that ran. None takes `sys.argv`. Secrets are left out.

    Returns:
        The report; its keys are always present and null where there is nothing to tell. `word_perplexity` counts
        words separated by white space, scaled by the share of the texts' bytes that was scored.

    Raises:
        DataError: If no window of the texts can be scored.
    """
    start = time.perf_counter()
    if isinstance(student, NAME):
        student = load_causal_lm(str(student), dtype="auto")
    if isinstance(teacher, NAME):
        teacher = load_causal_lm(str(teacher), dtype="auto").to(student.device)
    batches, data = _collate(texts, student_tokenizer, teacher_tokenizer, max_length, batch_size)
    joint = _joint_pass(student, teacher, student_tokenizer, teacher_tokenizer, batches, route)
    words_per_byte = sum(len(text.split()) for text in texts) / data["eval_bytes"]
    dtype = torch.promote_types(floating_dtype(student), floating_dtype(teacher))
    figures: dict[str, dict | None] = {"student_before": dict.fromkeys(MODEL_KEYS), "baseline": None}
    models = {"teacher": teacher, "student_before": student_before, "student": student, "baseline": baseline}
    for role, model in models.items():
        if model is None:
            continue
        if isinstance(model, NAME):
            model = load_causal_lm(str(model), dtype=floating_dtype(student)).to(student.device)
        side = "teacher" if role == "teacher" else "student"
        scores = joint["scores"].get(role) or score_tokens(model, batches, side)
        name = (names or {}).get(role) or getattr(model.config, "_name_or_path", "") or type(model).__name__
        speed = measure_speed(model, max(batches, key=_scored_bytes), side, dtype=dtype)
        figures[role] = {"name": name, **model_size(model), **_likelihoods(scores, words_per_byte), **speed}
    environment = _environment(student, teacher, dtype, command)
    similarity = attention_similarity(student, teacher, batches)
    evaluation_seconds = time.perf_counter() - start
    environment["seconds"] = evaluation_seconds if seconds is None else seconds
    environment["evaluation_seconds"] = evaluation_seconds
    return {
        "schema": 1,
        **{role: figures[role] for role in models},
        "student_aware_teacher": joint["student_aware_teacher"],
        "compression": _compression(figures, student, teacher),
        "retention": _retention(joint["retention"], figures),
        "attention": {"similarity": similarity},
        "router": joint["router"],
        "data": data | (statistics or {}),
        "environment": environment,
    }


def _scored_bytes(batch: dict[str, Tensor]) -> int:
    return int(batch["scored_bytes"].sum())


def _joint_pass(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    batches: list[dict[str, Tensor]],
    route: Callable[[dict[str, Tensor]], Any] | None,
) -> dict[str, Any]:
    """All that needs both models' logits side by side, in one pass over the batches."""
    projection, retention, routing, top_k = None, torch.zeros(4, dtype=torch.float64), {}, 0
    scores = {role: {"nll": 0.0, "bytes": 0, "tokens": 0} for role in ("student", "teacher", "aware")}

    def add(role: str, logits: Tensor, batch: dict[str, Tensor], side: str) -> None:
        for key, value in score_logits(logits, batch, side).items():
            scores[role][key] += value

    with evaluating(student, teacher):
        for batch in batches:
            batch = {key: value.to(student.device) for key, value in batch.items()}
            student_logits = forward_logits(student, batch, "student")
            teacher_logits = forward_logits(teacher, batch, "teacher")
            add("student", student_logits, batch, "student")
            add("teacher", teacher_logits, batch, "teacher")
            if projection is None:
                sizes = teacher_logits.shape[-1], student_logits.shape[-1]
                projection = VocabularyProjection.from_tokenizers(teacher_tokenizer, student_tokenizer, *sizes)
                projection = projection.to(teacher_logits.device)
            retention += retention_sums(student_logits, teacher_logits, batch, projection.log_probs)
            if route is None:
                continue
            routed = route(batch)
            # The router speaks at anchors only; everywhere else the teacher keeps its own belief.
            teacher_logits = replace_at_anchors(teacher_logits, routed.logits, batch, "teacher")
            add("aware", teacher_logits, batch, "teacher")
            sums, top_k = router_sums(routed), routed.selected_experts.shape[1]
            routing = {key: routing.get(key, 0) + value for key, value in sums.items()}
    aware = scores.pop("aware")
    return {
        "scores": scores,
        "retention": retention,
        "student_aware_teacher": {"bits_per_byte": _bits_per_byte(aware)} if route else None,
        "router": router_figures(routing, top_k) if route else None,
    }


def _collate(
    texts: Sequence[str],
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    batch_size: int,
) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """The texts as collated batches, and what the report's `data` says of them."""
    raise NotImplementedError


def _bits_per_byte(scores: dict[str, float]) -> float:
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


def _retention(sums: Tensor, figures: dict[str, dict | None]) -> dict[str, float | None]:
    divergence, agreement, overlap, anchors = sums.tolist()
    bits = {role: (model or {}).get("bits_per_byte") for role, model in figures.items()}
    return {
        "kl_divergence": divergence / anchors,
        "top1_agreement": agreement / anchors,
        "top5_overlap": overlap / anchors,
        "gap_closed": gap_closed(bits["student_before"], bits["student"], bits["teacher"]),
        "gap_closed_baseline": gap_closed(bits["student_before"], bits["baseline"], bits["teacher"]),
    }


def _environment(
    student: PreTrainedModel, teacher: PreTrainedModel, speed_dtype: torch.dtype, command: Sequence[str] | None
) -> dict[str, Any]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in VERSIONS:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    cuda = student.device.type == "cuda"
    return {
        "versions": versions,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(student.device) if cuda else str(student.device),
        "threads": torch.get_num_threads(),
        "dtype": str(floating_dtype(student)).removeprefix("torch."),
        "teacher_dtype": str(floating_dtype(teacher)).removeprefix("torch."),
        "speed_dtype": str(speed_dtype).removeprefix("torch."),
        "peak_memory": memory_kind(student.device),
        "command": _shown_command(sys.argv if command is None else command),
    }


def _shown_command(arguments: Sequence[str]) -> str:
    """The command as one line, without the values of flags that hold a secret: reports get published."""
    line = shlex.join(arguments)
    return re.sub(r"(--[\w-]*(?:token|api_key|api-key|secret|password)(?:=|\s+))('[^']*'|\S+)", r"\1<hidden>", line)
