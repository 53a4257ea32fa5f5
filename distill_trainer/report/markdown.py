"""The report as Markdown, for GitHub, the Hub and diffs."""

import re
from collections.abc import Iterable, Sequence
from textwrap import indent
from typing import Any

from distill_trainer.report.elements import printable
from distill_trainer.report.layers import layer_table, routing_note
from distill_trainer.report.series import Plot
from distill_trainer.report.tables import (
    BREAKDOWNS,
    FOOTNOTE,
    RELIABILITY_HEADER,
    RELIABILITY_NOTE,
    TOKEN_HEADER,
    benchmark_note,
    benchmark_table,
    breakdown_table,
    decile_note,
    decile_table,
    reliability_rows,
    sections,
    token_rows,
)
from distill_trainer.report.texts import SAMPLES_NOTE, TEXT_ROLES, passages_note, sample_lines
from distill_trainer.report.wording import (
    ROLES,
    command_line,
    model_rows,
    number,
    parameters,
    perplexity,
    sentences,
    settings_of,
    short,
    verdict,
)


def markdown_page(report: dict[str, Any], plots: Sequence[Plot]) -> str:
    """The whole report as one Markdown page; the plots are files beside it."""
    parts = ["# Distillation report", f"**{plain(verdict(report))}**", headline(report)]
    parts += [plain(sentence) for sentence in sentences(report)]
    for plot in plots:
        parts += [f"## {plot.title}", _picture(plot)]
    for title, rows in sections(report):
        parts += [f"## {title}", _table(("", "value"), rows)]
        if title == "Router":
            parts += [*filter(None, [routing_note(report)])]
    if layers := layer_table(report):
        parts += ["## Router by layer", _table(layers[0], layers[1:])]
    if deciles := decile_table(report):
        title = "## Gap to the teacher by decile, nats"
        parts += [title, _table(deciles[0], deciles[1:]), plain(decile_note(report))]
    if bins := reliability_rows(report):
        parts += ["## Reliability of the capacity", _table(RELIABILITY_HEADER, bins), RELIABILITY_NOTE]
    if explanation := benchmark_note(report):
        benchmarks = benchmark_table(report)
        parts += [
            "## Benchmarks",
            *([_table(benchmarks[0], benchmarks[1:])] if benchmarks else []),
            plain(explanation),
        ]
    for name, (title, _) in BREAKDOWNS.items():
        if groups := breakdown_table(report, name):
            parts += [f"## Retention: {title[0].lower()}{title[1:]}", _table(groups[0], groups[1:])]
    if explanation := passages_note(report):
        parts += ["## Best and worst passages", explanation, _passages(report["passages"])]
    if samples := report.get("samples"):
        parts += ["## What the models write", SAMPLES_NOTE, *map(_sample, samples)]
    parts += ["## Token figures (not comparable between tokenizers)", _token_table(report), FOOTNOTE]
    if command := command_line(report):
        parts += ["## Command", f"    {' '.join(command.split())}"]
    explanation, settings = settings_of(report)
    if settings:
        parts += ["## Settings", explanation, indent(settings.rstrip(), " " * 4)]
    return "\n\n".join(parts) + "\n"


def headline(report: dict[str, Any]) -> str:
    """The table of all models that were scored."""
    rows = [
        (
            f"**{ROLES[role]}**" if role == "student" else ROLES[role],
            number(figures["bits_per_byte"], 4),
            perplexity(figures.get("word_perplexity")),
            parameters(figures),
            number(figures.get("disk_mb"), 1, " MB"),
            short(figures.get("bytes_per_second"), "B/s"),
        )
        for role, figures in model_rows(report)
    ]
    return _table(("model", "bits per byte", "word perplexity", "parameters", "on disk", "text per second"), rows)


def _token_table(report: dict[str, Any]) -> str:
    return _table(TOKEN_HEADER, token_rows(report))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *(map(plain, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _passages(passages: dict[str, Any]) -> str:
    found = [(kind, passage) for kind in ("best", "worst") for passage in passages.get(kind) or []]
    roles = [role for role in TEXT_ROLES if any(passage.get(role) is not None for _, passage in found)]
    rows = [(f"{kind}: {_prose(p['text'])}", *(number(p.get(role), 2) for role in roles)) for kind, p in found]
    return _table(("passage", *(ROLES[role] for role in roles)), rows)


def _sample(sample: dict[str, Any]) -> str:
    lines = [f"> {plain(_prose(sample['prompt']))} …", ""]
    return "\n".join(lines + [f"- **{name}**: {plain(_prose(text))}" for name, text in sample_lines(sample)])


def _prose(text: str) -> str:
    """Text on one line, without what would become a heading, a list or emphasis."""
    return re.sub(r"([\\`*_#\[\]~])", r"\\\1", printable(" ".join(text.split())))


def _picture(plot: Plot) -> str:
    return f'<img src="{plot.name}.svg" alt="{plot.alt}" width="600">'


def plain(value: str) -> str:
    """`value` with what would end a table cell or start HTML made harmless."""
    return value.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
