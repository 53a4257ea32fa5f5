"""A checkpoint: the bare student as a `from_pretrained` folder, and the rest of what trains in one file beside it."""

import copy
import json
import re
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from distill_trainer.errors import CheckpointError
from distill_trainer.modeling import STUDENT_PREFIX, DistillationModel

MODULES_FILE = "distillation_modules.safetensors"
STATE_FILE = "trainer_state.json"
# What torch.save wrote: each is a zip archive, whose directory stands at its end.
ARCHIVES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def save_modules(
    folder: Path,
    model: DistillationModel,
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Tensor] | None = None,
    *,
    data_curriculum: str = "none",
) -> None:
    """Write the student with its tokenizer, and the router and projections beside it.

    A checkpoint of a PEFT student keeps the adapters; any other folder gets the merged student, which loads without
    peft.

    Args:
        folder: Made if it does not exist.
        model: What trains.
        tokenizer: The student's.
        state: The whole state of `model`, gathered by the caller where it is sharded. None reads it from `model`.
        data_curriculum: The setting of this name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() if state is None else state
    student, weights = model.student, _student_part(state)
    if hasattr(student, "peft_config") and not re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.name):
        student, weights = copy.deepcopy(student).merge_and_unload(), None
    student.save_pretrained(folder, state_dict=weights)
    extras = {name: value.contiguous().cpu() for name, value in state.items() if not name.startswith(STUDENT_PREFIX)}
    save_file(extras, folder / MODULES_FILE, metadata={"format": "pt"} | _settings(model, data_curriculum))
    tokenizer.save_pretrained(folder)


def save_arguments(folder: Path, args: TrainingArguments) -> None:
    """Write the settings as the Trainer does, but without the token: folders of runs are copied and shared."""
    written = copy.copy(args)
    written.hub_token = None
    torch.save(written, folder / TRAINING_ARGS_NAME)


def check_checkpoint(folder: Path) -> None:
    """Raise a `CheckpointError` unless the folder was written, and is whole, as a checkpoint of this trainer."""
    missing = [name for name in (MODULES_FILE, STATE_FILE) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} is no checkpoint of this trainer: {' and '.join(missing)} missing. "
            f"Give a folder such as OUTPUT_DIR/{PREFIX_CHECKPOINT_DIR}-100."
        )
    damaged = [name for name in ARCHIVES if (folder / name).is_file() and not zipfile.is_zipfile(folder / name)]
    try:
        json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except ValueError:
        damaged.append(STATE_FILE)
    if damaged:
        raise CheckpointError(f"The checkpoint {folder} is damaged: {' and '.join(damaged)}. Resume an earlier one.")


def load_modules(folder: Path, model: DistillationModel, *, data_curriculum: str = "none") -> None:
    """Load what `save_modules` wrote into a checkpoint folder, in place.

    Args:
        folder: The checkpoint.
        model: What is loaded into.
        data_curriculum: The setting of this name, as the checkpoint must have been written with.

    Raises:
        CheckpointError: If files are missing, damaged, or of a run with other models or losses.
    """
    check_checkpoint(folder)
    adapted = hasattr(model.student, "peft_config")
    if (folder / "adapter_config.json").is_file() is not adapted:
        raise CheckpointError(
            f"{folder} was written {'without' if adapted else 'with'} use_peft. Resume it with the same setting."
        )
    try:
        extras, expected = load_file(folder / MODULES_FILE), model.extra_state_dict()
        with safe_open(folder / MODULES_FILE, framework="pt") as file:
            metadata = {"loss_balancing": "none"} | (file.metadata() or {})
        same_shapes = {n: v.shape for n, v in extras.items()} == {n: v.shape for n, v in expected.items()}
        # What a checkpoint of an earlier version does not name cannot be compared.
        same = all(metadata.get(name, value) == value for name, value in _settings(model, data_curriculum).items())
        if not same_shapes or not same:
            raise CheckpointError(
                f"{folder} was written by a run with another teacher, student, set of losses, use_router, "
                "router_layers, router_parts, layer_map, feature_layers, attention_layers, loss_balancing or "
                "data_curriculum. Resume it with the settings that it was started with."
            )
        if adapted:
            model.student.load_adapter(str(folder), model.student.active_adapter, is_trainable=True)
        else:
            source = AutoModelForCausalLM.from_pretrained(folder, dtype=model.causal_lm.dtype)
            model.causal_lm.load_state_dict(source.state_dict())
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"The checkpoint {folder} cannot be loaded: {reason}") from error
    model.load_state_dict(extras, strict=False)


def _student_part(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(STUDENT_PREFIX): v for n, v in state.items() if n.startswith(STUDENT_PREFIX)}


def _settings(model: DistillationModel, data_curriculum: str) -> dict[str, str]:
    """What shapes do not tell apart: inputs of the router, layers of the projections, ways to measure and to order."""
    pairs = [f"{loss}={a}:{b}" for loss, layers in asdict(model.pairs).items() for a, b in layers]
    return {
        "router_parts": "" if model.routing is None else " ".join(model.routing.parts),
        "layers": " ".join(pairs),
        "loss_balancing": "none" if model.balance is None else model.balance.method,
        "data_curriculum": data_curriculum,
    }
