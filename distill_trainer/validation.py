"""Rules that a setting must keep; each raises in one line what is wrong."""

import math
import tempfile
from pathlib import Path
from typing import Any, TypeGuard, get_type_hints

from distill_trainer.errors import ConfigurationError


def is_number(value: object, *, whole: bool = False) -> TypeGuard[int | float]:
    """Whether `value` is a finite number, and an integer where `whole` is asked. True and False are none."""
    kind = int if whole else int | float
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


def check_number(
    name: str, value: object, *, least: float | None = None, above: float | None = None, whole: bool = False
) -> None:
    """Raise unless `value` is a finite number, `whole` if that is asked, and at least `least`, or above `above`."""
    fits = is_number(value) and (value >= least if least is not None else above is not None and value > above)
    if not fits or not is_number(value, whole=whole):
        rule = f"{least} or above" if least is not None else f"above {above}"
        rule = f"a whole number, {rule}" if whole and fits else rule
        raise ConfigurationError(f"{name} must be {rule}, got {value}.")


def check_flags(settings: Any) -> None:
    """Raise unless every bool field of a dataclass holds one: the text "false" would count as true."""
    # Not the types of `fields`, which HfArgumentParser changes.
    for name, hint in get_type_hints(type(settings)).items():
        value = getattr(settings, name, None)
        if hint in (bool, bool | None) and not isinstance(value, hint):
            raise ConfigurationError(f"{name} must be True or False, got {value!r}.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigurationError(f"{name} must be one of {', '.join(choices)}, got {value}.")


def check_writable(folder: Path) -> None:
    """Raise unless a file can be made in `folder` or in its nearest existing parent. Leaves nothing behind."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        # A trial, because the permission bits say nothing to root, on read-only disks and in /proc.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ConfigurationError(
            f"output_dir must be a folder that can be written, got {folder} ({error.strerror})."
        ) from error
