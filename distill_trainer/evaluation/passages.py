"""Passages of held-out text on which the student comes closest to its teacher, and those where it stays behind."""

import math
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill_trainer.tokens import token_bytes

# Short enough to be read, long enough that one rare word does not decide.
PASSAGE_BYTES, NUM_PASSAGES = 280, 3
ROLES = ("student_before", "baseline", "student", "teacher")


def best_and_worst(
    token_nats: dict[str, list[Tensor]], batches: list[dict[str, Tensor]], student_tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The passages with the smallest and with the largest distance of the student from its teacher.

    The scored text of every window is cut at anchors, where all models have read the same, into passages of about
    equal length, at least `PASSAGE_BYTES` where the window holds so much. Shorter ends of text are left out.

    Args:
        token_nats: By role, what `token_nats` gives for each batch. The roles are those of `ROLES`.
        batches: The collated batches, in the same order.
        student_tokenizer: Tells the text of a passage.

    Returns:
        `compared`, the number of passages; `best` and `worst`, lists of up to `NUM_PASSAGES` passages without one in
        common: each with its `text`, its `bytes` and the bits per byte of every role, None for a role that is not
        there.
    """
    sums = {role: [nats.cumsum(dim=1).tolist() for nats in found] for role, found in token_nats.items()}
    vocabulary = _Bytes(student_tokenizer)
    passages = []
    for number, batch in enumerate(batches):
        for row, ids in enumerate(batch["input_ids"].tolist()):
            positions = _anchors(batch, "student", row), _anchors(batch, "teacher", row)
            for first, last in _cuts(ids, positions[0], vocabulary):
                text = vocabulary.text(ids[positions[0][first] + 1 : positions[0][last] + 1])
                nats = {}
                for role, found in sums.items():
                    own = positions[role == "teacher"]
                    nats[role] = found[number][row][own[last]] - found[number][row][own[first]]
                passages.append((text, nats))
    shortest = min(PASSAGE_BYTES, max(len(text) for text, _ in passages)) / 2
    shown = [_passage(text, nats) for text, nats in passages if len(text) >= shortest]
    shown.sort(key=lambda passage: passage["student"] - passage["teacher"])
    return {
        "compared": len(shown),
        "best": shown[:NUM_PASSAGES],
        "worst": shown[NUM_PASSAGES:][-NUM_PASSAGES:][::-1],
    }


class _Bytes:
    """The bytes of token ids; each token is looked up once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.known: dict[int, bytes] = {}

    def text(self, ids: list[int]) -> bytes:
        """The bytes that the tokens stand for."""
        new = [token for token in set(ids) if token not in self.known]
        names = self.tokenizer.convert_ids_to_tokens(new)
        self.known.update(zip(new, map(token_bytes, names), strict=True))
        return b"".join(self.known[token] for token in ids)


def _anchors(batch: dict[str, Tensor], side: str, row: int) -> list[int]:
    return batch[f"{side}_positions"][row][batch["anchor_mask"][row]].tolist()


def _cuts(ids: list[int], anchors: list[int], vocabulary: _Bytes) -> Iterator[tuple[int, int]]:
    """First and last anchor of each passage of a window: about equal parts, cut before a blank where there is one."""
    spans = [vocabulary.text(ids[before + 1 : anchor + 1]) for before, anchor in pairwise(anchors)]
    # Bytes from the first anchor to each one.
    ends = list(accumulate(map(len, spans), initial=0))
    places = [place for place, span in enumerate(spans) if span[:1].isspace()] or list(range(len(spans)))
    parts = max(ends[-1] // PASSAGE_BYTES, 1)
    wanted = (bisect_left(ends, part * ends[-1] / parts) for part in range(1, parts))
    inner = (bisect_left(places, place) for place in wanted)
    cuts = [0, *(places[index] for index in inner if index < len(places)), len(spans)]
    return ((first, last) for first, last in pairwise(cuts) if first < last)


def _passage(text: bytes, nats: dict[str, float]) -> dict[str, Any]:
    bits = {role: nats[role] / math.log(2) / len(text) if role in nats else None for role in ROLES}
    return {"text": text.decode("utf-8", "replace"), "bytes": len(text), **bits}
