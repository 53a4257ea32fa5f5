"""Bits per byte of the student during training: which tokens count, and the figure for all windows together."""

import numpy as np
import torch
from torch import Tensor

from distill_trainer.anchors import IGNORE_INDEX


def scored_labels(batch: dict[str, Tensor]) -> Tensor:
    """The batch's labels between each row's first and last anchor, -100 elsewhere.

    Every model can be scored on exactly these bytes, whatever its tokens: the first anchor is where all have read the
    same text, and the last ends the window.

    Args:
        batch: A collated batch.

    Returns:
        `(batch_size, sequence_length)`.
    """
    positions, present = batch["student_positions"], batch["anchor_mask"]
    index = torch.arange(batch["labels"].shape[1], device=positions.device)
    last = positions.masked_fill(~present, -1).max(dim=1, keepdim=True).values
    return batch["labels"].masked_fill((index <= positions[:, :1]) | (index > last), IGNORE_INDEX)


def bits_per_byte_metrics(predictions) -> dict[str, float]:
    """Loss (nats per token) and bits per byte over all windows, from `(num_windows, 3)` nats, tokens and bytes."""
    nats, tokens, num_bytes = np.asarray(predictions.predictions, dtype=np.float64).sum(axis=0)
    return {"loss": nats / tokens, "bits_per_byte": nats / num_bytes / np.log(2)}
