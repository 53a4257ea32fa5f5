"""Mixing the experts of a Mixture-of-Experts model as we choose."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_trainer.moe import ExpertCall, watch_experts

# Relative differences of routing weights up to so many units of their type come from the order of the arithmetic.
ROUNDING = 8
# What the gate decided at some tokens -> experts and weights (sum 1) to use there, each `(num_tokens, top_k)`.
Choice = Callable[[ExpertCall], tuple[Tensor, Tensor]]


@contextmanager
def reroute_experts(block: nn.Module, tokens: Tensor, choose: Choice) -> Iterator[None]:
    """While the context lasts, mix the block's experts at some tokens as `choose` says, elsewhere as the gate does.

    Args:
        block: A block of `expert_blocks`.
        tokens: Indices of the tokens, `(num_selected,)`.
        choose: Gets the gate's call at these tokens.
    """

    def on_experts(module, inputs, kwargs):
        hidden_states, selected_experts, routing_weights = (*inputs, *kwargs.values())[:3]
        router_logits = scores[0].reshape(len(hidden_states), -1)
        own = ExpertCall(hidden_states, router_logits, selected_experts, routing_weights).at(tokens)
        chosen, weights = like_the_gate(own, *choose(own))
        width = max(chosen.shape[-1], selected_experts.shape[-1])

        def put(values: Tensor, at_tokens: Tensor) -> Tensor:
            # Where one side chooses fewer experts, others stand in with the weight 0.
            values, at_tokens = (F.pad(side, (0, width - side.shape[-1])) for side in (values, at_tokens))
            return values.index_put((tokens,), at_tokens.to(values.dtype))

        return (hidden_states, put(selected_experts, chosen), put(routing_weights, weights)), {}

    with watch_experts(block, on_experts, before=True) as scores:
        yield


def like_the_gate(own: ExpertCall, selected_experts: Tensor, routing_weights: Tensor) -> tuple[Tensor, Tensor]:
    """A choice of experts in the size and type of the gate's weights.

    The weights are scaled by the sum of the gate's own, so that families whose gates do not sum to 1 keep the size of
    their experts' output. A choice that differs from the gate's by rounding only becomes the gate's to the bit, with
    the gradients of the choice.

    Args:
        own: The gate's call.
        selected_experts: `(num_tokens, top_k)`, or `(num_tokens, num_samples, top_k)`.
        routing_weights: Sum 1, same shape.
    """
    gates = own.routing_weights.float()
    if selected_experts.ndim == 3:
        return selected_experts, (routing_weights * gates.sum(dim=-1)[:, None, None]).to(own.routing_weights.dtype)
    weights = routing_weights * gates.sum(dim=-1, keepdim=True)
    if selected_experts.shape == own.selected_experts.shape:
        none = torch.zeros_like(own.router_logits, dtype=torch.float32)
        ours = none.scatter(-1, selected_experts, weights).gather(-1, own.selected_experts)
        tolerance = ROUNDING * torch.finfo(own.routing_weights.dtype).eps
        same = ((ours - gates).abs() <= tolerance * gates).all(dim=-1, keepdim=True)
        selected_experts = torch.where(same, own.selected_experts, selected_experts)
        weights = torch.where(same, gates.detach() + (ours - ours.detach()), weights)
    return selected_experts, weights.to(own.routing_weights.dtype)


def mix_experts(block: nn.Module, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
    """The block's own experts, mixed with our choice and weights.

    With the gate's own choice and weights this repeats the block's computation bit for bit. Gradients reach
    `routing_weights`; the experts stay frozen if their parameters are.

    Args:
        block: A block of `expert_blocks`.
        hidden_states: Input of the block, `(num_tokens, hidden_size)`.
        selected_experts: Experts to mix, `(num_tokens, top_k)`, any `top_k` from 1 to the number of experts; or
            several mixtures per token, `(num_tokens, num_samples, top_k)`.
        routing_weights: Weight of each, same shape, in the type of the gate's own.

    Returns:
        `(num_tokens, hidden_size)`, or `(num_tokens, num_samples, hidden_size)`.
    """
    shape = (*selected_experts.shape[:-1], hidden_states.shape[-1])
    if selected_experts.ndim == 3:
        hidden_states = hidden_states.repeat_interleave(selected_experts.shape[1], dim=0)
    choice = (selected_experts.flatten(0, -2), routing_weights.flatten(0, -2))
    with torch.autocast(hidden_states.device.type, enabled=False):
        return block.experts(hidden_states, *choice).view(shape)
