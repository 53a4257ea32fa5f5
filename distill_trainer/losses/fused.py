"""Losses over vocabularies too large to hold: heads and losses run on a few positions at a time.

The gradient is formed in the forward pass, chunk by chunk, so neither side's logits outlive their chunk; the backward
pass only scales it, as in fused linear cross-entropy (https://huggingface.co/papers/2410.10989).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill_trainer.losses.heads import Head, HeadPass

# (positions of this chunk, student logits, teacher logits or None) -> what is differentiated, and sums to report.
ChunkLoss = Callable[[slice, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def fused_loss(
    chunk_loss: ChunkLoss,
    student_states: Tensor,
    student_head: Head,
    teacher_states: Tensor | None,
    teacher_head: Head | None,
    *,
    chunk_size: int,
    scale: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Sum of a loss over all positions, and sums of what it reports.

    Args:
        chunk_loss: Gives the loss of some positions from float32 logits, and values to add up.
        student_states: Input of the student's head, `(num_positions, student_hidden_size)`.
        student_head: Trained, frozen, tied or under an adapter.
        teacher_states: Input of the teacher's head at the first of these positions,
            `(num_anchors, teacher_hidden_size)` or `(num_anchors, num_samples, teacher_hidden_size)`; None for none.
        teacher_head: Frozen.
        chunk_size: Positions at a time.
        scale: Factor of the loss. Divided here and not in `chunk_loss`, gradients keep to the range of fp16.

    Returns:
        Scalar float32 with gradients to both sides' states and to the student's head, once; and the reported sums.
    """
    inputs = (student_states, teacher_states, *student_head.parameters())
    backward = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    settings = (chunk_loss, student_head, teacher_head, chunk_size, scale, backward)
    return _FusedLoss.apply(settings, *inputs)


def unfused_loss(
    chunk_loss: ChunkLoss,
    student_states: Tensor,
    student_head: Head,
    teacher_states: Tensor | None,
    teacher_head: Head | None,
    *,
    scale: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`fused_loss` with all logits held at once and autograd's own gradients."""
    logits = student_head(student_states).float()
    num_anchors = 0 if teacher_states is None else len(teacher_states)
    total, reported = chunk_loss(slice(num_anchors, len(logits)), logits[num_anchors:], None)
    if teacher_states is not None:
        # Also without an anchor: a sharded head must be called on every rank.
        at_anchors, sums = chunk_loss(
            slice(0, num_anchors), logits[:num_anchors], teacher_head(teacher_states).float()
        )
        total, reported = total + at_anchors, reported + sums
    return total * scale, reported.detach()


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings, student_states: Tensor, teacher_states: Tensor | None, *parameters: Tensor):
        chunk_loss, student_head, teacher_head, chunk_size, scale, backward = settings
        sides = [HeadPass(student_head, student_states, parameters, backward)]
        if teacher_states is not None:
            sides.append(HeadPass(teacher_head, teacher_states, (), backward))
        num_anchors = 0 if teacher_states is None else len(teacher_states)
        total = reported = student_states.new_zeros((), dtype=torch.float32)
        for rows in _chunks(len(student_states), num_anchors, chunk_size):
            loss, sums = _one_chunk(chunk_loss, rows, sides if rows.start < num_anchors else sides[:1])
            total, reported = total + loss, reported + sums
        gradients = [sides[0].state_gradient, sides[1].state_gradient if teacher_states is not None else None]
        ctx.gradients = [*gradients, *(sides[0].parameter_gradients or [None] * len(parameters))]
        ctx.dtypes = [None if x is None else x.dtype for x in (student_states, teacher_states, *parameters)]
        ctx.scale = scale
        ctx.mark_non_differentiable(reported)
        return total * scale, reported

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor, _: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("The gradient of a fused loss is given away in its backward pass, which can run once.")
        # Scaled in place and given away: a second copy of the head's gradient would be as large as the head.
        gradients, ctx.gradients = ctx.gradients, None
        return None, *(
            None if gradient is None else gradient.mul_(factor * ctx.scale).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )


def _one_chunk(chunk_loss: ChunkLoss, rows: slice, sides: list[HeadPass]) -> tuple[Tensor, Tensor]:
    """Loss and reported sums of some positions, detached. Its logits are gone when it returns."""
    trained = [side for side in sides if side.backward]
    with torch.set_grad_enabled(bool(trained)):
        logits = [side.logits(rows) for side in sides]
        # The losses are computed in float32 whatever the models' types.
        with torch.autocast(logits[0].device.type, enabled=False):
            loss, sums = chunk_loss(rows, logits[0], logits[1] if len(logits) > 1 else None)
            if trained:
                gradients = torch.autograd.grad(loss, [side.output for side in trained], allow_unused=True)
    del logits
    for side, gradient in zip(trained, gradients if trained else (), strict=True):
        if gradient is not None:
            side.add(rows, gradient)
    return loss.detach(), sums.detach()


def _chunks(num_positions: int, num_anchors: int, chunk_size: int) -> list[slice]:
    """Slices of at most `chunk_size` positions, none with both anchors and others; an empty one for no positions."""
    bounds = sorted({0, *range(0, num_anchors, chunk_size), *range(num_anchors, num_positions, chunk_size)})
    return [slice(start, stop) for start, stop in zip(bounds, [*bounds[1:], num_positions], strict=True)]
