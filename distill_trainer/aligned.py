"""Student and teacher of one batch, side by side at its anchors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill_trainer.router import RouterOutput
from distill_trainer.taps import TrunkOutput
from distill_trainer.teacher import TeacherOutput


@dataclass
class RoutedBatch:
    """The student-aware teacher at the anchors of one batch.

    Attributes:
        logits: Over the teacher's vocabulary, `(num_anchors, teacher_vocab_size)`.
        logprobs: Over the student's vocabulary, `(num_anchors, student_vocab_size)`.
        residual: Re-routed residual stream after the last layer, `(num_anchors, teacher_hidden_size)`.
        gap: KL(teacher with its own gate || student), nats, `(num_anchors,)`.
        mask: Which of the batch's anchors these are, `(batch_size, num_anchors_in_row)`.
        router: The router's decision, None without a router.
        gate_logits: The gate's scores, None without a router, `(num_anchors, num_experts)`.
        gate_experts: The gate's own choice, None without a router, `(num_anchors, gate_top_k)`.
    """

    logits: Tensor
    logprobs: Tensor
    residual: Tensor
    gap: Tensor
    mask: Tensor
    router: RouterOutput | None = None
    gate_logits: Tensor | None = None
    gate_experts: Tensor | None = None

    def __getattr__(self, name: str):
        """The router's own figures, such as `selected_experts`, by their name."""
        if name in RouterOutput.__dataclass_fields__ and self.__dict__.get("router") is not None:
            return getattr(self.router, name)
        raise AttributeError(name)


@dataclass
class AnchorBatch:
    """Student and teacher of one batch at its anchors.

    Attributes:
        trunk: The student's trunk.
        logits: The student's logits, `(num_anchors, student_vocab_size)`.
        targets: The student's true next tokens, `(num_anchors,)`.
        teacher: The teacher with its own gate.
        num_anchors: Anchors of the whole accumulated batch, None for this batch alone.
    """

    trunk: TrunkOutput
    logits: Tensor
    targets: Tensor
    teacher: TeacherOutput
    num_anchors: Tensor | float | None = None

    @property
    def mask(self) -> Tensor:
        """All True, `(num_anchors,)`: these anchors were selected beforehand."""
        return torch.ones_like(self.targets, dtype=torch.bool)

    def select(self, hidden_states: Tensor) -> Tensor:
        """Rows of a student tensor `(batch_size, sequence_length, size)` at the anchors."""
        return hidden_states[self.teacher.anchors.rows, self.teacher.anchors.student_positions]

    def teacher_state(self, layer: int, routed: RoutedBatch) -> Tensor:
        """The teacher's residual stream after a layer; the re-routed one after the last layer."""
        return routed.residual if layer == self.teacher.last_layer else self.teacher.layers[layer]
