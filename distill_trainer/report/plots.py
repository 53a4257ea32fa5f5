"""The report's plots of the training, and the list of all plots."""

from collections.abc import Sequence
from typing import Any

from distill_trainer.report.drawing import THEMES, Drawing, History, Plot, legend, render, series
from distill_trainer.report.router_plots import GAP_DRAWINGS, ROUTER_DRAWINGS
from distill_trainer.report.wording import bits
from distill_trainer.schedules import LOSS_NAMES


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
    for drawing in (*TRAINING_DRAWINGS, *ROUTER_DRAWINGS, *GAP_DRAWINGS):
        files = {}
        for theme in THEMES:
            content = render(drawing, (report, history, baseline_history), theme, marks)
            if content is not None:
                files[f"{drawing.name}{theme}.png"] = content
        if files:
            plots.append(Plot(drawing.name, drawing.title, drawing.alt, files, drawing.section))
    return plots


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
    legend(figure, axes, 2)
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
    legend(figure, axes, 3)
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


TRAINING_DRAWINGS = (
    Drawing(
        "bits_per_byte",
        "Bits per byte (curves: validation text, lines: test text)",
        "The student over training, beside the student without a teacher, the teacher's level and the start",
        3.4,
        _draw_bits_per_byte,
    ),
    Drawing("losses", "Loss parts", "Each loss over training, on a logarithmic scale", 3.4, _draw_losses),
    Drawing(
        "schedules", "Schedules", "Top-k, temperatures and effective loss weights over training", 5.2, _draw_schedules
    ),
)
