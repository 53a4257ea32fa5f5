"""The report's plots of the router, and of retention: of the gap by decile, by frequency and by position."""

from collections.abc import Callable
from typing import Any

from distill_trainer.report.chart import Panel
from distill_trainer.report.layers import LAYER_PLOT
from distill_trainer.report.marks import Line
from distill_trainer.report.series import COLORS, History, PlotKind, series
from distill_trainer.report.style import EXPERT_COLORS
from distill_trainer.report.wording import STUDENTS, short

OVER_TRAINING = {
    "distill/changed_fraction": "other first expert",
    "distill/router_entropy": "entropy, nats",
    "distill/capacity": "capacity",
    "distill/gap": "gap, nats",
}


def _expert_load(report: dict[str, Any], history: History, baseline_history: History) -> list[Panel]:
    loads: list[list[tuple[float, float]]] = []
    while points := series(history, f"distill/expert_load_{len(loads)}"):
        loads.append(points)
    if not loads:
        return []
    # A legend of more experts than there are colours would be taller than the plot.
    few = len(loads) <= len(EXPERT_COLORS)
    ramp = [f"hsl({270 - 210 * i / len(loads):.0f} 42% 55%)" for i in range(len(loads))]
    lines = [
        Line(f"expert {i}" if few else "", points, EXPERT_COLORS[i] if few else ramp[i])
        for i, points in enumerate(loads)
    ]
    title = "share of routing weight" + ("" if few else f", {len(loads)} experts")
    return [Panel(lines, title, stacked=True, percent=True)]


def _router(report: dict[str, Any], history: History, baseline_history: History) -> list[Panel]:
    color = COLORS["student_aware_teacher"]
    shown = [(key, points) for key in OVER_TRAINING if (points := series(history, key))]
    # Without a router the gap alone is logged.
    if len(shown) < 2:
        return []
    return [
        Panel([Line("", points, color)], OVER_TRAINING[key], percent=key == "distill/changed_fraction", from_zero=True)
        for key, points in shown
    ]


def _reliability(report: dict[str, Any], history: History, baseline_history: History) -> list[Panel]:
    bins = (report.get("router") or {}).get("reliability") or []
    points = [tuple(found[key] for key in ("predicted", "observed", "correct")) for found in bins]
    points = [point for point in points if None not in point]
    if not points:
        return []
    end = max(value for point in points for value in point)
    lines = [
        Line("perfect", [(0.0, 0.0), (end, end)], COLORS["student_before"], dashes="4 3"),
        Line("top-1 right", [(p[0], p[2]) for p in points], COLORS["student_aware_teacher"], "square", "none"),
        Line("true token", [(p[0], p[1]) for p in points], COLORS["student"], "dot"),
    ]
    return [Panel(lines, "what the student does", "estimated capacity", x_from_zero=True)]


def _gap(report: dict[str, Any], history: History, baseline_history: History) -> list[Panel]:
    deciles: list[dict[str, Any]] = (report.get("gap") or {}).get("deciles") or []
    lines = []
    for key, label, role, marker in (
        ("before", "before", "student_before", "square"),
        ("baseline", "no teacher", "baseline", "triangle"),
        ("after", "distilled", "student", "dot"),
    ):
        points = [(n, found[key]) for n, found in enumerate(deciles, 1) if found.get(key) is not None]
        if points:
            lines.append(Line(label, points, COLORS[role], marker))
    names = [str(n) for n in range(1, len(deciles) + 1)]
    label = "decile, by the gap before training"
    return [Panel(lines, "gap, nats", label, from_zero=True, x_names=names)] if lines else []


def _breakdown(name: str, x_label: str) -> Callable[..., list[Panel]]:
    """How the retention in the groups `name` is drawn."""

    def panels(report: dict[str, Any], history: History, baseline_history: History) -> list[Panel]:
        groups = (report.get("retention") or {}).get(name) or []
        lines = []
        for (role, label), marker in zip(STUDENTS.items(), ("square", "triangle", "dot"), strict=True):
            values = [(n, found["kl_divergence"].get(role)) for n, found in enumerate(groups, 1)]
            if any(value is not None for _, value in values):
                lines.append(Line(label, values, COLORS[role], marker))
        names = [short(found["from"]) for found in groups]
        return [Panel(lines, "gap, nats", x_label, from_zero=True, x_names=names)] if lines else []

    return panels


ROUTER_PLOTS = (
    LAYER_PLOT,
    PlotKind(
        "expert_load",
        "Expert load over training",
        "Share of the routing weight per expert over training",
        _expert_load,
        height=220,
        section="router",
    ),
    PlotKind(
        "router",
        "Router over training",
        "Changed first experts, entropy, estimated capacity and knowledge gap over training",
        _router,
        height=100,
        columns=2,
        section="router",
    ),
    PlotKind(
        "reliability",
        "Is the capacity calibrated?",
        "What the student does at anchors of low to high estimated capacity, beside the diagonal",
        _reliability,
        height=230,
        section="router",
        over_steps=False,
    ),
)
GAP_PLOTS = (
    PlotKind(
        "gap",
        "Gap to the teacher, by decile",
        "Mean gap of ten groups of anchors, from the smallest to the largest gap before training, before and after it",
        _gap,
        height=230,
        section="gap",
        over_steps=False,
    ),
    PlotKind(
        "by_frequency",
        "Gap by frequency of the next token",
        "Mean gap of each student at anchors before rare to frequent tokens",
        _breakdown("by_frequency", "occurrences of the token, at least"),
        height=200,
        section="retention",
        over_steps=False,
    ),
    PlotKind(
        "by_position",
        "Gap by position in the window",
        "Mean gap of each student from the beginning of a window to its end",
        _breakdown("by_position", "student tokens read, at least"),
        height=200,
        section="retention",
        over_steps=False,
    ),
)
