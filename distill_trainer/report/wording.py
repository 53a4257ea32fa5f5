"""How the report names models and writes numbers, and its plain sentences: shared by terminal, Markdown and HTML."""

import shlex
from pathlib import PurePath
from typing import Any

from distill_trainer.parsing import SETTINGS_FILE, settings_text

ROLES = {
    "student_before": "student before",
    "baseline": "student, no teacher",
    "student": "student, distilled",
    "teacher": "teacher",
    "student_aware_teacher": "teacher, student-aware",
}
# The students' names where there is little room.
STUDENTS = {"student_before": "before", "baseline": "no teacher", "student": "distilled"}
# Differences below this share of the bits per byte are called a draw.
DRAW = 0.001


def number(value: float | None, decimals: int = 0, suffix: str = "") -> str:
    """`value` with `decimals` places and thousands separators, `-` for None."""
    return "-" if value is None else f"{value:,.{decimals}f}{suffix}"


def short(value: float | None, unit: str = "") -> str:
    """`value` to three digits with a metric prefix (k, M, B), `-` for None."""
    if value is None:
        return "-"
    for size, prefix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        # The limit lies where rounding would print 1000 of the smaller prefix.
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def percent(value: float | None, decimals: int = 0) -> str:
    """A share as a percentage, `-` for None."""
    return "-" if value is None else f"{100 * value:.{decimals}f} %"


def perplexity(value: float | None) -> str:
    """A perplexity; large ones in powers of ten, since their digits mean nothing."""
    return "-" if value is None else f"{value:,.1f}" if value < 1e5 else f"{value:.1e}"


def parameters(model: dict[str, Any]) -> str:
    """Parameters of a model, and the active ones where they are fewer."""
    total, active = model.get("parameters"), model.get("active_parameters")
    return short(total) if active in (None, total) else f"{short(total)} ({short(active)} active)"


def shown_name(name: str) -> str:
    """Name of a model, or its folder's path; of an absolute path the last part, since the rest is of one machine."""
    return PurePath(name).name if PurePath(name).is_absolute() else name


def model_rows(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Role and figures of every model that was scored, in the order of the headline table."""
    rows = [(role, report.get(role) or {}) for role in ROLES]
    return [(role, figures) for role, figures in rows if figures.get("bits_per_byte") is not None]


def bits(report: dict[str, Any], role: str) -> float | None:
    """Bits per byte of one role, None where it was not scored."""
    return (report.get(role) or {}).get("bits_per_byte")


def command_line(report: dict[str, Any]) -> str:
    """The command that made the report, as it can be run again; empty where it is not known."""
    command = (report.get("environment") or {}).get("command") or ""
    words = command.split(maxsplit=1)
    return f"{_launcher(report)} {command}" if words and words[0].endswith(".py") else command


def command_again(report: dict[str, Any], folder: str = "") -> str:
    """The command that trains the same student from the settings that the run wrote into `folder`, in another one."""
    path = shlex.quote(str(PurePath(folder, SETTINGS_FILE)))
    return f"{_launcher(report)} run_distillation.py {path} --output_dir outputs/again"


def _launcher(report: dict[str, Any]) -> str:
    processes = (report.get("environment") or {}).get("processes") or 1
    return "python" if processes == 1 else f"accelerate launch --num_processes {processes}"


def settings_of(report: dict[str, Any]) -> tuple[str, str]:
    """A sentence on the run's settings, and these as a config file; both empty where they are not known."""
    settings = (report.get("environment") or {}).get("settings")
    if settings is None:
        return "", ""
    folder = str((report.get("student") or {}).get("name") or "")
    note = (
        "All settings that are not the defaults, those of the file and of the flags. The run's folder holds them as "
        f"{SETTINGS_FILE}, which trains the same student: {command_again(report, folder)}"
    )
    return note, settings_text(settings)


def outcome(report: dict[str, Any]) -> str:
    """`paid`, `lost` or `draw` of distillation against fine-tuning alone, `unknown` without a baseline.

    `worse` where no training left the student better than it was.
    """
    student, baseline = bits(report, "student"), bits(report, "baseline")
    before, ends = bits(report, "student_before"), [end for end in (student, baseline) if end is not None]
    if student is not None and before is not None and min(ends) > (1 + DRAW) * before:
        return "worse"
    if student is None or baseline is None:
        return "unknown"
    if abs(baseline - student) <= DRAW * baseline:
        return "draw"
    return "paid" if student < baseline else "lost"


def verdict(report: dict[str, Any]) -> str:
    """One plain sentence: did the teacher help?"""
    text = "text" if steps_sentence(report) else "batches"
    student, baseline = bits(report, "student"), bits(report, "baseline")
    result = outcome(report)
    if result == "unknown":
        return "No verdict: without a baseline (run_baseline) nobody can tell whether the teacher helped."
    if result == "worse":
        before = bits(report, "student_before")
        alone = "" if baseline is None else f", and fine-tuning alone {baseline:.4f}"
        return (
            f"Training made the student worse: it needed {before:.4f} bits per byte before, and needs {student:.4f} "
            f"after distillation{alone}."
        )
    if result == "draw":
        return (
            f"A draw: the distilled student ({student:.4f} bits per byte) and the same student fine-tuned without a "
            f"teacher ({baseline:.4f}) are equally good."
        )
    if result == "paid":
        return (
            f"Distillation paid: the student needs {student:.4f} bits per byte, {baseline - student:.4f} fewer than "
            f"the same student fine-tuned on the same {text} without a teacher ({baseline:.4f})."
        )
    return (
        f"Fine-tuning alone did better: without a teacher the same student needs {baseline:.4f} bits per byte on the "
        f"same {text}, {student - baseline:.4f} fewer than the distilled one ({student:.4f})."
    )


def case_sentence(report: dict[str, Any]) -> str:
    """One plain sentence: does the teacher know more than the student, and how much of it was learned?"""
    before, teacher = bits(report, "student_before"), bits(report, "teacher")
    if before is None or teacher is None:
        return ""
    if before <= teacher:
        return (
            f"The teacher predicts this text no better ({teacher:.4f} bits per byte) than the student did before "
            f"training ({before:.4f}): there was little to learn from it."
        )
    gap = f"The teacher knew more than the student: {teacher:.4f} against {before:.4f} bits per byte before training."
    retention = report.get("retention") or {}
    ends = (
        ("Distillation", bits(report, "student"), retention.get("gap_closed")),
        ("fine-tuning alone", bits(report, "baseline"), retention.get("gap_closed_baseline")),
    )
    learned = [f"{way} {_end(end, closed, before, teacher)}" for way, end, closed in ends if None not in (end, closed)]
    return f"{gap} {', '.join(learned)}." if learned else gap


def _end(end: float, closed: float, before: float, teacher: float) -> str:
    """Where a training ended: between the student's start and its teacher, or beyond one of them."""
    if end > before:
        return f"ended {end - before:.4f} worse than that start"
    if end < teacher:
        return f"ended {teacher - end:.4f} better than the teacher"
    return f"closed {percent(closed)} of that gap"


def steps_sentence(report: dict[str, Any]) -> str:
    """One plain sentence: after which step each training ended, and which is scored; empty if all is the last one."""
    steps = (report.get("data") or {}).get("steps") or {}
    ways = {"distillation": steps.get("student"), "fine-tuning alone": steps.get("baseline")}
    known = {way: found for way, found in ways.items() if found}
    if all(found["scored"] == steps["planned"] for found in known.values()):
        return ""
    planned, rule = number(steps["planned"]), ", each by its own evaluations" if len(known) > 1 else ""
    stopped = any(found["ended"] < steps["planned"] for found in known.values())
    parts = [
        f"{way} ended after step {number(found['ended'])} of {planned}, scored is step {number(found['scored'])}"
        for way, found in known.items()
    ]
    return f"{'Early stopping' if stopped else 'Best checkpoint'}{rule}: {'; '.join(parts)}."


def routed_layer(report: dict[str, Any]) -> str:
    """Name of the layer that the router's figures are of, by its number from 0; empty where it is not known."""
    layers = (report.get("router") or {}).get("layers") or []
    if not layers:
        return ""
    name = f"layer {layers[-1]['layer']}"
    return name if len(layers) == 1 else f"{name}, the highest of {len(layers)} re-routed"


def router_sentence(report: dict[str, Any]) -> str:
    """One plain sentence: what the student-aware router does to the teacher. Empty without a router."""
    router, plain, aware = report.get("router"), bits(report, "teacher"), bits(report, "student_aware_teacher")
    if not router or plain is None or aware is None:
        return ""
    same = abs(aware - plain) <= DRAW * plain
    effect = (
        "leaves the teacher as good as it was"
        if same
        else "makes the teacher itself " + ("better" if aware < plain else "worse")
    )
    layer = routed_layer(report)
    where = f"In {layer}, it" if "," in layer else f"In {layer} it" if layer else "It"
    return (
        f"The student-aware router {effect}: {aware:.4f} against {plain:.4f} bits per byte. {where} picks another "
        f"first expert than the teacher's own gate at {percent(router.get('changed_fraction'))} of the anchors."
    )


def unscored_sentence(report: dict[str, Any]) -> str:
    """One plain sentence: how much of the held-out text was not scored; empty if all was, or if it is not known."""
    data = report.get("data") or {}
    held_out, scored = data.get("eval_bytes"), data.get("scored_bytes")
    if held_out is None or scored is None or scored >= held_out:
        return ""
    return (
        f"{number(held_out - scored)} of {number(held_out)} held-out bytes were left out, for every model alike: no "
        f"window of {number(data.get('eval_max_length'))} student tokens holds them, up to the next place where both "
        "tokenizers cut, with text before them."
    )


def sentences(report: dict[str, Any]) -> list[str]:
    """What explains the verdict, leaving out what the report does not know."""
    found = (case_sentence(report), steps_sentence(report), router_sentence(report), unscored_sentence(report))
    return [sentence for sentence in found if sentence]
