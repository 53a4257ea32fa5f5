"""The anchors of a batch, and the tokens between them."""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass
class Anchors:
    """The anchors of a batch from which there is something to learn: those with a next token. One entry each.

    Attributes:
        mask: True where the batch's `[batch_size, num_anchors]` tensors hold such an anchor.
        rows: Row of the batch, `(num_anchors,)`.
        student_positions: Position in the student's tokens, `(num_anchors,)`.
        teacher_positions: Position in the teacher's tokens, `(num_anchors,)`.
        same_next: True where the next token of both sides ends at the same place: both predict the same bytes.
    """

    mask: Tensor
    rows: Tensor
    student_positions: Tensor
    teacher_positions: Tensor
    same_next: Tensor

    @classmethod
    def of(cls, batch: dict[str, Tensor]) -> "Anchors":
        """The anchors of a collated batch, in row order."""
        students, teachers, present = batch["student_positions"], batch["teacher_positions"], batch["anchor_mask"]
        # Position 0 of `upcoming` is the label that follows position 0: the only place that shifts anchors.
        upcoming = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
        mask = present & upcoming.gather(1, students).ne(IGNORE_INDEX)
        same_next = torch.zeros_like(mask)
        same_next[:, :-1] = (
            present[:, 1:] & (students[:, 1:] == students[:, :-1] + 1) & (teachers[:, 1:] == teachers[:, :-1] + 1)
        )
        return cls(mask, mask.nonzero()[:, 0], students[mask], teachers[mask], same_next[mask])

    def __len__(self) -> int:
        return len(self.rows)


@dataclass
class Spans:
    """From each anchor to the next one of its row: the same text on both sides, in one or several tokens.

    An inner token is predicted inside a span, where the other model has not read the same text.

    Attributes:
        complete: True where the row has a next anchor, `(num_anchors,)`.
        one_student_token: True where the student's side of a complete span is a single token, `(num_anchors,)`.
        student_owner: For every student position the anchor whose span predicts from there, -1 where none does,
            `(batch_size, sequence_length)`.
        teacher_rows: Row of each inner position of the teacher, `(num_inner,)`.
        teacher_positions: The position, `(num_inner,)`.
        teacher_owner: The anchor of its span, `(num_inner,)`.
        teacher_targets: The teacher's token that follows it, `(num_inner,)`.
    """

    complete: Tensor
    one_student_token: Tensor
    student_owner: Tensor
    teacher_rows: Tensor
    teacher_positions: Tensor
    teacher_owner: Tensor
    teacher_targets: Tensor

    @classmethod
    def of(cls, batch: dict[str, Tensor], anchors: Anchors) -> "Spans":
        """The spans that start at `anchors`, which are those of the collated batch."""
        students, present = batch["student_positions"], batch["anchor_mask"]
        complete, single = torch.zeros_like(present), torch.zeros_like(present)
        complete[:, :-1] = present[:, 1:]
        single[:, :-1] = present[:, 1:] & (students[:, 1:] == students[:, :-1] + 1)
        complete, single = complete[anchors.mask], single[anchors.mask]

        student_owner = _owners(students, present, anchors.mask, complete, batch["input_ids"].shape)
        teacher_ids = batch["teacher_input_ids"]
        teacher_owner = _owners(batch["teacher_positions"], present, anchors.mask, complete, teacher_ids.shape)
        inner = teacher_owner >= 0
        inner[anchors.rows, anchors.teacher_positions] = False
        rows, positions = inner.nonzero(as_tuple=True)
        return cls(
            complete, single, student_owner, rows, positions, teacher_owner[inner], teacher_ids[rows, positions + 1]
        )

    def inner_sums(self, per_inner: Tensor) -> Tensor:
        """Sum of a value of the teacher's inner tokens, `(num_inner,)`, over each span, `(num_anchors,)`."""
        return per_inner.new_zeros(len(self.complete)).index_add(0, self.teacher_owner, per_inner)

    @property
    def num_inner(self) -> Tensor:
        """The teacher's inner tokens in each span, `(num_anchors,)`."""
        return torch.bincount(self.teacher_owner, minlength=len(self.complete))


def _owners(positions: Tensor, present: Tensor, mask: Tensor, complete: Tensor, shape: torch.Size) -> Tensor:
    """For every position of a side the anchor of the complete span around it, -1 where there is none."""
    # Index among the anchors in use of every anchor of the batch; -1 for those without a next token or next anchor.
    used = (mask.flatten().cumsum(0) - 1).view_as(mask)
    used = used.masked_fill(~mask, -1)
    used[mask] = used[mask].masked_fill(~complete, -1)
    # The latest anchor at or before each position, as its place in the row; 0 stands for none.
    latest = torch.zeros(shape, dtype=torch.long, device=positions.device)
    place = torch.arange(1, mask.shape[1] + 1, device=positions.device).expand_as(mask)
    rows = present.nonzero()[:, 0]
    latest[rows, positions[present]] = place[present]
    latest = latest.cummax(dim=1).values
    return torch.nn.functional.pad(used, (1, 0), value=-1).gather(1, latest)
