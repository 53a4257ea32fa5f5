"""How the report names models and writes numbers, and its plain sentences: shared by terminal, Markdown and HTML."""

from typing import Any

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
    return f"python {command}" if words and words[0].endswith(".py") else command


def outcome(report: dict[str, Any]) -> str:
    """`paid`, `lost` or `draw` of distillation against fine-tuning alone, `unknown` without a baseline."""
    student, baseline = bits(report, "student"), bits(report, "baseline")
    if student is None or baseline is None:
        return "unknown"
    if abs(baseline - student) <= DRAW * baseline:
        return "draw"
    return "paid" if student < baseline else "lost"


def verdict(report: dict[str, Any]) -> str:
    """One plain sentence: did the teacher help?"""
    student, baseline = bits(report, "student"), bits(report, "baseline")
    result = outcome(report)
    if result == "unknown":
        return "No verdict: without a baseline nobody can tell whether the teacher helped. Set run_baseline to true."
    if result == "draw":
        return (
            f"A draw: the distilled student ({student:.4f} bits per byte) and the same student fine-tuned without a "
            f"teacher ({baseline:.4f}) are equally good."
        )
    if result == "paid":
        return (
            f"Distillation paid: the student needs {student:.4f} bits per byte, {baseline - student:.4f} fewer than "
            f"the same student fine-tuned on the same batches without a teacher ({baseline:.4f})."
        )
    return (
        f"Fine-tuning alone did better: without a teacher the same student needs {baseline:.4f} bits per byte on the "
        f"same batches, {student - baseline:.4f} fewer than the distilled one ({student:.4f})."
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
    retention = report.get("retention") or {}
    gap = f"The teacher knew more than the student: {teacher:.4f} against {before:.4f} bits per byte before training."
    closed, alone = retention.get("gap_closed"), retention.get("gap_closed_baseline")
    if closed is None:
        return gap
    learned = f" Distillation closed {percent(closed)} of that gap"
    return gap + learned + (f", fine-tuning alone {percent(alone)}." if alone is not None else ".")


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


def sentences(report: dict[str, Any]) -> list[str]:
    """What explains the verdict, leaving out what the report does not know."""
    return [sentence for sentence in (case_sentence(report), router_sentence(report)) if sentence]


def headline_table(report: dict[str, Any]) -> str:
    """The report's headline as plain ASCII text for a terminal: one line per model, then the verdict.

    Args:
        report: In the schema of `evaluate_models`.
    """
    header = ("held-out text", "bits/byte", "word ppl", "parameters", "text/s")
    lines = [header]
    for role, figures in model_rows(report):
        speed = short(figures.get("bytes_per_second"), "B")
        costs = (perplexity(figures.get("word_perplexity")), short(figures.get("parameters")), speed)
        lines.append((ROLES[role], number(figures["bits_per_byte"], 4), *costs))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
    rule = "-" * len(rows[0])
    return "\n".join([rows[0], rule, *rows[1:], rule, verdict(report), *sentences(report)])
