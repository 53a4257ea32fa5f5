"""The report's plots of the training, and the list of all plots."""

from collections.abc import Sequence
from typing import Any

from distill_trainer.report.chart import Panel, chart
from distill_trainer.report.marks import Line
from distill_trainer.report.router_plots import GAP_PLOTS, ROUTER_PLOTS
from distill_trainer.report.series import COLORS, History, Plot, PlotKind, series
from distill_trainer.report.wording import bits
from distill_trainer.schedules import LOSS_NAMES

STEP = "optimizer step"
LOSS_COLORS = dict(
    zip(
        LOSS_NAMES,
        ("student", "baseline", "teacher", "accent", "student_aware_teacher", "student_before"),
        strict=True,
    )
)


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
    for kind in ALL_PLOTS:
        panels = kind.panels(report, history, baseline_history)
        if panels:
            for panel in panels[-kind.columns :] if kind.over_steps else ():
                panel.x_label = STEP
            svg = chart(
                panels, kind.alt, height=kind.height, columns=kind.columns, marks=marks if kind.over_steps else ()
            )
            plots.append(Plot(kind.name, kind.title, kind.alt, svg, kind.section))
    return plots


def _bits_per_byte(report: dict[str, Any], history: History, baseline_history: History) -> list[Panel]:
    points = series(history, "eval_bits_per_byte")
    if not points:
        return []
    lines = []
    for name, role, curve in (
        ("no teacher", "baseline", series(baseline_history, "eval_bits_per_byte")),
        ("distilled", "student", points),
    ):
        if curve:
            lines.append(Line(f"{name} {curve[-1][1]:.3f}", curve, COLORS[role], marker="dot"))
    steps = [step for line in lines for step, _ in line.points]
    for role, name, dashes in (
        ("student_before", "before", "3 4"),
        ("teacher", "teacher", "9 3"),
        ("student_aware_teacher", "re-routed", "5 2"),
    ):
        level = bits(report, role)
        if level is not None:
            ends = [(min(steps), level), (max(steps), level)]
            lines.append(Line(f"{name} {level:.3f}", ends, COLORS[role], dashes=dashes))
    return [Panel(lines, "bits per byte")]


def _losses(report: dict[str, Any], history: History, baseline_history: History) -> list[Panel]:
    lines = []
    for name in LOSS_NAMES:
        # A loss that is switched off logs zeros, which a logarithm cannot show.
        points = [(step, value if value > 0 else None) for step, value in series(history, f"distill/loss_{name}")]
        if any(value for _, value in points):
            lines.append(Line(name, points, COLORS[LOSS_COLORS[name]]))
    return [Panel(lines, "loss, unweighted", log=True)] if lines else []


def _schedules(report: dict[str, Any], history: History, baseline_history: History) -> list[Panel]:
    groups = (
        ("top-k", {"distill/top_k": ""}, ("student",)),
        (
            "temperature",
            {"distill/temperature": "distillation", "distill/router_temperature": "router"},
            ("student", "student_aware_teacher"),
        ),
        ("loss weight", {f"distill/weight_{name}": name for name in LOSS_NAMES}, tuple(LOSS_COLORS.values())),
    )
    panels = []
    for title, names, colors in groups:
        # Top-k changes at a step and holds, it does not slope.
        lines = [
            Line(label, points, COLORS[color], steps=title == "top-k")
            for (key, label), color in zip(names.items(), colors, strict=True)
            if (points := series(history, key))
        ]
        if lines:
            panels.append(Panel(lines, title, from_zero=True, whole=title == "top-k"))
    return panels


TRAINING_PLOTS = (
    PlotKind(
        "bits_per_byte",
        "Bits per byte (curves: validation text, lines: test text)",
        "The student over training, beside the student without a teacher, the teacher's level and the start",
        _bits_per_byte,
        height=230,
    ),
    PlotKind("losses", "Loss parts", "Each loss over training, on a logarithmic scale", _losses, height=230),
    PlotKind(
        "schedules",
        "Schedules",
        "Top-k, temperatures and effective loss weights over training",
        _schedules,
        height=90,
    ),
)
ALL_PLOTS = (*TRAINING_PLOTS, *ROUTER_PLOTS, *GAP_PLOTS)
