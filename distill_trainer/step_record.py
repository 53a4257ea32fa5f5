"""What the micro-batches of an optimizer step report, kept on the device until somebody reads it."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.utils import logging

from distill_trainer.balance import LossBalance
from distill_trainer.errors import NonFiniteLossError
from distill_trainer.router import GAP_WARMUP_STEPS, KnowledgeGap

logger = logging.get_logger(__name__)


class StepRecord:
    """Losses, metrics and the knowledge gap, added up over micro-batches and averaged over ranks when read.

    Args:
        accelerator: Of the trainer, for the averages over ranks.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._finite: dict[str, Tensor] = {}
        self._difference: Tensor | None = None
        self._sizes: dict[str, Tensor] = {}
        self._totals: dict[str, Tensor] = {}
        self._steps = 0

    def add(self, outputs: dict[str, dict[str, Tensor]]) -> None:
        """Take in what `DistillationModel.forward` returned for one micro-batch."""
        metrics = dict(outputs["metrics"])
        if "gap_difference" in metrics:
            pair = torch.stack([metrics.pop("gap_difference"), metrics.pop("gap_count")]).double()
            self._difference = pair if self._difference is None else self._difference + pair
        routing = {f"router_{name}": value for name, value in outputs["router"].items()}
        for name, value in (outputs["losses"] | routing).items():
            self._finite[name] = self._finite.get(name, True) & value.detach().isfinite()
        for name, value in outputs.get("sizes", {}).items():
            self._sizes[name] = self._sizes.get(name, 0) + value
        named = {f"loss_{name}": value for name, value in outputs["losses"].items()}
        for name, value in (named | routing | metrics).items():
            self._totals[name] = self._totals.get(name, 0) + value.detach().float()

    def nonfinite_losses(self) -> list[str]:
        """Names of this step's losses that are NaN or infinite on any rank."""
        names = sorted(self._finite)
        if not names:
            return []
        flags = torch.stack([~self._finite[name] for name in names]).float()
        return [name for name, flag in zip(names, self.accelerator.reduce(flags, "sum").tolist(), strict=True) if flag]

    def mean_gap_difference(self) -> Tensor | None:
        """Mean difference of the student's and the teacher's loss over this step's anchors; None if it has none."""
        if self._difference is None:
            return None
        total, count = self.accelerator.reduce(self._difference, "sum")
        return total / count if bool(count > 0) and bool(total.isfinite()) else None

    def total_sizes(self, power: int) -> dict[str, Tensor]:
        """Sizes of the losses, summed over this step's micro-batches and over ranks.

        Args:
            power: Of what they were measured in: a loss of a rank is its share times the number of ranks.
        """
        if not self._sizes:
            return {}
        names = sorted(self._sizes)
        sizes = torch.stack([self._sizes[name] for name in names]).double() / self.accelerator.num_processes**power
        return dict(zip(names, self.accelerator.reduce(sizes, "sum"), strict=True))

    def end_step(self) -> None:
        """Start the next optimizer step."""
        self._finite, self._difference, self._sizes = {}, None, {}
        self._steps += 1

    def means(self) -> dict[str, float]:
        """Mean of every value over the steps since the last call, and over ranks."""
        names = sorted(self._totals)
        if not names or not self._steps:
            return {}
        totals = torch.stack([self._totals[name] for name in names])
        means = (self.accelerator.reduce(totals, "mean") / self._steps).tolist()
        self._totals, self._steps = {}, 0
        return dict(zip(names, means, strict=True))


class StepCallback(TrainerCallback):
    """Looks at what a step's micro-batches reported, before and after the optimizer acts on it.

    Before: a step whose losses or gradient are not finite is left out, and `max_nonfinite_steps` of them in a row stop
    the run.
    After: the sizes of the step's losses go into their running averages; and the step's knowledge gap into its own, in
    the first pass over the data. Text that the student has been trained on says what it remembers, not what it knows.

    Args:
        record: What the micro-batches reported.
        gap: The running average.
        balance: The running sizes, None without.
        max_nonfinite_steps: Steps in a row.
    """

    def __init__(
        self, record: StepRecord, gap: KnowledgeGap, balance: LossBalance | None = None, *, max_nonfinite_steps: int
    ):
        self.record, self.gap, self.balance, self.max_nonfinite_steps = record, gap, balance, max_nonfinite_steps
        self.nonfinite_steps = 0

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        losses = self.record.nonfinite_losses()
        broken = f"loss {' and '.join(losses)}" if losses else ""
        # A finite loss can have an infinite gradient. In fp16 that is how the scaler finds its scale.
        if not broken and self.record.accelerator.scaler is None and not _finite_gradients(model):
            broken = "gradient"
        self.nonfinite_steps = self.nonfinite_steps + 1 if broken else 0
        if not broken:
            return
        what = f"The {broken} is not finite at step {state.global_step + 1}"
        if self.nonfinite_steps >= self.max_nonfinite_steps:
            raise NonFiniteLossError(
                f"{what}, time {self.nonfinite_steps} in a row (max_nonfinite_steps). "
                "Lower the learning rate, use bf16 or fp32, or look at the data of this step."
            )
        logger.warning(f"{what}; the step is left out.")
        # The scaler of fp16 leaves such a step out by itself, and fails if there are no gradients.
        if self.record.accelerator.scaler is None:
            optimizer.zero_grad()

    def on_step_end(self, args, state, control, **kwargs):
        difference = self.record.mean_gap_difference()
        if difference is not None and state.epoch <= 1:
            self.gap.update(difference)
        if self.balance is not None:
            self.balance.update(self.record.total_sizes(self.balance.power))
        self.record.end_step()

    def on_epoch_end(self, args, state, control, **kwargs):
        if args.gap_schedule and state.epoch == 1 and 0 < self.gap.steps <= GAP_WARMUP_STEPS:
            logger.warning(
                f"The first pass over the data had {int(self.gap.steps)} steps. gap_schedule needs more than "
                f"{GAP_WARMUP_STEPS} to follow the gap, so kl_weight stays as it is. More text or fewer windows per "
                "step give more."
            )


def _finite_gradients(model: nn.Module) -> bool:
    """Whether every gradient is finite; they are those of all ranks by now."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return bool(torch.stack([gradient.isfinite().all() for gradient in gradients]).all()) if gradients else True
