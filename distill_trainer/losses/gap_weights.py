"""Which anchors count how much in the logit loss: more where the student knows less."""

import torch
from torch import Tensor

from distill_trainer.errors import ConfigurationError
from distill_trainer.losses.reduction import check_mask


def gap_weights(gap: Tensor, mask: Tensor, *, bound: float = 4.0) -> Tensor:
    r"""Weights of the anchors that grow with the knowledge gap, mean one over the mask.

    w = min((1 + gap / mean gap) / 2, bound), then w + (1 - mean w) * (bound - w) / (bound - mean w): half of an
    anchor's weight is the same for all, half is its share of the gap, and what the cap cut off is spread in proportion
    to the room below it. So weights lie in [1/2, bound] and average to one. The rule is this project's own.

    The mean runs over the given anchors, so it depends on who shares the micro-batch.

    Args:
        gap: Knowledge gap of each anchor, 0 or above (below counts as 0), in nats, shape of `mask`. Detached.
        mask: True where an anchor counts, bool.
        bound: Largest weight, 2 or above.

    Returns:
        Float32, shape of `mask`, 0 outside the mask, without gradient. All ones where no anchor has a gap.

    Raises:
        ConfigurationError: If the bound is below 2.
    """
    if bound < 2:
        raise ConfigurationError(f"bound must be 2 or above, got {bound}.")
    check_mask(mask)
    selected = gap[mask].detach().float().clamp(min=0)
    # All gaps 0: 0 / tiny leaves 1/2 everywhere, and the second step lifts that to one.
    raw = (1 + selected / selected.mean().clamp(min=torch.finfo(torch.float32).tiny)) / 2
    capped = raw.clamp(max=bound)
    lifted = capped + (1 - capped.mean()) * (bound - capped) / (bound - capped.mean())
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, lifted)
