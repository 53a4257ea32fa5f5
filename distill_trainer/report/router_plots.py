"""The report's plots of the router and of the gap to the teacher."""

from typing import Any

from distill_trainer.report.drawing import Drawing, legend, series
from distill_trainer.report.style import EXPERT_COLORS

OVER_TRAINING = {
    "distill/changed_fraction": "other first expert",
    "distill/router_entropy": "entropy, nats",
    "distill/capacity": "capacity",
    "distill/gap": "gap, nats",
}


def _draw_expert_load(figure, colors, report, history, baseline_history) -> bool:
    loads: list[tuple[list[float], list[float]]] = []
    while (points := series(history, f"distill/expert_load_{len(loads)}"))[0]:
        loads.append(points)
    if not loads:
        return False
    from matplotlib import colormaps

    # A legend of more experts than there are colours would be taller than the plot.
    few = len(loads) <= len(EXPERT_COLORS)
    # Not the theme's colours: they stand for models. The ends of the ramp would vanish on a dark or a light page.
    ramp = [colormaps["viridis"](0.1 + 0.65 * i / max(len(loads) - 1, 1)) for i in range(len(loads))]
    axes = figure.subplots()
    labels = [f"expert {i}" if few else "" for i in range(len(loads))]
    axes.stackplot(loads[0][0], *(values for _, values in loads), colors=EXPERT_COLORS if few else ramp, labels=labels)
    axes.set_ylim(0, 1)
    axes.margins(x=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_ylabel("share of routing weight" if few else f"share of routing weight, {len(loads)} experts")
    if few:
        legend(figure, axes, min(len(loads), 4))
    return True


def _draw_router(figure, colors, report, history, baseline_history) -> bool:
    shown = [(title, points) for key, title in OVER_TRAINING.items() if (points := series(history, key))[0]]
    # Without a router the gap alone is logged.
    if len(shown) < 2:
        return False
    panels = list(figure.subplots(-(-len(shown) // 2), 2, sharex=True, squeeze=False).flat)
    for axes, (title, points) in zip(panels, shown, strict=False):
        axes.plot(*points, color=colors[4])
        axes.set_title(title)
        axes.margins(y=0.15)
        axes.set_ylim(bottom=0)
        if title == OVER_TRAINING["distill/changed_fraction"]:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    for axes in panels[len(shown) :]:
        axes.remove()
    return True


def _draw_reliability(figure, colors, report, history, baseline_history) -> bool:
    bins = (report.get("router") or {}).get("reliability") or []
    points = [tuple(found[key] for key in ("predicted", "observed", "correct")) for found in bins]
    points = [point for point in points if None not in point]
    if not points:
        return False
    axes = figure.subplots()
    predicted, observed, correct = zip(*points, strict=True)
    end = 1.08 * max(*predicted, *observed, *correct)
    axes.plot([0, end], [0, end], color=colors[5], linewidth=1.5, dashes=(3, 2), label="perfect")
    axes.plot(predicted, correct, color=colors[4], marker="s", markersize=5, linewidth=0, label="top-1 right")
    axes.plot(predicted, observed, color=colors[0], marker="o", markersize=5, label="true token")
    axes.set_xlim(0, end)
    axes.set_ylim(0, end)
    axes.set_xlabel("estimated capacity")
    axes.set_ylabel("what the student does")
    legend(figure, axes, 3)
    return True


def _draw_gap(figure, colors, report, history, baseline_history) -> bool:
    deciles: list[dict[str, Any]] = (report.get("gap") or {}).get("deciles") or []
    axes = figure.subplots()
    lines = (
        ("before", "before", colors[5], "s"),
        ("baseline", "no teacher", colors[1], "^"),
        ("after", "distilled", colors[0], "o"),
    )
    for key, label, color, marker in lines:
        points = [(n, found[key]) for n, found in enumerate(deciles, 1) if found.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=5, label=label)
    if not axes.lines:
        return False
    axes.set_xticks(range(1, len(deciles) + 1))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("decile, by the gap before training")
    axes.set_ylabel("gap, nats")
    legend(figure, axes, 3)
    return True


ROUTER_DRAWINGS = (
    Drawing(
        "expert_load",
        "Expert load over training",
        "Share of the routing weight per expert over training",
        4.4,
        _draw_expert_load,
        "router",
    ),
    Drawing(
        "router",
        "Router over training",
        "Changed first experts, entropy, estimated capacity and knowledge gap over training",
        4.4,
        _draw_router,
        "router",
    ),
    Drawing(
        "reliability",
        "Is the capacity calibrated?",
        "What the student does at anchors of low to high estimated capacity, beside the diagonal",
        4.0,
        _draw_reliability,
        "router",
        over_steps=False,
    ),
)
GAP_DRAWINGS = (
    Drawing(
        "gap",
        "Gap to the teacher, by decile",
        "Mean gap of ten groups of anchors, from the smallest to the largest gap before training, before and after it",
        4.0,
        _draw_gap,
        "gap",
        over_steps=False,
    ),
)
