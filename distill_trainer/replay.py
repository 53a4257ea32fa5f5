"""Running the top of a frozen trunk a second time, with other experts."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass
class LayerCall:
    """What a transformer layer was called with.

    Attributes:
        hidden_states: Residual stream before the layer, `(batch_size, sequence_length, hidden_size)`.
        inputs: Its other positional arguments.
        kwargs: Its other keyword arguments: masks, positions.
    """

    hidden_states: Tensor
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def record_calls(layers: Mapping[int, nn.Module]) -> Iterator[dict[int, LayerCall]]:
    """Record how each layer is called while the context lasts, by its index."""
    calls: dict[int, LayerCall] = {}

    def recorder(index: int):
        def hook(module, inputs, kwargs):
            if inputs:
                calls[index] = LayerCall(inputs[0], inputs[1:], kwargs)
            else:
                others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
                calls[index] = LayerCall(kwargs["hidden_states"], (), others)

        return hook

    hooks = [layer.register_forward_pre_hook(recorder(i), with_kwargs=True) for i, layer in layers.items()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def replay(
    layers: Mapping[int, nn.Module],
    calls: Mapping[int, LayerCall],
    changed: Callable[[int], AbstractContextManager],
    *,
    checkpointing: bool = False,
) -> dict[int, Tensor]:
    """Residual stream after each layer of a second run, `(batch_size, sequence_length, hidden_size)`, by its index.

    Args:
        layers: Consecutive layers from the first to run again to the last.
        calls: Of the first run; the first layer's hidden states are the start of the second.
        changed: Makes the context in which a layer runs, from its index.
        checkpointing: Keep no activations for the backward pass and compute them there once more.
    """
    hidden_states = calls[min(layers)].hidden_states
    results = {}
    for index, layer in layers.items():
        call = calls[index]

        def run(states: Tensor, index=index, layer=layer, call=call) -> Tensor:
            with changed(index):
                result = layer(states, *call.inputs, **call.kwargs)
            return result[0] if isinstance(result, tuple) else result

        if checkpointing and torch.is_grad_enabled():
            hidden_states = checkpoint(run, hidden_states, use_reentrant=False)
        else:
            hidden_states = run(hidden_states)
        results[index] = hidden_states
    return results
