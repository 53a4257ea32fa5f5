"""Writing the report folder: every file whole or not at all."""

import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill_trainer.report.markdown import markdown_page
from distill_trainer.report.page import html_page
from distill_trainer.report.plots import ALL_PLOTS, draw_plots
from distill_trainer.report.style import standalone


def write_report(
    report: dict[str, Any],
    log_history: list[dict[str, Any]],
    output_dir: str | Path,
    *,
    baseline_log_history: list[dict[str, Any]] | None = None,
    phases: Sequence[float] | None = None,
) -> Path:
    """Path of `report.html`, written with `report.json`, `report.md` and the plots into `output_dir/report`.

    The HTML file holds its plots; the files beside it are those of the Markdown page. Plots of an earlier run that
    this one does not have are removed.

    Args:
        report: In the schema of `evaluate_models`.
        log_history: What the trainer logged, each entry with its `step`. Plots without any values are left out.
        output_dir: Folder of the run.
        baseline_log_history: What the training without a teacher logged, for the comparison over time.
        phases: Where the second and later phases of training begin, as fractions of the run.
    """
    folder = Path(output_dir) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    report = finite(report)
    plots = draw_plots(report, log_history, baseline_log_history or [], phases or [])
    for stale in {kind.name for kind in ALL_PLOTS} - {plot.name for plot in plots}:
        (folder / f"{stale}.svg").unlink(missing_ok=True)
    for plot in plots:
        write_atomically(folder / f"{plot.name}.svg", standalone(plot.svg).encode())
    write_atomically(folder / "report.json", json.dumps(report, indent=2, allow_nan=False).encode())
    write_atomically(folder / "report.md", markdown_page(report, plots).encode())
    write_atomically(folder / "report.html", html_page(report, plots).encode())
    return folder / "report.html"


def finite(value: Any) -> Any:
    """`value` as plain JSON types: NaN and infinities become None, one-element tensors and arrays their number."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if hasattr(value, "tolist"):
        return finite(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, finds the old content or the new, never a part."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        # mkstemp allows the owner only; a report is as readable as any other new file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
