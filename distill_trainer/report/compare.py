"""Finished runs side by side: `python -m distill_trainer.report compare RUN1 RUN2 ... [--output FILE.html]`."""

import json
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from distill_trainer.errors import ConfigurationError, DataError, DistillationError
from distill_trainer.parsing import OneLineParser
from distill_trainer.report.build import write_atomically
from distill_trainer.report.elements import note, table
from distill_trainer.report.style import STYLE
from distill_trainer.report.wording import bits, command_line, number, parameters, percent, short

HEADER = (
    *("run", "before", "no teacher", "distilled", "teacher", "gap closed", "same first", "parameters", "text/s"),
    *("training bytes", "seconds"),
)
# What must be equal for bits per byte to compare: the text, what was scored of it, and behind how much context.
SCOPE = ("eval_sha256", "scored_bytes", "eval_max_length", "eval_stride")
SAME_TEXT = "All runs were scored on the same held-out text, in windows alike. Bits per byte, lower is better."
OTHER_TEXT = (
    "The runs were scored on different held-out text, or in different windows of it: their bits per byte compare "
    "within a run only, not between runs."
)
UNKNOWN_TEXT = (
    "At least one report, of an older version, does not say which text its run was scored on: whether bits per byte "
    "compare between the runs cannot be told."
)
Run = tuple[str, dict[str, Any]]


def read_run(path: str | Path) -> dict[str, Any]:
    """The report of a run.

    Args:
        path: The output folder of a run, its `report` folder, or the `report.json` in there.

    Raises:
        DataError: If there is no report, or if it cannot be read.
    """
    path = Path(path)
    places = [path] if path.is_file() else [path / "report" / "report.json", path / "report.json"]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise DataError(f"{path} has no report: there is no {places[0]}. Give the output folder of a finished run.")
    try:
        report = json.loads(found.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{found} cannot be read as a report: {' '.join(str(error).split())}") from error
    if not isinstance(report, dict) or report.get("schema") != 1 or not isinstance(report.get("student"), dict):
        raise DataError(f"{found} is no report of schema 1. Run the evaluation again with this version.")
    if "bits_per_byte" not in report["student"]:
        raise DataError(f"{found} is damaged: its student has no bits_per_byte. Run the evaluation again.")
    for part in ("teacher", "student_before", "baseline", "retention", "data", "environment"):
        if not isinstance(report.get(part), dict | None):
            raise DataError(f"{found} is damaged: {part} is no mapping. Run the evaluation again.")
    try:
        text_page([(str(path), report)])
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{found} is damaged: {error}. Run the evaluation again.") from error
    return report


def run_rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """One row of figures for each run, under `HEADER`."""
    return [
        (
            name,
            *(number(bits(report, role), 4) for role in ("student_before", "baseline", "student", "teacher")),
            percent((report.get("retention") or {}).get("gap_closed"), 1),
            percent((report.get("retention") or {}).get("top1_agreement"), 1),
            parameters(report["student"]),
            short(report["student"].get("bytes_per_second"), "B"),
            number((report.get("data") or {}).get("train_bytes")),
            number((report.get("environment") or {}).get("seconds")),
        )
        for name, report in runs
    ]


def scope(runs: Sequence[Run]) -> str:
    """One sentence: do the runs' bits per byte compare?"""
    found = [{(report.get("data") or {}).get(key) for _, report in runs} for key in SCOPE]
    if any(len(values - {None}) > 1 for values in found):
        return OTHER_TEXT
    return UNKNOWN_TEXT if any(None in values for values in found) else SAME_TEXT


def text_page(runs: Sequence[Run]) -> str:
    """The comparison for a terminal."""
    lines = [HEADER, *run_rows(runs)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    commands = [f"{name}: {command}" for name, report in runs if (command := command_line(report))]
    return "\n".join([shown[0], "-" * len(shown[0]), *shown[1:], "", scope(runs), *commands]) + "\n"


def comparison_page(runs: Sequence[Run]) -> str:
    """The comparison as one HTML file that opens from disk, in the style of the report."""
    commands = "".join(
        f"<h3>{escape(name)}</h3><pre>{escape(command)}</pre>"
        for name, report in runs
        if (command := command_line(report))
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>Distillation runs</title><style>{STYLE}</style></head>\n<body><main><header>"
        f"<p class=eyebrow>Distillation reports</p><h1>{len(runs)} runs side by side</h1></header>"
        f"{note(scope(runs))}{table(HEADER, run_rows(runs))}<h2>Commands</h2>{commands}</main></body></html>\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Ends with exit code 2 and one line on standard error for what the user can mend."""
    parser = OneLineParser(prog="python -m distill_trainer.report", description="Reports of finished runs.")
    command = parser.add_subparsers(dest="action", required=True).add_parser("compare", help="Set runs side by side.")
    command.add_argument("runs", metavar="RUN", nargs="+", help="Output folder of a run, or its report.json.")
    command.add_argument("--output", metavar="FILE.html", type=Path, help="Also write the comparison as a page.")
    options = parser.parse_args(arguments)
    try:
        if len(options.runs) < 2:
            raise ConfigurationError(f"Two runs or more are needed to compare, got {options.runs[0]} alone.")
        runs = [(name, read_run(name)) for name in options.runs]
        if options.output:
            _write(options.output, comparison_page(runs))
    except DistillationError as error:
        parser.error(str(error))
    sys.stdout.write(text_page(runs))


def _write(path: Path, page: str) -> None:
    if path.suffix != ".html":
        raise ConfigurationError(f"--output must end in .html, got {path}.")
    try:
        write_atomically(path, page.encode())
    except OSError as error:
        raise ConfigurationError(f"--output cannot be written to {path}: {error.strerror}.") from error
