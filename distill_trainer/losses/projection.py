"""One model's logits read as probabilities over another's vocabulary, in the memory of the logits themselves."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill_trainer.losses.reduction import row_dot


def project_logits_(logits: Tensor, columns: Tensor, next_ids: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Softmax, then the sum of all tokens of each column; and what the softmax gives one token of each row.

    Overwrites `logits`, which are the largest tensor of a distillation step; the only other of their size is their
    gradient.

    Args:
        logits: Float32, `(num_rows, other_vocab_size)`. Hold anything afterwards.
        columns: Token of the new vocabulary for each of the other's, `(other_vocab_size,)`; `vocab_size` for those
            that have none, whose probability the others share in proportion.
        next_ids: A token of the other vocabulary for each row, `(num_rows,)`.
        vocab_size: Of the new vocabulary.

    Returns:
        Log-probabilities, `(num_rows, vocab_size)`, the smallest normal float standing in for 0; and log-probabilities
        of `next_ids` before any sharing, `(num_rows,)`.
    """
    return _ProjectLogits.apply(logits, columns, next_ids, vocab_size)


class _ProjectLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, columns: Tensor, next_ids: Tensor, vocab_size: int):
        probs = logits.detach()
        probs.sub_(probs.amax(dim=-1, keepdim=True))
        shifted = probs.gather(-1, next_ids.unsqueeze(-1)).squeeze(-1)
        total = probs.exp_().sum(dim=-1, keepdim=True)
        probs.div_(total)
        tiny = torch.finfo(probs.dtype).tiny
        projected = probs.new_zeros(len(probs), vocab_size + 1).index_add_(-1, columns, probs)[:, :vocab_size]
        mass = projected.sum(dim=-1, keepdim=True).clamp(min=tiny)
        logprobs = projected.div_(mass).clamp_(min=tiny).log()
        ctx.save_for_backward(probs, logprobs, mass, columns, next_ids)
        return logprobs, shifted - total.squeeze(-1).log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, next_gradient: Tensor):
        probs, logprobs, mass, columns, next_ids = ctx.saved_tensors
        # Through the logarithm, which is constant at the floor, and the division by the mass. What is left has mean
        # zero under the probabilities, so the softmax only multiplies by them.
        projected = logprobs.exp()
        padded = gradient.new_zeros(len(probs), logprobs.shape[-1] + 1)
        held = torch.div(gradient, projected, out=padded[:, :-1])
        held.masked_fill_(projected <= torch.finfo(probs.dtype).tiny * 1.01, 0)
        held.sub_(row_dot(held, projected).unsqueeze(-1)).div_(mass)
        del projected
        next_gradient = next_gradient.unsqueeze(-1)
        result = padded.index_select(-1, columns).sub_(next_gradient).mul_(probs)
        return result.scatter_add_(-1, next_ids.unsqueeze(-1), next_gradient), None, None, None
