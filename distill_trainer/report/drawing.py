"""What every plot of the report shares: its two themes, its size, and how it becomes PNG bytes."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

THEMES = {
    "": {"page": "#ffffff", "text": "#1f2933", "muted": "#5f6b7a", "grid": "#e3e7ec"},
    "-dark": {"page": "#171c23", "text": "#e6eaf0", "muted": "#9aa7b5", "grid": "#2b333d"},
}
COLORS = {
    "": ("#2563eb", "#d97706", "#0f9d74", "#db2777", "#7c3aed", "#64748b"),
    "-dark": ("#6aa5ff", "#f5b045", "#3ccf9f", "#f47bb5", "#ab8dff", "#94a3b8"),
}
# Small figures with the page's own type size: they stay readable when a phone scales them to 330 pixels.
WIDTH_INCHES, DOTS_PER_INCH = 4.8, 200
History = list[dict[str, Any]]


@dataclass
class Plot:
    """One plot of the report.

    Attributes:
        name: File name without theme and suffix.
        title: Heading.
        alt: What the plot shows, for those who do not see it.
        files: PNG bytes by file name, `name.png` and `name-dark.png`.
        section: Part of the page that it belongs to.
    """

    name: str
    title: str
    alt: str
    files: dict[str, bytes]
    section: str = "training"


@dataclass
class Drawing:
    """How one plot is made.

    Attributes:
        name: See `Plot`.
        title: See `Plot`.
        alt: See `Plot`.
        height: Inches.
        draw: Called with a figure, the theme's colours, the report and the logs of the distillation and of the
            training without a teacher; False if there is nothing to show.
        section: See `Plot`.
        over_steps: Whether the horizontal axis is that of the optimizer steps.
    """

    name: str
    title: str
    alt: str
    height: float
    draw: Callable[..., bool]
    section: str = "training"
    over_steps: bool = True


def series(history: History, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one logged metric; entries without it are skipped."""
    points = [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None and "step" in entry]
    return [step for step, _ in points], [value for _, value in points]


def render(drawing: Drawing, arguments: tuple, theme: str, marks: Sequence[float]) -> bytes | None:
    """PNG bytes of a plot, with dotted lines at the steps `marks`; None if there is nothing to show."""
    # Figure without pyplot draws with Agg on any machine and touches no global state.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    page = THEMES[theme]
    style: dict[Any, Any] = {
        "figure.facecolor": page["page"],
        "axes.facecolor": page["page"],
        "savefig.facecolor": page["page"],
        "text.color": page["text"],
        "axes.labelcolor": page["muted"],
        "axes.edgecolor": page["grid"],
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "grid.color": page["grid"],
        "xtick.color": page["muted"],
        "ytick.color": page["muted"],
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
        "font.size": 10,
        "legend.fontsize": 10,
        "legend.frameon": False,
        "lines.linewidth": 2,
        "lines.solid_capstyle": "round",
    }
    with rc_context(style):
        figure = Figure(figsize=(WIDTH_INCHES, drawing.height), layout="constrained")
        if not drawing.draw(figure, COLORS[theme], *arguments):
            return None
        for axes in figure.axes if drawing.over_steps else ():
            for mark in marks:
                axes.axvline(mark, color=page["muted"], linewidth=1, linestyle=":")
            if axes.get_subplotspec().is_last_row():
                axes.set_xlabel("optimizer step")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()


def legend(figure: Any, axes: Any, columns: int) -> None:
    """Legend of one axes under the whole figure."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, handlelength=1.5)
