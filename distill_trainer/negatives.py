"""Negatives of the contrastive loss: which anchors have read the same text, and the anchors of the other ranks."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from distill_trainer.losses.contrastive import MAX_ANCHORS

# Anchors behind the same tokens, so many of them, have read the same text.
SAME_TOKENS = 8
# Stands for the tokens before a row's first.
BEFORE_THE_TEXT = -1


def last_tokens(input_ids: Tensor, attention_mask: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """The student's last `SAME_TOKENS` tokens up to each anchor, by which repeated text is known.

    Both models' states there come from much the same text if these agree: a boilerplate sentence, a repeated heading,
    or the first words of two windows, before which both have read nothing. Fewer tokens would also exclude single
    common words, whose states differ by what came before and are the negatives that teach most.

    Args:
        input_ids: Student tokens, `(batch_size, sequence_length)`, padded on either side.
        attention_mask: 1 at real tokens, same shape.
        rows: Row of each anchor, `(num_anchors,)`.
        positions: Index of its token, `(num_anchors,)`.

    Returns:
        `(num_anchors, SAME_TOKENS)`, `BEFORE_THE_TEXT` where the row has not begun.
    """
    real = input_ids.masked_fill(attention_mask == 0, BEFORE_THE_TEXT)
    padded = F.pad(real, (SAME_TOKENS - 1, 0), value=BEFORE_THE_TEXT)
    return padded.unfold(1, SAME_TOKENS, 1)[rows, positions]


def anchors_per_rank() -> int:
    """Anchors that each rank gives to the contrastive loss, so that all ranks together give `MAX_ANCHORS`."""
    return max(MAX_ANCHORS // _num_ranks(), 1)


@torch.no_grad()
def of_other_ranks(states: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """What the other ranks hold of the same two tensors; nothing where there is one rank.

    All ranks must call this together, those without an anchor too. Each sends `anchors_per_rank()` rows, filled up
    with rows that are left out again on arrival.

    Args:
        states: Teacher states, at most `anchors_per_rank()`, `(num_anchors, hidden_size)`.
        texts: Of `last_tokens`, `(num_anchors, SAME_TOKENS)`.

    Returns:
        States and texts in the order of the ranks, without gradient, `(num_others, ...)`.
    """
    if _num_ranks() == 1:
        return states[:0].detach(), texts[:0]
    gathered = []
    for values, filler in ((states.detach(), 0), (texts, BEFORE_THE_TEXT)):
        sent = values.new_full((anchors_per_rank(), values.shape[1]), filler)
        sent[: len(values)] = values
        received = [torch.empty_like(sent) for _ in range(_num_ranks())]
        dist.all_gather(received, sent)
        del received[dist.get_rank()]
        gathered.append(torch.cat(received))
    # The last token is the anchor's own, which a filled row has not.
    real = gathered[1][:, -1] != BEFORE_THE_TEXT
    return gathered[0][real], gathered[1][real]


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
