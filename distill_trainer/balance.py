"""Balancing the losses: their running sizes, and the weights with which each has the share that its weight says."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distill_trainer.schedules import LOGIT_LOSSES, LOSS_NAMES

# KL and LM are in one unit, nats over one vocabulary, and how they stand to each other is the gap schedule's to say:
# they are balanced against the others as one.
LOGIT = "logit"
GROUPS = (LOGIT, *(name for name in LOSS_NAMES if name not in LOGIT_LOSSES))
METHODS = ("none", "ema", "gradient-norm")

# Optimizer steps that a running size looks back on; before so many have passed it is the plain mean.
HORIZON = 50
# Optimizer steps from one measurement of the gradients to the next: each takes a backward pass for every loss.
GRADIENT_INTERVAL = 10


class LossBalance(nn.Module):
    """Running size of each loss, and what its weight becomes.

    `ema` takes a loss's value for its size. `gradient-norm` takes the norm of the gradient that it sends into the
    embedded tokens, the place that all losses share: they enter the student at layers of any depth. This is GradNorm
    (https://huggingface.co/papers/1711.02257) with an asymmetry of 0, solved for the weights, on shared activations in
    the place of shared parameters, as in MGDA-UB (https://huggingface.co/papers/1810.04650): those of different
    micro-batches are perpendicular, so accumulated norms are those of one large batch.

    The state is in buffers, so a resumed run continues it.

    Args:
        method: `ema` or `gradient-norm`.
    """

    sizes: Tensor
    counts: Tensor

    def __init__(self, method: str):
        super().__init__()
        self.method = method
        # What adds up over micro-batches and ranks is this power of a size.
        self.power = 2 if method == "gradient-norm" else 1
        self.interval = GRADIENT_INTERVAL if method == "gradient-norm" else 1
        self.register_buffer("sizes", torch.zeros(len(GROUPS), dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(len(GROUPS), dtype=torch.float64))

    def is_due(self, step: int, weights: Mapping[str, float]) -> bool:
        """Whether the gradients are to be measured in a step: in every `interval`-th, and where a loss is new."""
        if self.method != "gradient-norm":
            return False
        counts, active = self.counts.tolist(), _group_weights(weights)
        return step % self.interval == 0 or any(
            active[name] and not count for name, count in zip(GROUPS, counts, strict=True)
        )

    @torch.no_grad()
    def update(self, totals: Mapping[str, Tensor]) -> None:
        """Take in one optimizer step.

        Args:
            totals: What `value_sizes` or `gradient_sizes` gave, summed over its micro-batches and ranks. A loss of 0,
                or that is not finite, says nothing of its size and is passed over.
        """
        for index, name in enumerate(GROUPS):
            if name in totals:
                size = totals[name].double() ** (1 / self.power)
                counts = (size > 0) & size.isfinite()
                self.counts[index] += counts
                rate = (1 / self.counts[index]).clamp(min=self.interval / HORIZON)
                self.sizes[index] += torch.where(counts, rate * (size - self.sizes[index]), 0.0)

    def balanced(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Weights under which a loss counts by its weight, not by its size.

        Each is divided by the running size of its loss and multiplied by the mean size of all of them, by weight, so
        that their weighted sum (of values or of gradient norms) stays what it is, and with it the meaning of learning
        rate and gradient clipping. A loss that has not been measured yet keeps its weight.

        Args:
            weights: Of the losses in this step, 0 where one is skipped.
        """
        active = _group_weights(weights)
        sizes = {name: size for name, size in zip(GROUPS, self.sizes.tolist(), strict=True) if size and active[name]}
        if not sizes:
            return dict(weights)
        total = sum(active[name] for name in sizes)
        mean = sum(active[name] * size for name, size in sizes.items()) / total
        return {name: weight * mean / sizes.get(_group(name), mean) for name, weight in weights.items()}


def value_sizes(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Value of each group of losses, detached.

    Args:
        losses: By name, unweighted.
        weights: Of the losses; they say how KL and LM stand to each other.
    """
    values = {name: loss.detach() for name, loss in losses.items() if name in GROUPS}
    logit_losses = [weights[name] * losses[name].detach() for name in LOGIT_LOSSES if name in losses]
    if logit_losses:
        values[LOGIT] = torch.stack(logit_losses).sum() / _group_weights(weights)[LOGIT]
    return values


def gradient_sizes(
    losses: Mapping[str, Tensor],
    logit_loss: Tensor,
    weights: Mapping[str, float],
    embeddings: Tensor,
    *,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Squared norm of the gradient that each group of losses sends into the embedded tokens. The graph is kept.

    Args:
        losses: By name, unweighted, without `kl` and `lm`.
        logit_loss: These two, weighted.
        weights: Of all losses.
        embeddings: What the student's first layer reads, `(batch_size, sequence_length, hidden_size)`.
        scale: Factor at which the gradients are formed, so that those of fp16 do not vanish.
    """
    if logit_weight := _group_weights(weights)[LOGIT]:
        losses = {**losses, LOGIT: logit_loss / logit_weight}
    squares = {}
    with torch.autocast(embeddings.device.type, enabled=False):
        for name, loss in losses.items():
            (gradient,) = torch.autograd.grad(loss * scale, embeddings, retain_graph=True)
            squares[name] = (gradient.float() / scale).square().sum()
    return squares


def _group(name: str) -> str:
    return LOGIT if name in LOGIT_LOSSES else name


def _group_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """Weight of each group, of KL and LM together."""
    return {group: sum(w for name, w in weights.items() if _group(name) == group) for group in GROUPS}
