"""The report as Markdown, for GitHub, the Hub and diffs."""

from collections.abc import Iterable, Sequence
from typing import Any

from distill_trainer.report.plots import Plot
from distill_trainer.report.tables import (
    FOOTNOTE,
    RELIABILITY_HEADER,
    RELIABILITY_NOTE,
    TOKEN_HEADER,
    benchmark_note,
    benchmark_table,
    decile_note,
    decile_table,
    reliability_rows,
    sections,
    token_rows,
)
from distill_trainer.report.wording import ROLES, model_rows, number, parameters, perplexity, sentences, short, verdict


def markdown_page(report: dict[str, Any], plots: Sequence[Plot]) -> str:
    """The whole report as one Markdown page; the plots are files beside it."""
    parts = ["# Distillation report", f"**{_text(verdict(report))}**", _headline(report)]
    parts += [_text(sentence) for sentence in sentences(report)]
    for plot in plots:
        parts += [f"## {plot.title}", _picture(plot)]
    for title, rows in sections(report):
        parts += [f"## {title}", _table(("", "value"), rows)]
    if deciles := decile_table(report):
        title = "## Gap to the teacher by decile, nats"
        parts += [title, _table(deciles[0], deciles[1:]), _text(decile_note(report))]
    if bins := reliability_rows(report):
        parts += ["## Reliability of the capacity", _table(RELIABILITY_HEADER, bins), RELIABILITY_NOTE]
    if benchmarks := benchmark_table(report):
        parts += ["## Benchmarks", _table(benchmarks[0], benchmarks[1:]), _text(benchmark_note(report))]
    parts += ["## Token figures (not comparable between tokenizers)", _token_table(report), FOOTNOTE]
    command = (report.get("environment") or {}).get("command")
    if command:
        parts += ["## Command", f"    {' '.join(command.split())}"]
    return "\n\n".join(parts) + "\n"


def _headline(report: dict[str, Any]) -> str:
    rows = [
        (
            f"**{ROLES[role]}**" if role == "student" else ROLES[role],
            number(figures["bits_per_byte"], 4),
            perplexity(figures.get("word_perplexity")),
            parameters(figures),
            number(figures.get("size_mb"), 0, " MB"),
            short(figures.get("bytes_per_second"), "B/s"),
        )
        for role, figures in model_rows(report)
    ]
    return _table(("model", "bits per byte", "word perplexity", "parameters", "size", "text per second"), rows)


def _token_table(report: dict[str, Any]) -> str:
    return _table(TOKEN_HEADER, token_rows(report))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *(map(_text, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _picture(plot: Plot) -> str:
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{plot.name}-dark.png">'
    return f'<picture>{dark}<img src="{plot.name}.png" alt="{plot.alt}" width="600"></picture>'


def _text(value: str) -> str:
    """`value` with what would end a table cell or start HTML made harmless."""
    return value.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
