"""The panels of the HTML report on the student-aware router and on the gap between student and teacher."""

from collections.abc import Sequence
from html import escape
from typing import Any

from distill_trainer.report.elements import bar, figure, note, numbers, printable, table
from distill_trainer.report.layers import layer_table, routing_note
from distill_trainer.report.series import Plot
from distill_trainer.report.style import EXPERT_COLORS
from distill_trainer.report.tables import (
    BREAKDOWN_NOTE,
    BREAKDOWNS,
    RELIABILITY_HEADER,
    RELIABILITY_NOTE,
    breakdown_table,
    decile_note,
    decile_table,
    reliability_rows,
)
from distill_trainer.report.wording import number, percent

# More rows than this would bury the page; the busiest are shown.
MAX_EXPERT_ROWS = 16
# Lower ends of the steps in which the examples show the gap, nats.
GAP_STEPS = (0.0, 0.5, 1.0, 2.0, 4.0)
# A share that is narrower than this has no room for its number.
NARROW = 0.14
SIGNS = {"\n": "↵", "\t": "⇥"}
EXAMPLES_NOTE = (
    "From the middle of windows that lie evenly spaced over the held-out text; nothing but their length decided. Each "
    "piece of text ends where both models have read the same: the expert is the one chosen there for what comes next, "
    "and the gap is KL(teacher with its own gate || student) there. A small number stands where the expert changes; "
    "pointing at a piece shows its figures."
)


def router_panel(report: dict[str, Any], plots: Sequence[Plot], facts: str) -> str:
    """What the router does: its single figures, loads, plots and examples; empty without a router."""
    router = report.get("router") or {}
    drawn = {plot.name: plot for plot in plots if plot.section == "router"}
    below = {"reliability": note(RELIABILITY_NOTE) + numbers(RELIABILITY_HEADER, reliability_rows(report))}
    if by_layer := layer_table(report):
        below["layers"] = numbers(by_layer[0], by_layer[1:])
    figures = {name: figure(plot, below.get(name, "")) for name, plot in drawn.items()}
    before, last = [figures.get(name) for name in ("layers", "expert_load", "router")], figures.get("reliability")
    cards = "".join(filter(None, (facts, _loads(router), *before, _class_loads(router), last)))
    panel = (f"<div class=grid>{cards}</div>" if cards else "") + _examples(router)
    explanation = routing_note(report)
    head = "<h2>Student-aware router</h2>" + (note(explanation) if explanation else "")
    return head + panel if panel else ""


def gap_panel(report: dict[str, Any], plots: Sequence[Plot]) -> str:
    """Where the student came closer to the teacher; empty where nobody knows how far it was before."""
    deciles = decile_table(report)
    if not deciles:
        return ""
    header, *rows = deciles
    drawn = "".join(figure(plot) for plot in plots if plot.section == "gap")
    shown = f"<h3>Mean gap, nats</h3>{table(header, rows, 'small')}{note(decile_note(report))}"
    return f"<h2>Where the gap closed</h2><div class=grid>{drawn}<section class=card>{shown}</section></div>"


def retention_panel(report: dict[str, Any], plots: Sequence[Plot]) -> str:
    """Retention by the frequency of the next token and by position; empty where it was not measured."""
    drawn = {plot.name: plot for plot in plots if plot.section == "retention"}
    cards = ""
    for name, (title, _) in BREAKDOWNS.items():
        if rows := breakdown_table(report, name):
            shown = table(rows[0], rows[1:], "small")
            plot = figure(drawn[name], shown) if name in drawn else ""
            cards += plot or f"<section class=card><h3>{title}</h3>{shown}</section>"
    return f"<h2>Retention</h2><div class=grid>{cards}</div>{note(BREAKDOWN_NOTE)}" if cards else ""


def busiest(loads: Sequence[float], count: int) -> list[int]:
    """Numbers of the experts to show: all, in their order, or the `count` busiest, the busiest first."""
    experts = range(len(loads))
    return list(experts) if len(loads) <= count else sorted(experts, key=lambda expert: -(loads[expert] or 0))[:count]


def _loads(router: dict[str, Any]) -> str:
    """A bar per expert: the student-aware share and the gate's own."""
    loads = router.get("expert_load")
    if not loads:
        return ""
    gate = router.get("gate_load") or [None] * len(loads)
    order = busiest(loads, MAX_EXPERT_ROWS)
    are_all = len(loads) == len(order)
    # Of many experts each has so little that only bars relative to the longest can be told apart.
    longest = 1.0 if are_all else max((shares[e] or 0 for shares in (loads, gate) for e in order), default=0) or 1.0

    def row(expert: int) -> str:
        shares = loads[expert], gate[expert]
        bars = "".join(bar((x or 0) / longest, kind) for x, kind in zip(shares, ("student", "teacher"), strict=True))
        cells = "".join(f"<td>{percent(share, 0 if are_all else 1)}</td>" for share in shares)
        return f"<tr><th scope=row>{expert}</th><td>{bars}</td>{cells}</tr>"

    rows = "".join(map(row, order))
    kept = "" if are_all else f" The busiest {len(order)} of {len(loads)}; the longest bar is {percent(longest, 1)}."
    return (
        "<section class=card><h3>Expert load on held-out text</h3><table class=bars><thead><tr>"
        "<th scope=col>expert</th><td></td><th scope=col class=router>router</th><th scope=col class=gate>gate</th>"
        f"</tr></thead><tbody>{rows}</tbody></table>"
        + note(f"Router: share of the routing weight. Gate: share of the teacher's own selections.{kept}")
        + "</section>"
    )


def _class_loads(router: dict[str, Any]) -> str:
    """Two bars per class of tokens, cut into the experts' shares: the router's and the gate's."""
    classes = router.get("token_classes")
    if not classes:
        return ""
    num_experts = len(classes[0]["expert_load"])
    order = busiest(router.get("expert_load") or classes[0]["expert_load"], len(EXPERT_COLORS))
    rows, figures = [], []
    for found in classes:
        name, anchors = escape(found["name"]), number(found["anchors"])
        rows.append(
            f"<dt>{name} <span>{anchors}</span></dt><dd>{_stack('router', found['expert_load'], order)}"
            f"{_stack('gate', found['gate_load'], order)}</dd>"
        )
        pairs = (f"{percent(found['expert_load'][e])} / {percent(found['gate_load'][e])}" for e in order)
        figures.append((found["name"], anchors, *pairs))
    kept = "" if num_experts == len(order) else f" The busiest {len(order)} of {num_experts} experts, the others grey."
    return (
        "<section class=card><h3>Expert load by kind of token</h3>"
        + _expert_legend(order, num_experts)
        + f"<dl class=classes>{''.join(rows)}</dl>"
        + note(
            "The teacher's token that ends where the expert is chosen, with how many there are. Words start with a "
            f"blank before their letters; parts go on without one. Router above, gate below.{kept}"
        )
        + numbers(("class", "anchors", *(f"{expert}, router / gate" for expert in order)), figures)
        + "</section>"
    )


def _stack(label: str, loads: Sequence[float], order: Sequence[int]) -> str:
    """One bar of the experts' shares side by side; what is not in `order` comes last, in grey."""
    parts = [(f"expert {e}", f"e{slot}", loads[e] or 0) for slot, e in enumerate(order)]
    if len(order) < len(loads):
        parts.append(("others", "ex", sum(share or 0 for e, share in enumerate(loads) if e not in order)))
    cuts = "".join(
        f'<i class={slot} style="width:{100 * share:.1f}%" title="{label}, {name}: {percent(share, 1)}">'
        f"{f'{100 * share:.0f}' if share >= NARROW else ''}</i>"
        for name, slot, share in parts
        if share > 0
    )
    spoken = ", ".join(f"{name} {percent(share)}" for name, _, share in parts)
    return f'<span class="stack {label}" role=img aria-label="{label}: {spoken}">{cuts}</span>'


def _expert_legend(order: Sequence[int], num_experts: int, more: str = "") -> str:
    names = "".join(f"<li><i class=e{slot}>{expert}</i> expert {expert}</li>" for slot, expert in enumerate(order))
    others = "<li><i class=ex>n</i> others</li>" if num_experts > len(order) else ""
    return f"<ul class=legend>{names}{others}{more}</ul>"


def _examples(router: dict[str, Any]) -> str:
    """Passages twice: coloured by the routed expert, and by the gap."""
    examples = [found["tokens"] for found in router.get("examples") or [] if found.get("tokens")]
    if not examples:
        return ""
    highest = max(max(token["expert"], token["gate_expert"]) for tokens in examples for token in tokens)
    loads = router.get("expert_load") or [0.0] * (highest + 1)
    order = busiest(loads, len(EXPERT_COLORS))
    slots = {expert: f"e{slot}" for slot, expert in enumerate(order)}
    differs = "<li><i class=other>n</i> not the gate's first</li>"
    steps = "".join(
        f"<li><i class=g{step}>n</i> {_step_name(low, high)}</li>"
        for step, (low, high) in enumerate(zip(GAP_STEPS, (*GAP_STEPS[1:], None), strict=True))
    )
    pairs = "".join(
        f"<div class=pair><p dir=auto>{_by_expert(tokens, slots)}</p><p dir=auto>{_by_gap(tokens)}</p></div>"
        for tokens in examples
    )
    return (
        f"<section class=card><h3>The router in the text</h3>{note(EXAMPLES_NOTE)}<div class=pair>"
        f"<div><h4>First expert</h4>{_expert_legend(order, len(loads), differs)}</div>"
        f"<div><h4>Gap, nats</h4><ul class=legend>{steps}</ul></div></div>{pairs}</section>"
    )


def _step_name(low: float, high: float | None) -> str:
    return f"from {low:g}" if high is None else f"{low:g} to {high:g}" if low else f"below {high:g}"


def _by_expert(tokens: Sequence[dict[str, Any]], slots: dict[int, str]) -> str:
    pieces, before = [], None
    for token in tokens:
        expert, gate = token["expert"], token["gate_expert"]
        kind = slots.get(expert, "ex") + (" other" if expert != gate else "")
        # Not by colour alone: the number stands where the expert changes.
        mark = "" if expert == before else f"<sub>{expert}</sub>"
        pieces.append(_piece(token, kind, mark))
        before = expert
    return "".join(pieces)


def _by_gap(tokens: Sequence[dict[str, Any]]) -> str:
    return "".join(_piece(token, _gap_kind(token["gap"])) for token in tokens)


def _gap_kind(gap: float | None) -> str:
    return "" if gap is None else f"g{sum(gap >= low for low in GAP_STEPS[1:])}"


def _piece(token: dict[str, Any], kind: str, mark: str = "") -> str:
    """A piece of text in its colour. A blank before it stays outside, so that lines break there."""
    text, lead = token["text"], "<wbr>"
    if not text.isspace():
        lead, text = " " * text.startswith(" "), text.lstrip(" ")
    else:
        text = text.replace(" ", "␣")
    shown = printable("".join(SIGNS.get(sign, sign) for sign in text))
    title = f"expert {token['expert']}, gate {token['gate_expert']}, gap {number(token['gap'], 2)} nats"
    return f'{lead}<span class="{kind}" title="{title}">{escape(shown)}{mark}</span>'
