"""`evaluate_models`: every figure of the report, with all models scored on the same bytes of held-out text."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill_trainer.aligned import RoutedBatch
from distill_trainer.alignment import VocabularyProjection
from distill_trainer.evaluation.agreement import (
    attention_similarity,
    replace_at_anchors,
    retention_values,
)
from distill_trainer.evaluation.benchmarks import Benchmarks
from distill_trainer.evaluation.breakdown import retention_breakdown
from distill_trainer.evaluation.environment import describe_environment
from distill_trainer.evaluation.figures import bits_of, compression_of, deciles_of, likelihoods_of, retention_of
from distill_trainer.evaluation.measure import (
    evaluating,
    floating_dtype,
    forward_logits,
    model_folder,
    model_size,
    token_nats,
    total_score,
)
from distill_trainer.evaluation.passages import best_and_worst
from distill_trainer.evaluation.routing import RoutingRecord, true_token_answers
from distill_trainer.evaluation.samples import choose_prompts, write_on
from distill_trainer.evaluation.speed import measure_speed, prompt_ids
from distill_trainer.evaluation.windows import checked_stride, evaluation_batches
from distill_trainer.loading import check_positions, learned_positions, load_causal_lm
from distill_trainer.validation import check_number

NAME = (str, Path)
# Attention differs little from window to window: so many batches, spread evenly, tell enough.
ATTENTION_BATCHES = 8
MODEL_KEYS = (
    *("name", "parameters", "active_parameters", "size_mb", "disk_mb"),
    *("bits_per_byte", "word_perplexity", "token_perplexity"),
    *("tokens_per_second", "bytes_per_second", "generated_tokens_per_second", "generated_bytes_per_second"),
    "peak_memory_mb",
)


def evaluate_models(
    *,
    student: PreTrainedModel | str | Path,
    teacher: PreTrainedModel | str | Path,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int = 512,
    stride: int | None = None,
    batch_size: int = 4,
    student_before: PreTrainedModel | str | Path | None = None,
    baseline: PreTrainedModel | str | Path | None = None,
    route: Callable[[dict[str, Tensor]], RoutedBatch] | None = None,
    benchmarks: Benchmarks | None = None,
    statistics: dict[str, Any] | None = None,
    names: dict[str, str] | None = None,
    seconds: float = 0.0,
    command: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Report on a student and its teacher: likelihood per byte, cost, agreement and routing.

    Every byte of the texts that a window can hold is scored once, in overlapping windows, see `evaluation_batches`;
    the same bytes for every model. All speeds are measured in the widest dtype among the models.

    Args:
        student: The distilled student, or its name or path. A model that is given by name is loaded to the device of
            one that is not, else to the GPU if there is one, in the dtype it is stored in.
        teacher: Its teacher. It stays on its device.
        student_tokenizer: Also the tokenizer of `student_before` and `baseline`.
        teacher_tokenizer: Tokenizer of the teacher.
        texts: Held-out documents.
        max_length: Longest window, in student tokens.
        stride: Student tokens that a window scores, from 1 to `max_length`; the rest of it is context. None is half of
            `max_length`. `max_length` leaves next to no context.
        batch_size: Windows per batch.
        student_before: The student as it was before training. None leaves its figures null. This and `baseline` are
            measured on the student's device, which holds all students at once for that; by name they are loaded in
            its dtype.
        baseline: The student fine-tuned on the same batches without a teacher. None leaves its figures null.
        route: Maps a batch to the student-aware teacher at its anchors, as `DistillationTrainer.route` does. None, or
            a result without a router's decision, leaves these figures null.
        benchmarks: Tasks of EleutherAI's harness, on which every student is measured. None leaves them null.
        statistics: What is known about the training data, merged into the report's `data`.
        names: Names by role (`teacher`, `student`, ...); others are read from the models.
        seconds: Time the run took before this evaluation, which is added.
        command: Arguments of the command that ran. None takes `sys.argv`. Secrets are left out.

    Returns:
        The report; its keys are always present and null where there is nothing to tell. `word_perplexity` counts
        words separated by white space, scaled by the share of the texts' bytes that was scored.

    Raises:
        ConfigurationError: If `max_length`, `stride` or `batch_size` cannot work, or not with a model's positions.
        DataError: If the texts are no list of strings, or no window of them can be scored.
    """
    start = time.perf_counter()
    check_number("max_length", max_length, least=2, whole=True)
    check_number("batch_size", batch_size, least=1, whole=True)
    sizes = {"max_length": max_length, "stride": checked_stride(stride, max_length), "batch_size": batch_size}
    devices = [model.device for model in (student, teacher) if not isinstance(model, NAME)]
    device = devices[0] if devices else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = {"student": student, "teacher": teacher, "student_before": student_before, "baseline": baseline}
    folders = {role: _weights_folder(role, model) for role, model in given.items()}
    student, teacher = _loaded(student, device), _loaded(teacher, device)
    check_positions(student, max_length)
    batches, data = evaluation_batches(
        texts, student_tokenizer, teacher_tokenizer, **sizes, teacher_positions=learned_positions(teacher)
    )
    others = {"student_before": student_before, "baseline": baseline}
    students = {
        role: _loaded(m, student.device, floating_dtype(student)) for role, m in others.items() if m is not None
    }
    students["student"] = student
    prompts = {
        side: prompt_ids(tokenizer, next(filter(None, texts)))
        for side, tokenizer in (("student", student_tokenizer), ("teacher", teacher_tokenizer))
    }
    joint = _joint_pass(students, teacher, student_tokenizer, teacher_tokenizer, batches, route)
    words_per_byte = sum(len(text.split()) for text in texts) / data["eval_bytes"]
    dtype = torch.promote_types(floating_dtype(student), floating_dtype(teacher))
    largest = max(batches, key=lambda batch: int(batch["window_bytes"].sum()))
    figures: dict[str, dict | None] = {"student_before": dict.fromkeys(MODEL_KEYS), "baseline": None}
    samples = choose_prompts(texts)
    for role, model in {"teacher": teacher, **students}.items():
        side, scored = "teacher" if role == "teacher" else "student", joint["scores"][role]
        rate = scored["bytes"] / scored["tokens"]
        with _on(model, teacher.device if role == "teacher" else student.device):
            speed = measure_speed(model, largest, prompts[side], side, bytes_per_token=rate, dtype=dtype)
            written = write_on(model, teacher_tokenizer if role == "teacher" else student_tokenizer, samples)
        samples = [sample | {role: text} for sample, text in zip(samples, written, strict=True)]
        name = (names or {}).get(role) or getattr(model.config, "_name_or_path", "") or type(model).__name__
        likelihoods = likelihoods_of(scored, words_per_byte)
        figures[role] = {"name": name, **model_size(model, folders[role]), **likelihoods, **speed}
    environment = describe_environment(student, teacher, dtype, command)
    similarity = attention_similarity(student, teacher, batches[:: -(-len(batches) // ATTENTION_BATCHES)])
    scores = _benchmark_scores(benchmarks, students, student_tokenizer, batch_size) if benchmarks else None
    environment["evaluation_seconds"] = time.perf_counter() - start
    environment["seconds"] = seconds + environment["evaluation_seconds"]
    return {
        "schema": 1,
        **{role: figures[role] for role in ("teacher", "student_before", "student", "baseline")},
        "student_aware_teacher": joint["student_aware_teacher"],
        "compression": compression_of(figures, student, teacher),
        "retention": retention_of(joint["retention"]["student"], figures)
        | retention_breakdown(joint["retention"], batches),
        "attention": {"similarity": similarity},
        "router": joint["router"],
        "gap": {"deciles": deciles_of(joint["retention"])},
        "benchmarks": scores,
        "passages": best_and_worst(joint["token_nats"], batches, student_tokenizer),
        "samples": samples,
        "data": {"train_documents": None, "train_bytes": None, **data}
        | {key: value for key, value in (statistics or {}).items() if value is not None},
        "environment": environment,
    }


def _loaded(
    model: PreTrainedModel | str | Path, device: torch.device, dtype: torch.dtype | str = "auto"
) -> PreTrainedModel:
    if isinstance(model, NAME):
        return load_causal_lm(str(model), dtype=dtype).to(device)
    # Under peft's wrapper stands the model itself, with the adapters in its layers.
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _weights_folder(role: str, model: PreTrainedModel | str | Path | None) -> Path | None:
    """Where a model's weights lie on disk as they are: that of a teacher, or of a model given by name.

    A student that is at hand may have been trained since it was loaded.
    """
    if isinstance(model, NAME):
        return model_folder(model)
    return model_folder(model.name_or_path) if role == "teacher" and model.name_or_path else None


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
            if routed is None or not routed.decisions:
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
        "student_aware_teacher": {"bits_per_byte": bits_of(aware) if aware["bytes"] else None},
        "router": routing.figures(),
    }


def _benchmark_scores(
    benchmarks: Benchmarks,
    students: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
) -> dict[str, Any]:
    results: dict[str, dict[str, Any]] = {}
    for role in (role for role in ("student_before", "baseline", "student") if role in students):
        with _on(students[role], students["student"].device):
            results[role] = benchmarks.run(students[role], tokenizer, batch_size)
    return benchmarks.table(results)
