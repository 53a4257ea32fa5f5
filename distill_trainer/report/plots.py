"""The report's plots as PNG bytes, each drawn twice: for a light and for a dark page."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from distill_trainer.report.wording import bits
from distill_trainer.schedules import LOSS_NAMES

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
# A legend of more experts than this would be taller than the plot.
MAX_NAMED_EXPERTS = 8
History = list[dict[str, Any]]


@dataclass
class Plot:
    """One plot of the report.

    Attributes:
        name: File name without theme and suffix.
        title: Heading.
        alt: What the plot shows, for those who do not see it.
        files: PNG bytes by file name, `name.png` and `name-dark.png`.
    """

    name: str
    title: str
    alt: str
    files: dict[str, bytes]


def series(history: History, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one logged metric; entries without it are skipped."""
    points = [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None and "step" in entry]
    return [step for step, _ in points], [value for _, value in points]


def draw_plots(
    report: dict[str, Any], history: History, baseline_history: History, phases: Sequence[float]
) -> list[Plot]:
    """Every plot that has something to show.

    Args:
        report: In the schema of `evaluate_models`.
        history: The distillation's log.
        baseline_history: The log of the training without a teacher. May be empty.
        phases: Fractions of the run at which later phases begin.
    """
    last = max((entry.get("step", 0) for entry in history), default=0)
    marks = [fraction * last for fraction in phases if 0 < fraction < 1]
    plots = []
    for name, title, alt, height, draw in PLOTS:
        files = {}
        for theme in THEMES:
            content = _render(draw, (report, history, baseline_history), theme, height, marks)
            if content is not None:
                files[f"{name}{theme}.png"] = content
        if files:
            plots.append(Plot(name, title, alt, files))
    return plots


def _render(
    draw: Callable[..., bool], arguments: tuple, theme: str, height: float, marks: Sequence[float]
) -> bytes | None:
    """PNG bytes of what `draw` puts on a figure, with dotted lines at `marks`; None if it says there is nothing."""
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
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        if not draw(figure, COLORS[theme], *arguments):
            return None
        for axes in figure.axes:
            for mark in marks:
                axes.axvline(mark, color=page["muted"], linewidth=1, linestyle=":")
        figure.axes[-1].set_xlabel("optimizer step")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()


def _legend(figure: Any, axes: Any, columns: int) -> None:
    """Legend of one axes under the whole figure."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, handlelength=1.5)


def _draw_bits_per_byte(figure, colors, report, history, baseline_history) -> bool:
    steps, values = series(history, "eval_bits_per_byte")
    if not steps:
        return False
    axes = figure.subplots()
    baseline_steps, baseline_values = series(baseline_history, "eval_bits_per_byte")
    curves = ((baseline_steps, baseline_values, colors[1], "no teacher"), (steps, values, colors[0], "distilled"))
    for curve_steps, curve_values, color, label in curves:
        if curve_steps:
            label = f"{label} {curve_values[-1]:.3f}"
            axes.plot(curve_steps, curve_values, color=color, marker="o", markersize=4, label=label)
    levels = (
        ("student_before", "before", colors[5], (1, 2)),
        ("teacher", "teacher", colors[2], (5, 2)),
        ("student_aware_teacher", "re-routed", colors[4], (2, 1)),
    )
    for role, label, color, dashes in levels:
        level = bits(report, role)
        if level is not None:
            axes.axhline(level, color=color, linewidth=1.5, dashes=dashes, label=f"{label} {level:.3f}")
    axes.margins(y=0.08)
    axes.set_ylabel("bits per byte")
    _legend(figure, axes, 2)
    return True


def _draw_losses(figure, colors, report, history, baseline_history) -> bool:
    axes = figure.subplots()
    for color, name in zip(colors, LOSS_NAMES, strict=True):
        steps, values = series(history, f"distill/loss_{name}")
        # A loss that is switched off logs zeros, which a logarithm cannot show.
        if any(value > 0 for value in values):
            axes.plot(steps, [value if value > 0 else float("nan") for value in values], color=color, label=name)
    if not axes.lines:
        return False
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("loss, unweighted")
    _legend(figure, axes, 3)
    return True


def _draw_expert_load(figure, colors, report, history, baseline_history) -> bool:
    loads: list[tuple[list[float], list[float]]] = []
    while (points := series(history, f"distill/expert_load_{len(loads)}"))[0]:
        loads.append(points)
    if not loads:
        return False
    from matplotlib import colormaps

    few = len(loads) <= MAX_NAMED_EXPERTS
    # Not the theme's colours: they stand for models. The ends of the ramp would vanish on a dark or a light page.
    shades = [colormaps["viridis"](0.1 + 0.65 * i / max(len(loads) - 1, 1)) for i in range(len(loads))]
    axes = figure.subplots()
    labels = [f"expert {i}" if few else "" for i in range(len(loads))]
    axes.stackplot(loads[0][0], *(values for _, values in loads), colors=shades, labels=labels)
    axes.set_ylim(0, 1)
    axes.margins(x=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_ylabel("share of routing weight" if few else f"share of routing weight, {len(loads)} experts")
    if few:
        _legend(figure, axes, min(len(loads), 4))
    return True


def _draw_schedules(figure, colors, report, history, baseline_history) -> bool:
    groups = (
        ("top-k", {"distill/top_k": "top-k"}),
        ("temperature", {"distill/temperature": "distillation", "distill/router_temperature": "router"}),
        ("loss weight", {f"distill/weight_{name}": name for name in LOSS_NAMES}),
    )
    shown = [
        (title, lines)
        for title, keys in groups
        if (lines := {label: points for key, label in keys.items() if (points := series(history, key))[0]})
    ]
    if not shown:
        return False
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, lines) in zip(panels, shown, strict=True):
        for color, (label, points) in zip(colors, lines.items(), strict=False):
            # Top-k and weights change at a step and hold, they do not slope.
            axes.plot(*points, color=color, label=label, drawstyle="steps-post" if title == "top-k" else "default")
        axes.set_title(title)
        axes.set_ylim(bottom=0)
        axes.margins(y=0.15)
        if title == "top-k":
            axes.yaxis.get_major_locator().set_params(integer=True)
        elif len(lines) > 1:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), handlelength=1)
    return True


PLOTS = (
    (
        "bits_per_byte",
        "Bits per byte (curves: validation text, lines: test text)",
        "The student over training, beside the student without a teacher, the teacher's level and the start",
        3.4,
        _draw_bits_per_byte,
    ),
    ("losses", "Loss parts", "Each loss over training, on a logarithmic scale", 3.4, _draw_losses),
    ("expert_load", "Expert load", "Share of the routing weight per expert over training", 5.2, _draw_expert_load),
    (
        "schedules",
        "Schedules",
        "Top-k, temperatures and effective loss weights over training",
        5.2,
        _draw_schedules,
    ),
)
