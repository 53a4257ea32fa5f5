"""What every plot of the report shares: where its values come from, its colours, and what becomes of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distill_trainer.report.chart import Panel

History = list[dict[str, Any]]
# By role, and one more; the style sheet gives each a tone for light and one for dark pages.
COLORS = {
    "student_before": "var(--before)",
    "baseline": "var(--baseline)",
    "student": "var(--student)",
    "teacher": "var(--teacher)",
    "student_aware_teacher": "var(--aware)",
    "accent": "var(--accent)",
}


@dataclass
class Plot:
    """One plot of the report.

    Attributes:
        name: Its file's name without suffix.
        title: Heading.
        alt: What the plot shows, for those who do not see it.
        svg: The drawing, an `svg` element.
        section: Part of the page that it belongs to.
    """

    name: str
    title: str
    alt: str
    svg: str
    section: str = "training"


@dataclass
class PlotKind:
    """How one plot is made.

    Attributes:
        name: See `Plot`.
        title: See `Plot`.
        alt: See `Plot`.
        panels: Called with the report and the logs of the distillation and of the training without a teacher; gives
            no panels if there is nothing to show.
        height: Of each panel.
        columns: Panels side by side.
        section: See `Plot`.
        over_steps: Whether the horizontal axis is that of the optimizer steps.
    """

    name: str
    title: str
    alt: str
    panels: Callable[[dict[str, Any], History, History], list[Panel]]
    height: int = 170
    columns: int = 1
    section: str = "training"
    over_steps: bool = True


def series(history: History, key: str) -> list[tuple[float, float]]:
    """Steps and values of one logged metric; entries without it are skipped."""
    return [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None and "step" in entry]
