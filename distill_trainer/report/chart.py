"""Charts as SVG text in the page's own colours: lines and stacked areas over a pair of axes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from distill_trainer.report.marks import Line, areas, curves, marker

# Units of the drawing. A phone shows them at three quarters of their size, a wide page somewhat enlarged.
WIDTH, TEXT = 400, 12
TITLE_HEIGHT, TICK_HEIGHT, LEGEND_HEIGHT, SPACE = 25, 20, 19, 14
# Width of a letter in a wide font, to leave room for text that cannot be measured here.
LETTER = 0.65 * TEXT


@dataclass
class Panel:
    """A pair of axes with its lines.

    Attributes:
        lines: What is drawn.
        title: What the vertical axis shows.
        x_label: What the horizontal axis shows.
        stacked: Lay the lines on one another as areas, or as bars; all need the same horizontal values.
        slots: Give each horizontal value a place of its own, where a stack is a bar. One value alone has one anyway.
        log: Logarithmic vertical axis; values of 0 or below must be None.
        percent: Write the vertical axis in per cent.
        from_zero: Start the vertical axis at 0.
        whole: Tick whole numbers only on the vertical axis.
        x_from_zero: Start the horizontal axis at 0, and give both the same end.
        x_names: What stands at the horizontal values 1, 2 and so on in place of numbers.
    """

    lines: list[Line]
    title: str = ""
    x_label: str = ""
    stacked: bool = False
    slots: bool = False
    log: bool = False
    percent: bool = False
    from_zero: bool = False
    whole: bool = False
    x_from_zero: bool = False
    x_names: Sequence[str] = ()


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """About `count` round values from `low` to `high`."""
    if high <= low:
        return [low]
    size = (high - low) / count
    power = 10.0 ** math.floor(math.log10(size))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= size * (1 - 1e-9))
    step = max(math.ceil(step), 1) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Values of 1, 2 and 5 times a power of ten; powers alone where these would be many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high < 1_000 * low else (1,)
    return [f * 10.0**power for power in powers for f in factors if low <= f * 10.0**power <= high]


def tick_text(value: float, values: Sequence[float], *, percent: bool = False) -> str:
    """A tick with as many decimals as the ticks need to differ."""
    if percent:
        return f"{100 * value:.0f} %"
    decimals = next((d for d in range(6) if all(abs(v - round(v, d)) < 1e-9 * max(abs(v), 1) for v in values)), 6)
    return f"{value:,.{decimals}f}"


def chart(
    panels: Sequence[Panel], alt: str, *, height: int = 170, columns: int = 1, marks: Sequence[float] = ()
) -> str:
    """The panels as one `svg` element; in a wide page's grid or on a phone it takes the width that there is.

    Args:
        panels: Row by row.
        alt: What the chart shows, for those who do not see it.
        height: Of each plot area.
        columns: Panels side by side.
        marks: Horizontal values with a dotted line in every panel.
    """
    width = (WIDTH - SPACE * (columns - 1)) / columns
    parts, top = [], 0.0
    for start in range(0, len(panels), columns):
        row = panels[start : start + columns]
        drawn = [_panel(p, n * (width + SPACE), top, width, height, marks) for n, p in enumerate(row)]
        parts += [content for content, _ in drawn]
        top += max(bottom for _, bottom in drawn) + SPACE
    size = f"0 0 {WIDTH} {top - SPACE:g}"
    return f'<svg class="chart" viewBox="{size}" role="img" aria-label="{escape(alt)}">{"".join(parts)}</svg>'


def _panel(
    panel: Panel, left: float, top: float, width: float, height: float, marks: Sequence[float]
) -> tuple[str, float]:
    """The panel's elements, and how high it is."""
    title = f'<text class="axis" x="{left:g}" y="{top + TEXT:g}">{escape(panel.title)}</text>' if panel.title else ""
    upper = top + (TITLE_HEIGHT if panel.title else TEXT / 2)
    lower = upper + height
    (x_low, x_high), (y_low, y_high) = _ranges(panel)
    y_ticks = log_ticks(y_low, y_high) if panel.log else ticks(y_low, y_high, 4, whole=panel.whole)
    y_texts = [tick_text(value, y_ticks, percent=panel.percent) for value in y_ticks]
    inner = left + LETTER * max(map(len, y_texts), default=0) + 6
    x_at, y_at = _scale(x_low, x_high, inner, left + width - 15), _scale(y_low, y_high, lower, upper, log=panel.log)
    parts = [title]
    for value, text in zip(y_ticks, y_texts, strict=True):
        y = y_at(value)
        parts.append(f'<path class="grid" d="M{inner:.1f} {y:.1f}H{left + width:.1f}"/>')
        parts.append(f'<text x="{inner - 6:.1f}" y="{y + TEXT / 3:.1f}" text-anchor="end">{text}</text>')
    for value, name in _x_ticks(panel, x_low, x_high, width):
        place = f'x="{x_at(value):.1f}" y="{lower + TEXT + 4:.1f}" text-anchor="middle"'
        parts.append(f"<text {place}>{escape(name)}</text>")
    marks = [mark for mark in marks if x_low < mark < x_high]
    parts += [f'<path class="mark" d="M{x_at(mark):.1f} {upper:.1f}V{lower:.1f}"/>' for mark in marks]
    slot = _slot(panel)
    parts += areas(panel.lines, x_at, y_at, slot) if panel.stacked else curves(panel.lines, x_at, y_at)
    bottom = lower + TICK_HEIGHT
    if panel.x_label:
        bottom += TEXT + 2
        place = f'x="{left + width:.1f}" y="{bottom - 3:.1f}" text-anchor="end"'
        parts.append(f'<text class="axis" {place}>{escape(panel.x_label)}</text>')
    legend, rows = _legend(panel, left, bottom, width)
    return "".join(parts) + legend, bottom + rows * LEGEND_HEIGHT - top


def _ranges(panel: Panel) -> tuple[tuple[float, float], tuple[float, float]]:
    """Ends of both axes: those of the points, with some air above and below."""
    points = [(x, y) for line in panel.lines for x, y in line.points if y is not None]
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    if panel.x_names:
        x_low, x_high = 0.7, len(panel.x_names) + 0.3
    else:
        x_low, x_high = x_low - _slot(panel) / 2, x_high + _slot(panel) / 2
    y_low, y_high = min(y for _, y in points), max(y for _, y in points)
    if panel.stacked:
        return (x_low, x_high), (0.0, 1.0)
    if panel.x_from_zero:
        end = 1.08 * max(x_high, y_high)
        return (0.0, end), (0.0, end)
    if panel.log:
        return (x_low, x_high), (y_low / 1.15, y_high * 1.15)
    air = 0.08 * (y_high - y_low) or abs(0.1 * y_high) or 1.0
    return (x_low, x_high), (0.0 if panel.from_zero else y_low - air, y_high + air)


def _slot(panel: Panel) -> float:
    """How much of the horizontal axis each value has to itself, 0 for a continuous axis."""
    values = sorted({x for line in panel.lines for x, _ in line.points})
    if len(values) == 1:
        return 1.0
    return min(after - before for before, after in pairwise(values)) if panel.slots else 0.0


def _x_ticks(panel: Panel, low: float, high: float, width: float) -> list[tuple[float, str]]:
    if panel.x_names:
        return list(enumerate(panel.x_names, 1))
    values = ticks(low, high, max(int(width / 80), 2), whole=not panel.x_from_zero)
    return [(value, tick_text(value, values)) for value in values]


def _scale(low: float, high: float, start: float, end: float, *, log: bool = False) -> Callable[[float], float]:
    """Maps values from `low` to `high` onto coordinates from `start` to `end`."""
    of = math.log if log else float
    size = of(high) - of(low) or 1.0
    return lambda value: start + (end - start) * (of(value) - of(low)) / size


def _legend(panel: Panel, left: float, top: float, width: float) -> tuple[str, int]:
    """The legend's elements below the axes, and how many rows it has."""
    named = [line for line in panel.lines if line.label]
    if not named:
        return "", 0
    longest = max(len(line.label) for line in named) * LETTER + 34
    columns = max(min(int(width / longest), len(named)), 1)
    parts = []
    for index, line in enumerate(named):
        x, y = left + (index % columns) * width / columns, top + (index // columns) * LEGEND_HEIGHT + 10
        if panel.stacked:
            parts.append(f'<rect style="fill:{line.color}" x="{x:.1f}" y="{y - 5:.1f}" width="14" height="10"/>')
        elif line.dashes != "none":
            dashes = f' stroke-dasharray="{line.dashes}"' if line.dashes else ""
            parts.append(f'<path class="line" style="stroke:{line.color}"{dashes} d="M{x:.1f} {y:.1f}h18"/>')
        if line.marker:
            parts.append(marker(line.marker, (x + 9, y), line.color))
        parts.append(f'<text x="{x + 24:.1f}" y="{y + TEXT / 3:.1f}">{escape(line.label)}</text>')
    return "".join(parts), -(-len(named) // columns)
