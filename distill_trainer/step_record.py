"""What the micro-batches of an optimizer step report, kept on the device until somebody reads it."""

import torch
from accelerate import Accelerator
from torch import Tensor


class StepRecord:
    """Losses, metrics and the knowledge gap, added up over micro-batches and averaged over ranks when read.

    Args:
        accelerator: Of the trainer, for the averages over ranks.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.nonfinite_steps = 0
        self._finite: dict[str, Tensor] = {}
        self._difference: Tensor | None = None
        self._totals: dict[str, Tensor] = {}
        self._steps = 0

    def add(self, outputs: dict[str, dict[str, Tensor]]) -> None:
        """Take in what `DistillationModel.forward` returned for one micro-batch."""
        metrics = dict(outputs["metrics"])
        if "gap_difference" in metrics:
            pair = torch.stack([metrics.pop("gap_difference"), metrics.pop("gap_count")]).double()
            self._difference = pair if self._difference is None else self._difference + pair
        for name, value in outputs["losses"].items():
            self._finite[name] = self._finite.get(name, True) & value.detach().isfinite()
        named = {f"loss_{name}": value for name, value in outputs["losses"].items()}
        named |= {f"router_{name}": value for name, value in outputs["router"].items()}
        for name, value in (named | metrics).items():
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

    def end_step(self) -> None:
        """Start the next optimizer step."""
        self._finite, self._difference = {}, None
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
