"""Rules that a setting must keep; each raises in one line what is wrong."""

import math
import tempfile
from pathlib import Path

from distill_trainer.errors import ConfigurationError


def check_number(
    name: str, value: object, *, least: float | None = None, above: float | None = None, whole: bool = False
) -> None:
    """Raise unless `value` is a finite number, `whole` if that is asked, and at least `least`, or above `above`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    fits = is_number and (value >= least if least is not None else above is not None and value > above)
    if not fits or (whole and not isinstance(value, int)):
        rule = f"{least} or above" if least is not None else f"above {above}"
        rule = f"a whole number, {rule}" if whole and fits else rule
        raise ConfigurationError(f"{name} must be {rule}, got {value}.")


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
