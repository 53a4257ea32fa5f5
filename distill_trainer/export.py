"""A trained student as a clean `from_pretrained` folder: one model and its tokenizer, nothing of the training."""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from distill_trainer.errors import CheckpointError, ConfigurationError, DistillationError

# Its presence marks a folder as an export, which a later export may replace.
EXPORT_RECORD = "export.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def export_student(source: Any, output_dir: str | Path, *, dtype: str | torch.dtype | None = None) -> Path:
    """Path of the folder that now holds the student of `source` as a plain model with its tokenizer.

    A LoRA adapter is merged into a copy of the student. The folder is written beside its place and renamed into it at
    the end, so that a failed export leaves nothing behind and keeps an earlier one.

    Args:
        source: A run's output folder, a checkpoint, an export, or an object with `student` and `processing_class`,
            such as a `DistillationTrainer`, which is not changed.
        output_dir: Folder to write. It must not exist, be empty, or be an earlier export, which is replaced.
        dtype: Stored type of the weights: float32, float16 or bfloat16. None keeps the student's own.

    Raises:
        CheckpointError: If the folder `source` holds no complete student.
        ConfigurationError: If `dtype`, `output_dir` or the kind of `source` cannot work.
        DistillationError: If the folder cannot be written.
    """
    stored_dtype = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and stored_dtype not in DTYPES.values():
        raise ConfigurationError(f"dtype must be one of {', '.join(DTYPES)} or None, got {dtype}.")
    output_dir = Path(output_dir)
    _check_target(output_dir)
    from_folder = isinstance(source, (str, os.PathLike))
    student, tokenizer = _load(Path(source)) if from_folder else _trained(source)
    student = _merged(student, stored_dtype)
    staging = output_dir.with_name(f".{output_dir.name}.{os.getpid()}.partial")
    try:
        student.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        record = {"exported_by": "distill_trainer", "class": type(student).__name__, "dtype": str(student.dtype)}
        (staging / EXPORT_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        _move_into_place(staging, output_dir)
    except (OSError, SafetensorError) as error:
        raise DistillationError(f"output_dir must be writable, got {output_dir}: {error}.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return output_dir


def _check_target(output_dir: Path) -> None:
    taken = output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir()))
    if taken and not (output_dir / EXPORT_RECORD).is_file():
        raise ConfigurationError(
            f"output_dir must be new, empty or an earlier export, got {output_dir}. Choose another folder."
        )


def _load(folder: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """Student and tokenizer of a run's folder or checkpoint. With a LoRA adapter the student is a `PeftModel`."""
    adapter = (folder / "adapter_config.json").is_file()
    # Without this check a wrong path would be looked up on the Hub.
    if not adapter and not (folder / "config.json").is_file():
        raise CheckpointError(f"source must be a folder that holds a student, got {folder}. Give a run's output.")
    missing: set[str] = set()
    try:
        if adapter:
            from peft import AutoPeftModelForCausalLM

            student = AutoPeftModelForCausalLM.from_pretrained(folder)
        else:
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
            student, missing = loaded[0], set(loaded[1]["missing_keys"])
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"source must hold a student and its tokenizer, got {folder}: {reason}") from error
    if missing:
        # from_pretrained would have filled them with random numbers.
        raise CheckpointError(f"source must hold all weights, got {folder} without {', '.join(sorted(missing))}.")
    return student, tokenizer


def _trained(source: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    student, tokenizer = getattr(source, "student", None), getattr(source, "processing_class", None)
    if student is None or tokenizer is None:
        raise ConfigurationError(
            f"source must be a folder or have a student and a processing_class, got {type(source).__name__}."
        )
    return student, tokenizer


def _merged(student: Any, dtype: torch.dtype | None) -> PreTrainedModel:
    """The student without adapters and in `dtype`: itself if it is so already, else a changed copy."""
    adapted = hasattr(student, "merge_and_unload")
    if adapted or dtype not in (None, student.dtype):
        student = copy.deepcopy(student)
    if adapted:
        # The merge runs in the student's own dtype: rounding comes after it, once.
        student = student.merge_and_unload(safe_merge=True)
    return student.to(dtype) if dtype is not None else student


def _move_into_place(staging: Path, output_dir: Path) -> None:
    previous = staging.with_suffix(".previous")
    if output_dir.exists():
        output_dir.rename(previous)
    try:
        staging.rename(output_dir)
    except OSError:
        if previous.exists():
            previous.rename(output_dir)
        raise
    shutil.rmtree(previous, ignore_errors=True)
