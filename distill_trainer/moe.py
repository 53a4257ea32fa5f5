"""The experts of a Mixture-of-Experts model: finding them, recording what they did, mixing them as we choose."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill_trainer.errors import UnsupportedModelError

EXPERT_COUNT_KEY = re.compile(r"(^|_)(num|n)_(local_|routed_)?experts$")


@dataclass
class ExpertCall:
    """What the experts of one block were asked and what they answered.

    Attributes:
        hidden_states: Input of the block, `(num_tokens, hidden_size)`.
        router_logits: The gate's scores before its softmax, `(num_tokens, num_experts)`.
        selected_experts: The gate's choice, `(num_tokens, top_k)`.
        routing_weights: The gate's weights of its choice, `(num_tokens, top_k)`.
        output: Weighted sum of the chosen experts' outputs, `(num_tokens, hidden_size)`.
    """

    hidden_states: Tensor
    router_logits: Tensor
    selected_experts: Tensor
    routing_weights: Tensor
    output: Tensor

    def at(self, tokens: Tensor) -> "ExpertCall":
        """The same call at some tokens only, given by their indices, `(num_selected,)`."""
        return ExpertCall(*(getattr(self, name)[tokens] for name in self.__dataclass_fields__))


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
            "experts interface of transformers. Use a teacher such as Qwen3-MoE, Qwen2-MoE, Mixtral or OLMoE, or set "
            "use_router to false to distil from its own gate."
        )
    return blocks


def gate_of(block: nn.Module) -> nn.Module | None:
    """The module that scores the experts of a block."""
    return getattr(block, "gate", None) or getattr(block, "router", None)


def gate_rows(block: nn.Module) -> Tensor:
    """The gate's weight, one row per expert, `(num_experts, hidden_size)`."""
    rows = [weight for weight in gate_of(block).parameters() if weight.ndim == 2]
    if len(rows) != 1 or rows[0].shape[0] != block.experts.num_experts:
        raise UnsupportedModelError(
            f"The gate {type(gate_of(block)).__name__} of the teacher has no single weight with a row per expert."
        )
    return rows[0].detach()


@contextmanager
def record_experts(block: nn.Module) -> Iterator[list[ExpertCall]]:
    """Record every call of a block's experts while the context lasts. The model's own computation is unchanged."""
    calls: list[ExpertCall] = []
    scores: list[Tensor] = []

    def on_gate(module, inputs, outputs):
        scores.append(outputs[0] if isinstance(outputs, tuple) else outputs)

    def on_experts(module, inputs, kwargs, output):
        hidden_states, selected_experts, routing_weights = (*inputs, *kwargs.values())[:3]
        calls.append(
            ExpertCall(
                hidden_states, scores.pop().reshape(len(hidden_states), -1), selected_experts, routing_weights, output
            )
        )

    hooks = [
        gate_of(block).register_forward_hook(on_gate),
        block.experts.register_forward_hook(on_experts, with_kwargs=True),
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def mix_experts(block: nn.Module, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
    """The block's own experts, mixed with our choice and weights.

    With the gate's own choice and weights this repeats the block's computation bit for bit. Gradients reach
    `routing_weights`; the experts stay frozen if their parameters are.

    Args:
        block: A block of `expert_blocks`.
        hidden_states: Input of the block, `(num_tokens, hidden_size)`.
        selected_experts: Experts to mix, `(num_tokens, top_k)`, any `top_k` from 1 to the number of experts.
        routing_weights: Weight of each, `(num_tokens, top_k)`, in the type of the gate's own.

    Returns:
        `(num_tokens, hidden_size)`.
    """
    with torch.autocast(hidden_states.device.type, enabled=False):
        return block.experts(hidden_states, selected_experts, routing_weights)
