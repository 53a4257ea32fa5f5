"""Where and how a report's figures were measured."""

import platform
import re
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from transformers import PreTrainedModel

from distill_trainer.evaluation.measure import floating_dtype
from distill_trainer.evaluation.speed import memory_kind

VERSIONS = ("distill_trainer", "torch", "transformers", "datasets", "accelerate", "tokenizers")


def describe_environment(
    student: PreTrainedModel, teacher: PreTrainedModel, speed_dtype: torch.dtype, command: Sequence[str] | None
) -> dict[str, Any]:
    """The report's `environment`: versions, machine, dtypes and command.

    Args:
        student: Its device is reported.
        teacher: Its dtype is reported beside the student's.
        speed_dtype: In which dtype the speeds were measured.
        command: Arguments of the command that ran. None takes `sys.argv`. Secrets are left out.
    """
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
