"""The pieces that the HTML report is put together from. All text is escaped here."""

from collections.abc import Iterable, Sequence
from html import escape

from distill_trainer.report.series import Plot

# Not printable, but part of what people read: line breaks, joiners of emoji and of scripts, and the fixed blank.
SHOWN = "\n\u200c\u200d\u00a0"


def figure(plot: Plot, below: str = "") -> str:
    """A plot under its title, and the HTML `below` it."""
    return f"<figure><figcaption>{escape(plot.title)}</figcaption>{plot.svg}{below}</figure>"


def facts(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """A card of names and values."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in rows)
    return f"<section class=card><h3>{escape(title)}</h3><dl>{items}</dl></section>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table that scrolls sideways where it is wider than the page."""
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in header)
    lines = (
        f"<tr><th scope=row>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="scroll {kind}" tabindex=0>{body}</div>'


def numbers(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that opens on a click: the figures behind a plot."""
    return f"<details><summary>Numbers</summary>{table(header, rows, 'small')}</details>"


def note(text: str) -> str:
    """A remark in a muted tone."""
    return f"<p class=note>{escape(text)}</p>"


def printable(text: str) -> str:
    """Text with a dot for what cannot be seen or would change the writing around it; line breaks stay."""
    return "".join(sign if sign.isprintable() or sign in SHOWN else "·" for sign in text)


def bar(share: float | None, kind: str) -> str:
    """A bar as wide as its share."""
    return f'<i class="bar {kind}" style="width:{100 * (share or 0):.1f}%"></i>'
