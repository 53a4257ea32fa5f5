"""What the report says of the router in every re-routed layer; the rest of its panel is of the highest one."""

from collections.abc import Sequence
from typing import Any

from distill_trainer.report.chart import Panel
from distill_trainer.report.marks import Line
from distill_trainer.report.series import COLORS, History, PlotKind
from distill_trainer.report.style import EXPERT_COLORS
from distill_trainer.report.wording import percent, routed_layer

CHANGED = "other first expert than the gate"


def routing_note(report: dict[str, Any]) -> str:
    """Which layer the router's panel is of, and which gate it compares with; empty where the layer is not known."""
    layer = routed_layer(report)
    if not layer:
        return ""
    others = " The chart by layer shows the others." if several_layers(report) else ""
    return (
        f"Experts, entropy and capacity are those of {layer}, counted from 0.{others} The gate is that of the teacher "
        "as it is, without any router."
    )


def several_layers(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of every re-routed layer, from the bottom up; empty where there is one alone, or none."""
    layers = (report.get("router") or {}).get("layers") or []
    return layers if len(layers) > 1 else []


def layer_table(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Changed first experts and loads of every layer, under a row of headings; of many experts the busiest alone.

    Empty where one layer is re-routed.
    """
    layers = several_layers(report)
    count = _num_experts(layers)
    if _are_few(count):
        names = [f"expert {expert}, router / gate" for expert in range(count)]
        loads = [
            [
                f"{percent(_share(found['expert_load'], e))} / {percent(_share(found['gate_load'], e))}"
                for e in range(count)
            ]
            for found in layers
        ]
    else:
        names = ["busiest of the router", "busiest of the gate"]
        loads = [[_busiest(found["expert_load"]), _busiest(found["gate_load"])] for found in layers]
    rows = [(str(x["layer"]), percent(x["changed_fraction"]), *load) for x, load in zip(layers, loads, strict=True)]
    return [("layer", "other first", *names), *rows] if layers else []


def _layers(report: dict[str, Any], history: History, baseline_history: History) -> list[Panel]:
    layers = several_layers(report)
    if not layers:
        return []
    panels = _load_panels(layers) if _are_few(_num_experts(layers)) else [_busiest_panel(layers)]
    changed = [(found["layer"], found["changed_fraction"]) for found in layers]
    if any(share is not None for _, share in changed):
        line = Line("", changed, COLORS["student_aware_teacher"], "dot")
        panels.append(Panel([line], CHANGED, percent=True, from_zero=True, slots=True))
    panels[-1].x_label = "layer"
    return panels


def _load_panels(layers: Sequence[dict[str, Any]]) -> list[Panel]:
    """A bar per layer, cut into the experts' shares: the router's, and below them the gate's."""
    panels = []
    for key, title in (("expert_load", "router, share of routing weight"), ("gate_load", "gate, share of selections")):
        # One legend serves both.
        lines = [
            Line(
                f"expert {expert}" if key == "gate_load" else "",
                [(found["layer"], _share(found[key], expert)) for found in layers],
                EXPERT_COLORS[expert],
            )
            for expert in range(_num_experts(layers))
        ]
        panels.append(Panel(lines, title, stacked=True, slots=True, percent=True))
    return panels


def _busiest_panel(layers: Sequence[dict[str, Any]]) -> Panel:
    lines = [
        Line(name, [(found["layer"], max(_known(found[key]))) for found in layers], COLORS[role], marker)
        for key, name, role, marker in (
            ("expert_load", "router", "student", "dot"),
            ("gate_load", "gate", "teacher", "square"),
        )
    ]
    title = f"share of the busiest expert of {_num_experts(layers)}"
    return Panel(lines, title, percent=True, from_zero=True, slots=True)


def _are_few(num_experts: int) -> bool:
    return num_experts <= len(EXPERT_COLORS)


def _num_experts(layers: Sequence[dict[str, Any]]) -> int:
    return max((len(found["expert_load"]) for found in layers), default=0)


def _known(load: Sequence[float | None]) -> list[float]:
    """Shares without a value count as none."""
    return [share or 0.0 for share in load]


def _share(load: Sequence[float | None], expert: int) -> float | None:
    # Layers may have different numbers of experts.
    return load[expert] if expert < len(load) else None


def _busiest(load: Sequence[float | None]) -> str:
    shares = _known(load)
    expert = shares.index(max(shares))
    return f"{percent(shares[expert])} (expert {expert})"


LAYER_PLOT = PlotKind(
    "layers",
    "By layer",
    "In every re-routed layer the experts' loads with the router and with the gate, and how often the first differs",
    _layers,
    height=90,
    section="router",
    over_steps=False,
)
