"""Student and teacher of one batch, side by side at its anchors."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from distill_trainer.anchors import IGNORE_INDEX
from distill_trainer.router import RouterOutput
from distill_trainer.taps import TrunkOutput
from distill_trainer.teacher import TeacherOutput


@dataclass
class LayerDecision:
    """What was chosen at the anchors in one re-routed layer.

    Attributes:
        router: The router's decision.
        gate_logits: The gate's scores of what the router was asked about, `(num_anchors, num_experts)`: above another
            re-routed layer not what the gate scores in the teacher as it is.
        gate_experts: The gate's own choice in the teacher as it is, most weight first, `(num_anchors, gate_top_k)`.
    """

    router: RouterOutput
    gate_logits: Tensor
    gate_experts: Tensor


@dataclass
class RoutedBatch:
    """The student-aware teacher at the anchors of one batch.

    Attributes:
        residual: Re-routed residual stream after the last layer, `(num_anchors, teacher_hidden_size)`.
        hidden_states: Input of the teacher's head, same shape, or `(num_anchors, num_samples, teacher_hidden_size)`:
            several, whose beliefs are averaged.
        gap: KL(teacher with its own gate || student), nats, `(num_anchors,)`; None where it was not looked at.
        mask: Which of the batch's anchors these are, `(batch_size, num_anchors_in_row)`.
        decisions: By re-routed layer, from the bottom up; empty without a router.
        logits: Over the teacher's vocabulary, `(num_anchors, teacher_vocab_size)`; None in training, which never holds
            them all at once.
        layers: Re-routed residual stream after layers below the last, by layer.
    """

    residual: Tensor
    hidden_states: Tensor
    gap: Tensor | None
    mask: Tensor
    decisions: dict[int, LayerDecision] = field(default_factory=dict)
    logits: Tensor | None = None
    layers: dict[int, Tensor] = field(default_factory=dict)

    @property
    def highest(self) -> LayerDecision | None:
        """The decision in the highest re-routed layer, None without a router."""
        return self.decisions[max(self.decisions)] if self.decisions else None

    @property
    def router(self) -> RouterOutput | None:
        """The router's decision there, None without one."""
        return self.highest.router if self.highest else None

    def __getattr__(self, name: str):
        """The router's own figures, such as `selected_experts`, by their name."""
        if name in RouterOutput.__dataclass_fields__ and self.__dict__.get("decisions"):
            return getattr(self.router, name)
        raise AttributeError(name)


@dataclass
class AnchorBatch:
    """Student and teacher of one batch at its anchors.

    Attributes:
        trunk: The student's trunk.
        hidden_states: Input of the student's head where a token is predicted, the anchors first,
            `(num_positions, student_hidden_size)`.
        labels: The student's true next tokens, `(num_positions,)`.
        owner: The anchor of the span that each of them is predicted in, -1 for none, `(num_positions,)`.
        teacher: The teacher with its own gate.
        upcoming: The teacher's true next tokens at the anchors, `(num_anchors,)`.
        num_items: Predicted tokens of the whole accumulated batch, None for this batch alone.
        num_anchors: Anchors of the whole accumulated batch, None for this batch alone.
    """

    trunk: TrunkOutput
    hidden_states: Tensor
    labels: Tensor
    owner: Tensor
    teacher: TeacherOutput
    upcoming: Tensor
    num_items: Tensor | float | None = None
    num_anchors: Tensor | float | None = None

    @classmethod
    def of(cls, batch: dict[str, Tensor], trunk: TrunkOutput, teacher: TeacherOutput, **counts) -> "AnchorBatch":
        """Put both sides of a collated batch together. The shift of the labels happens here."""
        anchors, labels = teacher.anchors, batch["labels"]
        predicted = labels[:, 1:] != IGNORE_INDEX
        predicted[anchors.rows, anchors.student_positions] = False
        others = predicted.nonzero(as_tuple=True)
        rows = torch.cat([anchors.rows, others[0]])
        positions = torch.cat([anchors.student_positions, others[1]])
        return cls(
            trunk,
            trunk.last_hidden_state[rows, positions],
            labels[rows, positions + 1],
            teacher.spans.student_owner[rows, positions],
            teacher,
            batch["teacher_input_ids"][anchors.rows, anchors.teacher_positions + 1],
            **counts,
        )

    @property
    def mask(self) -> Tensor:
        """All True, `(num_anchors,)`: these anchors were selected beforehand."""
        return torch.ones_like(self.upcoming, dtype=torch.bool)

    def select(self, hidden_states: Tensor) -> Tensor:
        """Rows of a student tensor `(batch_size, sequence_length, size)` at the anchors."""
        return hidden_states[self.teacher.anchors.rows, self.teacher.anchors.student_positions]

    def teacher_state(self, layer: int, routed: RoutedBatch) -> Tensor:
        """The teacher's residual stream after a layer; the re-routed one where there is one."""
        if layer == self.teacher.last_layer:
            return routed.residual
        return routed.layers[layer] if layer in routed.layers else self.teacher.layers[layer]
