"""The report as one HTML file that opens from disk: no scripts, no network, plots as files beside it."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from distill_trainer.report.plots import Plot
from distill_trainer.report.style import STYLE
from distill_trainer.report.tables import FOOTNOTE, sections, token_rows
from distill_trainer.report.wording import (
    ROLES,
    model_rows,
    number,
    outcome,
    parameters,
    percent,
    perplexity,
    sentences,
    short,
    verdict,
)

# More rows than this would bury the page; the busiest are shown.
MAX_EXPERT_ROWS = 16


def html_page(report: dict[str, Any], plots: Sequence[Plot]) -> str:
    """The whole report as one page, readable from 360 pixels, light and dark. All text is escaped."""
    student, teacher = (str((report.get(role) or {}).get("name") or role) for role in ("student", "teacher"))
    command = (report.get("environment") or {}).get("command")
    lists = {title: _facts(title, rows) for title, rows in sections(report)}
    router = _router_panel(report.get("router") or {}, lists.pop("Router", ""))
    body = [
        f"<header><p class=eyebrow>Distillation report</p><h1>{escape(student)}</h1>",
        f"<p class=from>distilled from <b>{escape(teacher)}</b></p></header>",
        f'<p class="verdict {outcome(report)}">{escape(verdict(report))}</p>',
        _headline(report),
        "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences(report)),
        _tiles(report),
        "<h2>Training</h2>" if plots else "",
        f"<div class=grid>{''.join(map(_figure, plots))}</div>",
        router,
        f"<div class=grid>{''.join(lists.values())}</div>",
        "<h2>Models</h2>",
        _table(("", "name", "token perplexity", "tokens/s", "memory"), token_rows(report)),
        f"<p class=note>{escape(FOOTNOTE)}</p>",
        f"<h2>Command</h2><pre>{escape(command)}</pre>" if command else "",
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
            escape(number(figures.get("size_mb"), 0, " MB")),
            escape(short(figures.get("bytes_per_second"), "B/s")),
        )
        marks = " ".join(["student"] * (role == "student") + ["best"] * (value == best))
        columns = zip(("", "wide", "", "wide", ""), cells, strict=True)
        row = "".join(f'<td class="{name}">{cell}</td>' for name, cell in columns)
        rows.append(f'<tr class="{marks}"><th scope=row><i class="dot {role}"></i>{ROLES[role]}</th>{row}</tr>')
    head = (
        "<th scope=col>model</th><th scope=col>bits per byte</th><th scope=col class=wide>word perplexity</th>"
        "<th scope=col>parameters</th><th scope=col class=wide>size</th><th scope=col>text speed</th>"
    )
    return f"<table class=headline><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _tiles(report: dict[str, Any]) -> str:
    """The four figures that people ask for first, large."""
    compression, retention = report.get("compression") or {}, report.get("retention") or {}
    tiles = (
        (percent(retention.get("gap_closed")), "of the gap to the teacher closed"),
        (number(compression.get("parameter_ratio"), 1, "×"), "fewer parameters"),
        (percent(compression.get("size_reduction")), "smaller"),
        (number(compression.get("speedup"), 1, "×"), "the teacher's speed"),
    )
    shown = "".join(f"<li><b>{value}</b> {label}</li>" for value, label in tiles if value != "-")
    return f"<ul class=tiles>{shown}</ul>" if shown else ""


def _figure(plot: Plot) -> str:
    name, alt = escape(plot.name), escape(plot.alt)
    return (
        f'<figure><figcaption>{escape(plot.title)}</figcaption><picture><source media="(prefers-color-scheme: dark)" '
        f'srcset="{name}-dark.png"><img src="{name}.png" alt="{alt}"></picture></figure>'
    )


def _router_panel(router: dict[str, Any], facts: str) -> str:
    """Facts about the router beside a bar per expert: the student-aware share and the gate's own."""
    loads = router.get("expert_load")
    if not loads:
        return facts
    gate = router.get("gate_load") or [None] * len(loads)
    order = list(range(len(loads)))
    if len(loads) > MAX_EXPERT_ROWS:
        order = sorted(order, key=lambda expert: -loads[expert])[:MAX_EXPERT_ROWS]
    rows = "".join(
        f"<tr><th scope=row>{expert}</th><td>{_bar(loads[expert], 'student')}{_bar(gate[expert], 'teacher')}</td>"
        f"<td>{percent(loads[expert])}</td><td>{percent(gate[expert])}</td></tr>"
        for expert in order
    )
    kept = "" if len(loads) == len(order) else f" The busiest {len(order)} of {len(loads)}."
    return (
        f"<h2>Student-aware router</h2><div class=grid>{facts}"
        "<section class=card><h3>Expert load on held-out text</h3><table class=bars><thead><tr>"
        "<th scope=col>expert</th><td></td><th scope=col class=router>router</th><th scope=col class=gate>gate</th>"
        f"</tr></thead><tbody>{rows}</tbody></table><p class=note>Router: share of the routing weight. "
        f"Gate: share of the teacher's own selections.{kept}</p></section></div>"
    )


def _bar(share: float | None, kind: str) -> str:
    return f'<i class="bar {kind}" style="width:{100 * (share or 0):.1f}%"></i>'


def _facts(title: str, rows: Iterable[tuple[str, str]]) -> str:
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in rows)
    return f"<section class=card><h3>{escape(title)}</h3><dl>{items}</dl></section>"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in header)
    lines = (
        f"<tr><th scope=row>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
