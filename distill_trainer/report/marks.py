"""What stands between a chart's axes: lines, markers, stacked areas and bars."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float | None]
# Share of its slot that a bar fills.
BAR = 0.8


@dataclass
class Line:
    """One line of a chart.

    Attributes:
        label: In the legend; empty for none.
        points: Horizontal and vertical value; a line is broken where the vertical one is None.
        color: Any CSS colour, such as `var(--student)`.
        marker: `dot`, `square`, `triangle`, or empty for none.
        dashes: SVG's `stroke-dasharray`; empty for an unbroken line, `none` for no line between the markers.
        steps: Whether a value holds until the next point.
    """

    label: str
    points: Sequence[Point]
    color: str
    marker: str = ""
    dashes: str = ""
    steps: bool = False


def curves(lines: Sequence[Line], x_at: Callable, y_at: Callable) -> Iterator[str]:
    """The lines and their markers."""
    for line in lines:
        runs: list[list[tuple[float, float]]] = [[]]
        for x, y in line.points:
            if y is None:
                runs.append([])
            else:
                runs[-1].append((x_at(x), y_at(y)))
        style = f'style="stroke:{line.color}"' + (f' stroke-dasharray="{line.dashes}"' if line.dashes else "")
        for run in runs if line.dashes != "none" else ():
            yield "".join(
                [f'<path class="line" {style} d="', *_path(run, steps=line.steps), '"/>'] if len(run) > 1 else []
            )
        known = [(x, y) for x, y in line.points if y is not None]
        # A run of one point has no line that could show it.
        alone = [place for run in runs if len(run) == 1 for place in run] if not line.marker else ()
        yield "".join(marker("dot", place, line.color) for place in alone)
        for x, y in known if line.marker else ():
            name = f"{line.label}: {y:,.4g} at {x:,.4g}".removeprefix(": ")
            yield marker(line.marker, (x_at(x), y_at(y)), line.color, name)


def _path(places: Sequence[tuple[float, float]], *, steps: bool = False) -> Iterator[str]:
    for index, (x, y) in enumerate(places):
        if not index:
            yield f"M{x:.1f} {y:.1f}"
        else:
            yield f"H{x:.1f}V{y:.1f}" if steps else f"L{x:.1f} {y:.1f}"


def marker(kind: str, place: tuple[float, float], color: str, name: str = "") -> str:
    """A `dot`, `square` or `triangle` that tells its name when it is pointed at."""
    x, y = place
    title = f"<title>{escape(name)}</title>" if name else ""
    style = f'style="fill:{color}"'
    if kind == "square":
        return f'<rect {style} x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6">{title}</rect>'
    if kind == "triangle":
        return f'<path {style} d="M{x:.1f} {y - 4:.1f}l4 7h-8z">{title}</path>'
    return f'<circle {style} cx="{x:.1f}" cy="{y:.1f}" r="3">{title}</circle>'


def areas(lines: Sequence[Line], x_at: Callable, y_at: Callable, slot: float = 0.0) -> Iterator[str]:
    """The lines laid on one another: as areas, or as bars where each value has a `slot` of the horizontal axis."""
    below = [0.0] * len(lines[0].points)
    for line in lines:
        xs = [x for x, _ in line.points]
        above = [low + (y or 0.0) for low, (_, y) in zip(below, line.points, strict=True)]
        lower, upper = list(map(y_at, below)), list(map(y_at, above))
        if slot:
            left, right = ([x_at(x + side * BAR * slot / 2) for x in xs] for side in (-1, 1))
            rows = zip(left, right, lower, upper, strict=True)
            shape = "".join(f"M{a:.1f} {low:.1f}H{b:.1f}V{high:.1f}H{a:.1f}z" for a, b, low, high in rows)
        else:
            places = list(map(x_at, xs))
            edge = list(zip(places, upper, strict=True)) + list(zip(places, lower, strict=True))[::-1]
            shape = "".join(_path(edge)) + "z"
        yield f'<path style="fill:{line.color}" d="{shape}"/>'
        below = above
