"""Held-out documents as overlapping windows: every byte is scored once, behind as much of the text as a window holds.

Left out are bytes that no window can hold together with text before them.

The scheme is that of https://huggingface.co/docs/transformers/perplexity (a sliding window with a stride), with both
cuts of a window at anchors, so that two tokenizers see and score the same text.
"""

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill_trainer.alignment import merge_ends
from distill_trainer.data import EMPTY, SHORT, DistillationCollator, check_teacher_length, special_prefix
from distill_trainer.errors import ConfigurationError, DataError
from distill_trainer.tokens import encode


def checked_stride(stride: int | None, max_length: int) -> int:
    """`stride`, or half of `max_length` for None.

    Raises:
        ConfigurationError: If it is below 1 or above `max_length`: then some text would be in no window.
    """
    if stride is None:
        return max(max_length // 2, 1)
    if not 1 <= stride <= max_length:
        raise ConfigurationError(f"eval_stride must be from 1 to max_length, which is {max_length}, got {stride}.")
    return stride


def document_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands before the first token of a document, so that this token has a prediction too.

    The tokenizer's own special tokens, else its beginning-of-text or end-of-text token (the choice of EleutherAI's
    evaluation harness); empty where it has none of them.
    """
    separators = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return special_prefix(tokenizer) or [token for token in separators if token is not None][:1]


@dataclass
class EncodedDocument:
    """One text as both tokenizers cut it as a whole, and the places where both do.

    Attributes:
        student_ids: `student_ids[i]` is the token that ends at `student_ends[i]`.
        teacher_ids: Likewise.
        boundaries: Number of student and of teacher tokens before each place that both tokenizers cut at; the first
            is the beginning of the text, `(0, 0)`.
        offsets: Bytes of the text before each boundary.
    """

    student_ids: list[int]
    teacher_ids: list[int]
    boundaries: list[tuple[int, int]]
    offsets: list[int]

    @classmethod
    def of(
        cls, text: str, student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase
    ) -> "EncodedDocument":
        """Encode a text without special tokens."""
        student_ids, student_ends = encode(student_tokenizer, text)
        teacher_ids, teacher_ends = encode(teacher_tokenizer, text)
        pairs = merge_ends(student_ends, teacher_ends)
        offsets, start = [0], 0
        for student, _ in pairs:
            end = student_ends[student]
            offsets.append(offsets[-1] + len(text[start:end].encode("utf-8", "surrogatepass")))
            start = end
        return cls(student_ids, teacher_ids, [(0, 0), *((s + 1, t + 1) for s, t in pairs)], offsets)


@dataclass
class Span:
    """What one window holds, as indices of boundaries: context from `start`, text that is scored from `scored`."""

    start: int
    scored: int
    end: int


def plan_spans(counts: Sequence[int], first: int, *, room: int, stride: int) -> Iterator[Span]:
    """Windows over one document that score each boundary after `first` once.

    The first window is full. Each further one scores `stride` tokens behind a context of `room - stride` tokens; less
    context where the cuts lie so far apart that more would not fit. A stretch between two cuts that no window can hold
    together with one before it is left out.

    Args:
        counts: Student tokens before each boundary, increasing.
        first: The boundary from which on tokens have a prediction: 0 if something stands before the document.
        room: Student tokens in a window.
        stride: Student tokens that a further window scores, at most `room`.
    """
    done = first
    while done < len(counts) - 1:
        if done == first:
            start, end = 0, bisect_right(counts, room) - 1
        else:
            end = max(bisect_right(counts, counts[done] + stride) - 1, done + 1)
            start = bisect_left(counts, max(counts[done] - (room - stride), counts[end] - room))
            # The first scored token needs one before it.
            start = max(min(start, done - 1), 0)
            end = min(end, bisect_right(counts, counts[start] + room) - 1)
        if end > done:
            yield Span(start, done, end)
        done = max(end, done + 1)


def document_windows(document: EncodedDocument, prefixes: Sequence[list[int]], spans: Iterator[Span]) -> list[dict]:
    """Rows for `collate_windows`, one for each span.

    Args:
        document: The document.
        prefixes: What stands before the student's and the teacher's first token of a document, and before the first
            token of a later window.
        spans: See `plan_spans`.
    """
    rows = []
    for span in spans:
        opening = span.start == 0
        sides = []
        for side, ids in enumerate((document.student_ids, document.teacher_ids)):
            before = prefixes[side] if opening else prefixes[side + 2]
            counts = [boundary[side] for boundary in document.boundaries[span.start : span.end + 1]]
            positions = [len(before) + count - counts[0] - 1 for count in counts]
            sides.append((before + ids[counts[0] : counts[-1]], positions))
        # The start of a window is an anchor only where something stands before it.
        skipped = 0 if span.scored == span.start else 1
        (student_ids, student_positions), (teacher_ids, teacher_positions) = sides
        rows.append(
            {
                "input_ids": student_ids,
                "teacher_input_ids": teacher_ids,
                "student_positions": student_positions[skipped:],
                "teacher_positions": teacher_positions[skipped:],
                "context_anchors": span.scored - span.start - skipped,
                "scored_bytes": document.offsets[span.end] - document.offsets[span.scored],
                "window_bytes": document.offsets[span.end] - document.offsets[span.start],
            }
        )
    return rows


def collate_windows(rows: list[dict[str, Any]], collator: DistillationCollator) -> dict[str, Tensor]:
    """A batch as `DistillationCollator` makes it, whose `anchor_mask` holds the scored text only.

    Returns:
        With `window_anchor_mask`, the anchors of the context as well, `(batch_size, num_anchors)`, and `window_bytes`,
        the text in each window, `(batch_size,)`.
    """
    batch = collator(rows)
    batch["window_anchor_mask"] = batch["anchor_mask"]
    context = torch.tensor([row["context_anchors"] for row in rows]).unsqueeze(1)
    batch["anchor_mask"] = batch["anchor_mask"] & (torch.arange(batch["anchor_mask"].shape[1]) >= context)
    batch["window_bytes"] = torch.tensor([row["window_bytes"] for row in rows])
    return batch


def _check_texts(texts: object) -> None:
    """Raise unless `texts` is a collection of strings; a single one would be a collection of its characters."""
    if isinstance(texts, str | bytes) or not isinstance(texts, Collection):
        raise DataError(f"texts must be a list of documents, got {type(texts).__name__}. Put a single text in a list.")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"texts must hold strings only, got {type(text).__name__} as document {number}.")


def texts_hash(texts: Sequence[str]) -> str:
    """SHA-256 of the documents and of where each of them ends, in hexadecimal digits."""
    digest = hashlib.sha256()
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


def evaluation_batches(
    texts: Sequence[str],
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    stride: int,
    batch_size: int,
    teacher_positions: int | None = None,
) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """The texts as collated batches, and what was counted.

    Args:
        texts: Held-out documents.
        student_tokenizer: See `anchor_pairs`.
        teacher_tokenizer: See `anchor_pairs`.
        max_length: Longest window, in student tokens.
        stride: Student tokens that a window scores, but for the first of a document, which scores all of its own.
        batch_size: Windows per batch.
        teacher_positions: Teacher tokens that a window may have at most. None: any number.

    Returns:
        Batches of `collate_windows`, and `eval_documents`, `eval_bytes`, `eval_sha256` (see `texts_hash`),
        `scored_bytes`, `anchor_fraction`, `dropped` (documents without text, and documents of which nothing can be
        scored), `eval_max_length`, `eval_stride`.

    Raises:
        ConfigurationError: If `max_length` is too small to score anything, or too large for `teacher_positions`.
        DataError: If there is nothing to score, or `texts` is no list of strings.
        TokenizerError: If the tokenizers cannot be aligned.
    """
    _check_texts(texts)
    if not any(texts):
        raise DataError("texts must hold at least one document with text, got none. Raise validation_fraction.")
    tokenizers = student_tokenizer, teacher_tokenizer
    prefixes = [*map(document_prefix, tokenizers), *map(special_prefix, tokenizers)]
    # Without something before it, a model has no belief about a document's first token: then no model is asked.
    first = 0 if all(prefixes[:2]) else 1
    rows: list[dict[str, Any]] = []
    tokens = anchors = scorable = 0
    dropped = {EMPTY: sum(not text for text in texts), SHORT: 0}
    for text in filter(None, texts):
        document = EncodedDocument.of(text, *tokenizers)
        counts = [student for student, _ in document.boundaries]
        spans = plan_spans(counts, first, room=max_length - len(prefixes[0]), stride=stride)
        windows = document_windows(document, prefixes, spans)
        dropped[SHORT] += not windows
        rows += windows
        tokens, anchors = tokens + len(document.student_ids), anchors + len(document.boundaries) - 1
        scorable += max(len(document.boundaries) - 1 - first, 0)
    if scorable and not rows:
        raise ConfigurationError(
            f"max_length must be larger to score the held-out text, got {max_length}: no window of so many student "
            "tokens reaches from one place where both tokenizers cut to the next, with text before it."
        )
    if not rows:
        raise DataError(f"None of the {len(texts)} documents holds text that can be scored: they are too short.")
    check_teacher_length(rows, max_length, teacher_positions)
    collator = DistillationCollator(*tokenizers)
    batches = [collate_windows(rows[n : n + batch_size], collator) for n in range(0, len(rows), batch_size)]
    return batches, {
        "eval_documents": len(texts),
        "eval_bytes": sum(len(text.encode("utf-8", "surrogatepass")) for text in texts),
        "eval_sha256": texts_hash(texts),
        "scored_bytes": sum(row["scored_bytes"] for row in rows),
        "dropped": dropped,
        "anchor_fraction": anchors / tokens,
        "eval_max_length": max_length,
        "eval_stride": stride,
    }
