"""Which figures the report lists beside its headline, under which names: shared by Markdown and HTML."""

from typing import Any

from distill_trainer.report.wording import (
    ROLES,
    STUDENTS,
    bits,
    model_rows,
    number,
    percent,
    perplexity,
    routed_layer,
    short,
    shown_name,
)

RELIABILITY_HEADER = ("estimated capacity", "true token", "top-1 right", "anchors")
RELIABILITY_NOTE = (
    "Anchors sorted by the capacity that the router estimates, in ten groups of equal size. On the line the estimate "
    "is what the student then gives the true next token on average, below it the estimate is too high. It was fitted "
    "to the training text while that was new to the student."
)

TOKEN_HEADER = (
    *("model", "name", "token perplexity", "tokens read per second", "tokens written per second"),
    *("text written per second", "on disk", "peak memory"),
)

FOOTNOTE = (
    "Every model is scored on the same bytes of held-out text. Bits per byte (lower is better) and word perplexity "
    "compare models with different tokenizers; token perplexity does not. Speed is the forward pass, or greedy "
    "generation behind a prompt of the same text, all models in the same dtype. Memory on a CPU is that of the whole "
    "process."
)


def sections(report: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The report's lists of single figures, as (title, [(name, value)]), without the empty ones."""
    compression, retention = report.get("compression") or {}, report.get("retention") or {}
    router, attention = report.get("router") or {}, report.get("attention") or {}
    saved = compression.get("size_reduction")
    found = [
        (
            "Compression",
            [
                ("teacher parameters per student parameter", number(compression.get("parameter_ratio"), 2)),
                ("memory of the weights saved", percent(saved)),
                ("speed-up, per byte of text", number(compression.get("speedup"), 2, "×")),
                ("speed-up of generation, per byte", number(compression.get("generation_speedup"), 2, "×")),
            ],
        ),
        (
            "Retention",
            [
                ("gap to the teacher closed", percent(retention.get("gap_closed"), 1)),
                ("the same without a teacher", percent(retention.get("gap_closed_baseline"), 1)),
                ("KL(teacher || student), nats", number(retention.get("kl_divergence"), 4)),
                ("same first token", percent(retention.get("top1_agreement"), 1)),
                ("shared top-5 tokens", percent(retention.get("top5_overlap"), 1)),
                ("attention similarity, last layers", number(attention.get("similarity"), 3)),
            ],
        ),
        (
            "Router",
            [
                ("layer", routed_layer(report).removeprefix("layer ") or "-"),
                ("experts per anchor (top-k)", number(router.get("top_k"))),
                ("other first expert than the gate", percent(router.get("changed_fraction"), 1)),
                ("entropy, nats", number(router.get("entropy"), 3)),
                ("estimated capacity, mean", number(router.get("capacity"), 3)),
                ("calibration error of the capacity", number(router.get("calibration_error"), 4)),
                ("knowledge gap, nats, mean", number(router.get("gap"), 3)),
                ("student-aware teacher, bits per byte", number(bits(report, "student_aware_teacher"), 4)),
            ],
        ),
        ("Data", _data_rows(report.get("data") or {})),
        ("Environment", _environment_rows(report.get("environment") or {})),
    ]
    # A row without a figure says nothing; a section without rows is left out.
    kept = [(title, [(name, value) for name, value in rows if value != "-"]) for title, rows in found]
    return [(title, rows) for title, rows in kept if rows]


def _data_rows(data: dict[str, Any]) -> list[tuple[str, str]]:
    names = {
        "train_documents": "training documents",
        "train_bytes": "training bytes",
        "eval_documents": "held-out documents",
        "eval_bytes": "held-out bytes",
        "scored_bytes": "held-out bytes scored",
        "eval_max_length": "student tokens in a scored window",
        "eval_stride": "of these scored, the rest is context",
    }
    rows = [("datasets", ", ".join(map(str, data.get("datasets") or [])) or "-")]
    rows += [(label, number(data.get(key))) for key, label in names.items()]
    rows.append(("student tokens that are anchors", percent(data.get("anchor_fraction"), 1)))
    dropped = data.get("dropped") or {}
    return rows + [(f"dropped: {reason.replace('_', ' ')}", number(count)) for reason, count in dropped.items()]


def _environment_rows(environment: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for key, value in environment.items():
        if key == "versions":
            rows.append((key, ", ".join(f"{name} {found}" for name, found in (value or {}).items() if found)))
        elif key.endswith("seconds"):
            rows.append((key.replace("_", " "), number(value, 1)))
        elif key not in ("command", "settings") and value is not None:
            rows.append((key.replace("_", " "), str(value)))
    return rows


def token_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Name, token perplexity, tokens per second read and written, and memory of every scored model."""
    return [
        (
            ROLES[role],
            shown_name(str(figures["name"])),
            perplexity(figures.get("token_perplexity")),
            short(figures.get("tokens_per_second")),
            short(figures.get("generated_tokens_per_second")),
            short(figures.get("generated_bytes_per_second"), "B/s"),
            number(figures.get("disk_mb"), 1, " MB"),
            number(figures.get("peak_memory_mb"), 0, " MB"),
        )
        for role, figures in model_rows(report)
        if "name" in figures
    ]


def benchmark_table(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Scores on the harness's tasks with their standard errors, a column per student, under a row of headings.

    Empty without benchmarks.
    """
    rows = (report.get("benchmarks") or {}).get("rows") or []
    roles = [role for role in ROLES if rows and role in rows[0]["scores"]]
    header = ("task", "metric", "shots", "examples", *(ROLES[role] for role in roles))
    lines = [
        (
            str(row["task"]),
            _metric_name(row),
            number(row["num_fewshot"]),
            number(row["samples"]),
            *(_with_error(row["scores"][role]) for role in roles),
        )
        for row in rows
    ]
    return [header, *lines] if lines else []


def _metric_name(row: dict[str, Any]) -> str:
    direction = {True: " (higher is better)", False: " (lower is better)"}.get(row["higher_is_better"], "")
    # The harness calls a metric without a filter so.
    return row["metric"] + ("" if row["filter"] == "none" else f", {row['filter']}") + direction


def _with_error(score: dict[str, float | None]) -> str:
    stderr = score["stderr"]
    return number(score["value"], 4) + ("" if stderr is None else f" ± {number(stderr, 4)}")


def benchmark_note(report: dict[str, Any]) -> str:
    """By what the benchmarks were measured, on how much of them, and which have no score; empty without them."""
    benchmarks = report.get("benchmarks") or {}
    unscored = ", ".join(benchmarks.get("unscored") or [])
    if not unscored and not benchmarks.get("rows"):
        return ""
    limit = benchmarks.get("limit")
    part = "" if limit is None else f" Only the first {number(limit)} examples of each task: not a published figure."
    absent = f" It gave no score for {unscored}." if unscored else ""
    return f"Measured by EleutherAI's lm_eval {benchmarks['harness']}, ± standard error.{part}{absent}"


def reliability_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """What the router estimates and what the student does, from the lowest capacity to the highest."""
    return [
        (
            number(found["predicted"], 3),
            number(found["observed"], 3),
            percent(found["correct"], 1),
            number(found["anchors"]),
        )
        for found in (report.get("router") or {}).get("reliability") or []
    ]


def decile_table(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Mean gap in nats of each decile, the smallest gap before training first, under a row of headings.

    Without the column of a model that was not measured; empty without deciles.
    """
    deciles = (report.get("gap") or {}).get("deciles") or []
    names = {"before": "before", "baseline": "no teacher", "after": "distilled"}
    shown = {key: name for key, name in names.items() if any(found.get(key) is not None for found in deciles)}
    rows = [
        (str(decile), *(number(found.get(key), 3) for key in shown), number(found.get("anchors")))
        for decile, found in enumerate(deciles, 1)
    ]
    return [("decile", *shown.values(), "anchors"), *rows] if shown else []


BREAKDOWNS = {
    "by_frequency": ("By frequency of the next token", "occurrences"),
    "by_position": ("By position in the window", "tokens read"),
}
BREAKDOWN_NOTE = (
    "Mean KL(teacher || student) in nats at the anchors of each group, and how often both models put the same token "
    "first. The frequency is that of the student's true next token in the scored text; the position counts the "
    "student's tokens from the beginning of its window."
)


def breakdown_table(report: dict[str, Any], name: str) -> list[tuple[str, ...]]:
    """Gap and agreement of the students in the groups `name`, under a row of headings; empty without groups."""
    groups = (report.get("retention") or {}).get(name) or []
    shown = [r for r in STUDENTS if any(found["kl_divergence"].get(r) is not None for found in groups)]
    rows = [
        (
            _range(found["from"], found["to"]),
            *(number(found["kl_divergence"].get(role), 3) for role in shown),
            percent(found["top1_agreement"].get("student"), 1),
            number(found["anchors"]),
        )
        for found in groups
    ]
    header = (BREAKDOWNS[name][1], *(STUDENTS[role] for role in shown), "same first", "anchors")
    return [header, *rows] if groups else []


def _range(low: int, high: int | None) -> str:
    return f"from {low:,}" if high is None else f"{low:,}" if high == low else f"{low:,} to {high:,}"


def decile_note(report: dict[str, Any]) -> str:
    """What the deciles of the gap say and what they do not; empty without them."""
    deciles = (report.get("gap") or {}).get("deciles")
    if not deciles:
        return ""
    note = (
        "KL(teacher || student) on held-out text, in ten equal groups sorted by the gap before training. Groups that "
        "are sorted like this fall at the end and rise at the start whatever changes (regression to the mean): "
    )
    if all(found.get("baseline") is None for found in deciles):
        return note + "without a student trained without a teacher nobody can tell how much of the change is that."
    return note + "read the distance between the two trained students, not the fall from before."
