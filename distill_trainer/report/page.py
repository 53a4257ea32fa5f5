"""The report as one HTML file that opens from disk: no scripts, no network, no other files."""

from collections.abc import Sequence
from html import escape
from typing import Any

from distill_trainer.report.elements import facts, figure, note, table
from distill_trainer.report.router import gap_panel, retention_panel, router_panel
from distill_trainer.report.series import Plot
from distill_trainer.report.style import STYLE
from distill_trainer.report.tables import (
    FOOTNOTE,
    TOKEN_HEADER,
    benchmark_note,
    benchmark_table,
    sections,
    token_rows,
)
from distill_trainer.report.texts import passages_panel, samples_panel
from distill_trainer.report.wording import (
    ROLES,
    bits,
    command_line,
    model_rows,
    number,
    outcome,
    parameters,
    percent,
    perplexity,
    sentences,
    settings_of,
    short,
    shown_name,
    verdict,
)


def html_page(report: dict[str, Any], plots: Sequence[Plot]) -> str:
    """The whole report as one page, readable from 360 pixels, light and dark. All text is escaped."""
    student, teacher = (
        shown_name(str((report.get(role) or {}).get("name") or role)) for role in ("student", "teacher")
    )
    command, (explanation, settings) = command_line(report), settings_of(report)
    lists = {title: facts(title, rows) for title, rows in sections(report)}
    router = router_panel(report, plots, lists.pop("Router", ""))
    training = "".join(figure(plot) for plot in plots if plot.section == "training")
    body = [
        f"<header><p class=eyebrow>Distillation report</p><h1>{escape(student)}</h1>",
        f"<p class=from>distilled from <b>{escape(teacher)}</b></p></header>",
        f'<p class="verdict {outcome(report)}">{escape(verdict(report))}</p>',
        _headline(report),
        "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences(report)),
        _tiles(report),
        f"<h2>Training</h2><div class=grid>{training}</div>" if training else "",
        gap_panel(report, plots),
        retention_panel(report, plots),
        router,
        passages_panel(report),
        samples_panel(report),
        f"<h2>Figures</h2><div class=grid>{''.join(lists.values())}</div>" if lists else "",
        _benchmarks(report),
        "<h2>Models</h2>",
        table(TOKEN_HEADER, token_rows(report), "models"),
        note(FOOTNOTE),
        f"<h2>Command</h2><pre>{escape(command)}</pre>" if command else "",
        f"<h2>Settings</h2>{note(explanation)}<pre>{escape(settings)}</pre>" if settings else "",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(student)}: distillation report</title><style>{STYLE}</style></head>\n"
        "<body><main>\n" + "\n".join(part for part in body if part) + "\n</main></body></html>\n"
    )


def _headline(report: dict[str, Any]) -> str:
    best = min((figures["bits_per_byte"] for _, figures in model_rows(report)), default=None)
    rows = []
    for role, figures in model_rows(report):
        value = figures["bits_per_byte"]
        cells = (
            f"<b>{number(value, 4)}</b>",
            escape(perplexity(figures.get("word_perplexity"))),
            escape(parameters(figures)),
            escape(number(figures.get("disk_mb"), 1, " MB")),
            escape(short(figures.get("bytes_per_second"), "B/s")),
        )
        marks = " ".join(["student"] * (role == "student") + ["best"] * (value == best))
        columns = zip(("", "wide", "", "wide", ""), cells, strict=True)
        row = "".join(f'<td class="{name}">{cell}</td>' for name, cell in columns)
        rows.append(f'<tr class="{marks}"><th scope=row><i class="dot {role}"></i>{ROLES[role]}</th>{row}</tr>')
    head = (
        "<th scope=col>model</th><th scope=col>bits per byte</th><th scope=col class=wide>word perplexity</th>"
        "<th scope=col>parameters</th><th scope=col class=wide>on disk</th><th scope=col>text speed</th>"
    )
    body = f"<table class=headline><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll bare" tabindex=0>{body}</div>'


def _benchmarks(report: dict[str, Any]) -> str:
    rows, explanation = benchmark_table(report), benchmark_note(report)
    shown = table(rows[0], rows[1:]) if rows else ""
    return f"<h2>Benchmarks</h2>{shown}{note(explanation)}" if explanation else ""


def _tiles(report: dict[str, Any]) -> str:
    """The four figures that people ask for first, large."""
    compression, retention = report.get("compression") or {}, report.get("retention") or {}
    closed, student, teacher = retention.get("gap_closed"), bits(report, "student"), bits(report, "teacher")
    beats = student is not None and teacher is not None and student < teacher
    tiles = (
        (percent(None if closed is None or closed < 0 or beats else closed), "of the gap to the teacher closed"),
        (number(teacher - student, 4) if beats else "-", "bits per byte better than the teacher"),
        (percent(None if closed is None or closed >= 0 else -closed), "wider gap to the teacher"),
        (number(compression.get("parameter_ratio"), 1, "×"), "fewer parameters"),
        (percent(compression.get("size_reduction")), "smaller in memory"),
        (number(compression.get("speedup"), 1, "×"), "the teacher's speed"),
    )
    shown = "".join(f"<li><b>{value}</b> {label}</li>" for value, label in tiles if value != "-")
    return f"<ul class=tiles>{shown}</ul>" if shown else ""
