"""Where the student agrees with its teacher: by how frequent the next token is, and by how much text was read."""

from typing import Any

import torch
from torch import Tensor

from distill_trainer.anchors import IGNORE_INDEX, Anchors
from distill_trainer.evaluation.agreement import anchor_index
from distill_trainer.scoring import scored_labels

# Lower ends of the groups, in occurrences and in student tokens. The last group has no upper end.
FREQUENCIES = (1, 10, 100, 1_000, 10_000, 100_000)
POSITIONS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
STUDENTS = ("student_before", "baseline", "student")
CPU = torch.device("cpu")


def retention_breakdown(retention: dict[str, Tensor], batches: list[dict[str, Tensor]]) -> dict[str, list[dict]]:
    """Retention at anchors in groups by the true next token's frequency, and by the position in the window.

    Args:
        retention: By role, what `retention_values` gives for all batches, `(num_anchors, 3)`.
        batches: The collated batches, in the same order.

    Returns:
        `by_frequency` (occurrences of the student's true next token among the scored tokens; anchors without one are
        left out) and `by_position` (student tokens read up to the anchor): for each group that holds anchors its
        `from` and `to` (inclusive, None without end), its `anchors`, and by role the mean `kl_divergence` (nats) and
        `top1_agreement`, None where there is no such student.
    """
    next_tokens = torch.cat([_next_tokens(batch) for batch in batches])
    tokens_read = torch.cat([_tokens_read(batch) for batch in batches])
    scored = torch.cat([scored_labels(batch).flatten() for batch in batches])
    counts = torch.bincount(scored[scored != IGNORE_INDEX])
    # The token behind a window's last anchor is not scored: it belongs to no group.
    known = (next_tokens != IGNORE_INDEX) & (next_tokens < len(counts))
    frequency = torch.zeros_like(next_tokens)
    frequency[known] = counts[next_tokens[known]]
    return {
        "by_frequency": _groups(frequency, FREQUENCIES, retention),
        "by_position": _groups(tokens_read, POSITIONS, retention),
    }


def _next_tokens(batch: dict[str, Tensor]) -> Tensor:
    """The student's true next token at every anchor, -100 where none is scored, `(num_anchors,)`."""
    rows, positions = anchor_index(batch, "student", Anchors.of(batch).mask, CPU)
    upcoming = torch.nn.functional.pad(scored_labels(batch)[:, 1:], (0, 1), value=IGNORE_INDEX)
    return upcoming[rows, positions]


def _tokens_read(batch: dict[str, Tensor]) -> Tensor:
    """Real student tokens of the window up to every anchor, its own included, `(num_anchors,)`."""
    rows, positions = anchor_index(batch, "student", Anchors.of(batch).mask, CPU)
    return batch["attention_mask"].cumsum(dim=1)[rows, positions]


def _groups(values: Tensor, edges: tuple[int, ...], retention: dict[str, Tensor]) -> list[dict[str, Any]]:
    groups = []
    for low, high in zip(edges, (*edges[1:], None), strict=True):
        members = (values >= low) if high is None else (values >= low) & (values < high)
        if not members.any():
            continue
        means = {role: found[members].mean(dim=0).tolist() for role, found in retention.items()}
        groups.append(
            {
                "from": low,
                "to": None if high is None else high - 1,
                "anchors": int(members.sum()),
                **{
                    name: {role: means[role][column] if role in means else None for role in STUDENTS}
                    for column, name in enumerate(("kl_divergence", "top1_agreement"))
                },
            }
        )
    return groups
