"""The panels of the HTML report that show text: passages with their bits per byte, and what the models write."""

from collections.abc import Sequence
from html import escape
from typing import Any

from distill_trainer.report.elements import note, printable
from distill_trainer.report.wording import ROLES, STUDENTS, number

TEXT_ROLES = ("student_before", "baseline", "student", "teacher")
SAMPLES_NOTE = (
    "Greedy: the likeliest token each time, so nothing was drawn and nothing chosen among several tries. The "
    "beginnings stand in the middle of documents that lie evenly spaced over the held-out text."
)


def passages_note(report: dict[str, Any]) -> str:
    """Which passages are shown, and how they were chosen; empty without passages."""
    passages = report.get("passages") or {}
    if not passages.get("best"):
        return ""
    return (
        f"Of {number(passages.get('compared'))} passages of the held-out text, those where the student needs the "
        "fewest and the most bits per byte more than its teacher. Below each passage: bits per byte, lower is better."
    )


def passages_panel(report: dict[str, Any]) -> str:
    """The passages on which the student comes closest to its teacher and stays farthest behind; empty without them."""
    if not (explanation := passages_note(report)):
        return ""
    groups = (("Nearest to the teacher", "best"), ("Farthest behind the teacher", "worst"))
    columns = "".join(
        f"<div><h3>{title}</h3>{''.join(map(_passage, report['passages'].get(kind) or []))}</div>"
        for title, kind in groups
        if report["passages"].get(kind)
    )
    return f"<h2>Best and worst passages</h2>{note(explanation)}<div class=grid>{columns}</div>"


def _passage(passage: dict[str, Any]) -> str:
    figures = "".join(
        f"<div><dt>{_dot(role)}{STUDENTS.get(role, role)}</dt><dd>{number(passage[role], 2)}</dd></div>"
        for role in TEXT_ROLES
        if passage.get(role) is not None
    )
    text = escape(printable(passage["text"].strip()))
    return f"<section class=card><p class=quote dir=auto>{text}</p><dl class=row>{figures}</dl></section>"


def samples_panel(report: dict[str, Any]) -> str:
    """What every model writes behind the same beginnings, side by side; empty without samples."""
    samples = report.get("samples") or []
    shown = "".join(_sample(sample) for sample in samples)
    return f"<h2>What the models write</h2>{note(SAMPLES_NOTE)}{shown}" if samples else ""


def _sample(sample: dict[str, Any]) -> str:
    cells = "".join(
        _written(_dot(role) + ROLES[role], sample[role]) for role in TEXT_ROLES if sample.get(role) is not None
    )
    cells += _written("the text itself", sample.get("continuation") or "")
    prompt = escape(printable(sample["prompt"]))
    return f"<section class=card><p class=quote dir=auto>{prompt} …</p><div class=written>{cells}</div></section>"


def _written(name: str, text: str) -> str:
    return f"<div><h4>{name}</h4><p dir=auto>{escape(printable(text.strip())) or '(nothing)'}</p></div>"


def _dot(role: str) -> str:
    """The mark of a role in its colour."""
    return f'<i class="dot {role}"></i>'


def sample_lines(sample: dict[str, Any]) -> Sequence[tuple[str, str]]:
    """Who wrote what behind a prompt, and the text itself last."""
    written = [(ROLES[role], sample[role]) for role in TEXT_ROLES if sample.get(role) is not None]
    return [*written, ("the text itself", sample.get("continuation") or "")]
