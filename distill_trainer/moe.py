"""The experts of a Mixture-of-Experts model: finding them, and recording what they did."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill_trainer.errors import UnsupportedModelError
from distill_trainer.taps import decoder_layers

EXPERT_COUNT_KEY = re.compile(r"(^|_)(num|n)_(local_|routed_)?experts$")
# How far below its own choice an expert stands that the gate could not choose, in nats.
BARRED = 1e-3


@dataclass
class ExpertCall:
    """What the experts of one block were asked and what they answered.

    Attributes:
        hidden_states: Input of the block, `(num_tokens, hidden_size)`.
        router_logits: The gate's scores before its softmax, `(num_tokens, num_experts)`.
        selected_experts: The gate's choice, `(num_tokens, top_k)`.
        routing_weights: The gate's weights of its choice, `(num_tokens, top_k)`.
        output: Weighted sum of the chosen experts' outputs, `(num_tokens, hidden_size)`; None before they answer.
    """

    hidden_states: Tensor
    router_logits: Tensor
    selected_experts: Tensor
    routing_weights: Tensor
    output: Tensor | None = None

    def at(self, tokens: Tensor) -> "ExpertCall":
        """The same call at some tokens only, given by their indices, `(num_selected,)`."""
        values = (getattr(self, name) for name in self.__dataclass_fields__)
        return ExpertCall(*(None if value is None else value[tokens] for value in values))

    @property
    def gate_logits(self) -> Tensor:
        """Logits whose softmax and top-k give the gate's own choice and the ratios of its weights.

        They are the gate's scores where it is a softmax, and their log-sigmoid where it is a sigmoid. Gates that bar
        experts (by groups, or by a bias that steers the choice alone) have these below what they chose. A gate that
        chooses one expert has no ratios of weights, and counts as a softmax: its choice is the same with both.

        Returns:
            `(num_tokens, num_experts)`, float32.
        """
        scores = self.router_logits.float()
        own = self.routing_weights.float().clamp(min=torch.finfo(torch.float32).tiny).log()

        def misfit(logits: Tensor) -> Tensor:
            """How wrong the ratios of the weights of the gate's choice would be."""
            difference = logits.gather(-1, self.selected_experts) - own
            return (difference - difference.mean(dim=-1, keepdim=True)).square().sum()

        # Where both fit up to rounding they are the same: a sigmoid of very negative scores is a softmax.
        is_sigmoid = misfit(scores) > 4 * misfit(F.logsigmoid(scores))
        logits = torch.where(is_sigmoid, F.logsigmoid(scores), scores)
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, self.selected_experts, True)
        least = logits.masked_fill(~chosen, torch.inf).amin(dim=-1, keepdim=True)
        return torch.where(chosen | (logits <= least), logits, least - BARRED)


def is_mixture(model: PreTrainedModel) -> bool:
    """Whether the model's configuration speaks of more than one expert."""

    def counts(config: dict) -> Iterator[int]:
        for key, value in config.items():
            if isinstance(value, dict):
                yield from counts(value)
            elif EXPERT_COUNT_KEY.search(str(key)) and isinstance(value, int):
                yield value

    return max(counts(model.config.to_dict()), default=1) > 1


def expert_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks with a gate and experts of the transformers experts interface, from the bottom up. Empty if dense.

    A block is known by its structure: its `experts` module was declared with `use_experts_implementation`, so it is
    called as `experts(hidden_states, top_k_index, top_k_weights)`, and it has a `gate` or `router`.

    Raises:
        UnsupportedModelError: If the configuration has experts and no such block exists.
    """
    blocks = [
        module
        for module in model.modules()
        if hasattr(getattr(module, "experts", None), "_apply_gate") and gate_of(module) is not None
    ]
    if not blocks and is_mixture(model):
        raise UnsupportedModelError(
            f"The experts of the teacher {type(model).__name__} cannot be found: none of its blocks follows the "
            "experts interface of transformers. Use a teacher such as Qwen3-MoE, Mixtral, OLMoE, DeepSeek-V3, gpt-oss "
            "or Granite-MoE, or set use_router to false to distil from its own gate."
        )
    return blocks


def expert_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The block with experts of every layer that has one, by the layer's index; see `expert_blocks`."""
    blocks = set(expert_blocks(model))
    if not blocks:
        return {}
    layers = enumerate(decoder_layers(model))
    return {i: module for i, layer in layers for module in layer.modules() if module in blocks}


def gate_of(block: nn.Module) -> nn.Module | None:
    """The module that scores the experts of a block."""
    return getattr(block, "gate", None) or getattr(block, "router", None)


def gate_rows(block: nn.Module) -> Tensor:
    """The gate's weight, one row per expert, `(num_experts, hidden_size)`."""
    count = block.experts.num_experts
    rows = [weight for weight in gate_of(block).parameters() if weight.ndim == 2 and len(weight) == count]
    if len(rows) != 1:
        raise UnsupportedModelError(
            f"The gate {type(gate_of(block)).__name__} of the teacher has no single weight with a row per expert. Set "
            "use_router to false to distil from its own gate."
        )
    return rows[0].detach()


@contextmanager
def watch_experts(block: nn.Module, on_experts: Callable[..., Any], *, before: bool) -> Iterator[list[Tensor]]:
    """Hook a block's experts, before or after they answer, and keep the scores that its gate gave last."""
    scores: list[Tensor] = []

    def on_gate(module, inputs, outputs):
        scores[:] = [outputs[0] if isinstance(outputs, tuple) else outputs]

    register = block.experts.register_forward_pre_hook if before else block.experts.register_forward_hook
    hooks = [gate_of(block).register_forward_hook(on_gate), register(on_experts, with_kwargs=True)]
    try:
        yield scores
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def record_experts(block: nn.Module) -> Iterator[list[ExpertCall]]:
    """Record every call of a block's experts while the context lasts. The model's own computation is unchanged."""
    calls: list[ExpertCall] = []

    def on_experts(module, inputs, kwargs, output):
        hidden_states, selected_experts, routing_weights = (*inputs, *kwargs.values())[:3]
        router_logits = scores[0].reshape(len(hidden_states), -1)
        calls.append(ExpertCall(hidden_states, router_logits, selected_experts, routing_weights, output))

    with watch_experts(block, on_experts, before=False) as scores:
        yield calls


@contextmanager
def record_choices(block: nn.Module) -> Iterator[list[Tensor]]:
    """Record the experts that a block's gate selects at every call, most weight first, `(num_tokens, top_k)`."""
    choices: list[Tensor] = []

    def on_experts(module, inputs, kwargs):
        _, selected_experts, routing_weights = (*inputs, *kwargs.values())[:3]
        # Not all gates give their choice in order.
        order = routing_weights.argsort(dim=-1, descending=True, stable=True)
        choices.append(selected_experts.gather(-1, order))

    with watch_experts(block, on_experts, before=True):
        yield choices
