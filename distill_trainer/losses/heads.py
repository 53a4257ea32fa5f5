"""Output heads: from hidden states to logits for some positions at a time, and back."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: a linear layer, then a factor, a divisor and a soft cap.

    Attributes:
        linear: The output embedding, possibly under an adapter.
        vocab_size: Rows of its output.
        factor: Factor of its output.
        divisor: What its output is divided by. Not one number with the factor, to round as the models themselves do.
        softcap: Bound of the logits, None for none.
        autocast: Whether an autocast context may compute it in its own type; a frozen model keeps to its weights'.
    """

    linear: nn.Module
    vocab_size: int
    factor: float = 1.0
    divisor: float = 1.0
    softcap: float | None = None
    autocast: bool = True

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Logits, `(..., hidden_size)` -> `(..., vocab_size)`."""
        with self.precision(hidden_states.device):
            return self.finish(self.linear(hidden_states))

    def finish(self, output: Tensor) -> Tensor:
        """The logits for an output of the linear layer."""
        logits = output if self.factor == 1 else output * self.factor
        logits = logits if self.divisor == 1 else logits / self.divisor
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def precision(self, device: torch.device) -> AbstractContextManager:
        """The context in which its products are computed."""
        return nullcontext() if self.autocast else torch.autocast(device.type, enabled=False)

    def parameters(self) -> list[Tensor]:
        """What trains in the head."""
        return [parameter for parameter in self.linear.parameters() if parameter.requires_grad]

    def is_whole(self) -> bool:
        """Whether its weights are here: outside of the head's own forward FSDP and DeepSpeed may hold only shards."""
        return all(type(weight) is nn.Parameter and weight.numel() > 0 for weight in self.linear.parameters())


class HeadPass:
    """One walk over all positions with a head, whose gradients are added up by hand.

    Args:
        head: The head.
        states: Its input, `(num_positions, hidden_size)`; a head without parameters to train takes more dimensions.
        parameters: Parameters of the head that get a gradient.
        backward: Whether there will be gradients at all.
    """

    def __init__(self, head: Head, states: Tensor, parameters: Sequence[Tensor], backward: bool):
        self.head, self.states, self.parameters = head, states.detach(), list(parameters)
        self.backward = backward and (states.requires_grad or bool(self.parameters))
        # Autograd would make a gradient of the weight's size for every chunk; here all chunks add to one.
        self.by_hand = type(head.linear) is nn.Linear
        new = states.new_zeros
        self.state_gradient = new(states.shape, dtype=torch.float32) if self.backward else None
        self.parameter_gradients = [new(p.shape, dtype=torch.float32) for p in self.parameters if self.backward]
        self._input: Tensor | None = None
        self._raw: Tensor | None = None
        self.output: Tensor | None = None

    def logits(self, rows: slice) -> Tensor:
        """Float32 logits of some positions; `output` is then what to differentiate by."""
        tracked = self.backward and not self.by_hand
        with torch.set_grad_enabled(tracked), self.head.precision(self.states.device):
            self._input = self.states[rows].requires_grad_(tracked)
            self._raw = self.head.linear(self._input)
        self.output = self._raw.detach().requires_grad_(self.backward)
        return self.head.finish(self.output.float())

    def add(self, rows: slice, gradient: Tensor) -> None:
        """Take in the gradient of `output`, which is of these rows."""
        self.output = None
        with self.head.precision(gradient.device):
            if self.by_hand:
                self._raw = None
                self._add_by_hand(rows, gradient)
            else:
                self._add_by_autograd(rows, gradient)
        self._input = self._raw = None

    def _add_by_hand(self, rows: slice, gradient: Tensor) -> None:
        weight = self.head.linear.weight
        self.state_gradient[rows] = (gradient @ weight.detach().to(gradient.dtype)).float()
        for parameter, total in zip(self.parameters, self.parameter_gradients, strict=True):
            if parameter is not weight:
                total += gradient.sum(dim=0, dtype=torch.float32)
            elif gradient.dtype == self._input.dtype == torch.float32:
                total.addmm_(gradient.T, self._input)
            else:
                total += torch.mm(gradient.T, self._input.to(gradient.dtype))

    def _add_by_autograd(self, rows: slice, gradient: Tensor) -> None:
        inputs = [self._input, *self.parameters]
        state_gradient, *others = torch.autograd.grad(self._raw, inputs, gradient, allow_unused=True)
        self.state_gradient[rows] = state_gradient.float()
        for total, other in zip(self.parameter_gradients, others, strict=True):
            if other is not None:
                total += other
