"""The report's headline for a terminal."""

from typing import Any

from distill_trainer.report.wording import ROLES, model_rows, number, perplexity, sentences, short, verdict


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
