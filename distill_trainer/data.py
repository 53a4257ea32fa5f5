"""From documents to aligned batches: windows with their anchors, and padding."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from distill_trainer.alignment import merge_ends, window_size
from distill_trainer.anchors import IGNORE_INDEX
from distill_trainer.errors import ConfigurationError, DataError
from distill_trainer.tokens import NO_BOUNDARY, encode

logger = logging.get_logger(__name__)


# Why a document or a window is left out.
EMPTY, SHORT = "empty_documents", "short_windows"


def prepare_dataset(
    documents: Dataset | IterableDataset,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    teacher_positions: int | None = None,
    num_proc: int | None = None,
) -> tuple[Dataset | IterableDataset, dict | None]:
    """Cut documents into windows, tokenize each for both sides, and find its anchors.

    A window holds at most `max_length` student tokens (its beginning-of-sequence token included) and ends at a
    character. The teacher reads the same characters. Windows with fewer than two anchors teach nothing: they are left
    out and counted.

    Args:
        documents: With a `text` column.
        student_tokenizer: See `anchor_pairs`.
        teacher_tokenizer: See `anchor_pairs`.
        max_length: Student tokens in a window.
        teacher_positions: Teacher tokens that a window may have at most. None: any number.
        num_proc: Processes. None is this one.

    Returns:
        A dataset with the columns `input_ids`, `teacher_input_ids`, `student_positions`, `teacher_positions`,
        `scored_bytes` (from the end of the first anchor to the end of the last) and `length`; and what was counted,
        None for a stream.

    Raises:
        ConfigurationError: If `max_length` is too small for any window with two anchors, or too large for
            `teacher_positions`; of a stream when it is read.
        DataError: If no window is left.
        TokenizerError: If the tokenizers cannot be aligned.
    """
    for tokenizer in (student_tokenizer, teacher_tokenizer):
        encode(tokenizer, "a")
    cut = partial(
        _cut_documents,
        student_tokenizer=student_tokenizer,
        teacher_tokenizer=teacher_tokenizer,
        max_length=max_length,
        teacher_positions=teacher_positions,
    )
    # Some streams do not know their columns.
    columns = documents.column_names or list(next(iter(documents), {}))
    options: dict[str, Any] = {"batched": True, "batch_size": 16, "remove_columns": columns}
    if isinstance(documents, IterableDataset):
        windows = documents.map(cut, **options)
        return windows.filter(lambda row: not row["dropped"]).remove_columns(["dropped", "document_bytes"]), None
    if not len(documents):
        raise DataError("The dataset must hold documents, got none.")
    # The library's own fingerprint of a tokenizer changes when it has been used, and would miss the cache.
    key = [
        documents._fingerprint,
        f"{max_length} {teacher_positions}",
        _identity(student_tokenizer),
        _identity(teacher_tokenizer),
    ]
    fingerprint = hashlib.sha1("\n".join(key).encode()).hexdigest()[:16]
    if num_proc is not None:
        num_proc = max(min(num_proc, len(documents)), 1)
    rows = documents.map(cut, **options, num_proc=num_proc, new_fingerprint=fingerprint, desc="Aligning")
    keep = [index for index, reason in enumerate(rows["dropped"]) if not reason]
    windows = rows.select(keep).remove_columns(["dropped", "document_bytes"])
    if not len(windows) and len(rows) > len(documents):
        raise ConfigurationError(
            f"max_length must be larger to cut the documents into windows, got {max_length}: none of the windows "
            "holds two anchors, places where both tokenizers cut."
        )
    if not len(windows):
        raise DataError(
            f"None of the {len(documents)} documents holds two anchors: the dataset is empty or too short."
        )
    return windows, _statistics(len(documents), rows, windows)


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    content = tokenizer.backend_tokenizer.to_str() + str(tokenizer.special_tokens_map)
    return hashlib.sha1(content.encode("utf-8", "surrogatepass")).hexdigest()


def _statistics(num_documents: int, rows: Dataset, windows: Dataset) -> dict:
    dropped = rows["dropped"]
    student_tokens = sum(windows["length"])
    anchors = sum(map(len, windows["student_positions"]))
    statistics = {
        "documents": num_documents,
        "windows": len(windows),
        "bytes": sum(rows["document_bytes"]),
        "student_tokens": student_tokens,
        "teacher_tokens": sum(map(len, windows["teacher_input_ids"])),
        "anchors": anchors,
        "anchor_fraction": anchors / student_tokens,
        "dropped": {reason: sum(found == reason for found in dropped) for reason in (EMPTY, SHORT)},
    }
    if any(statistics["dropped"].values()):
        logger.warning(f"Left out: {statistics['dropped']}.")
    return statistics


def _cut_documents(
    batch: dict[str, list],
    *,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    teacher_positions: int | None = None,
) -> dict[str, list]:
    rows = []
    for text in batch["text"]:
        windows = list(_cut(text, student_tokenizer, teacher_tokenizer, max_length)) if text else []
        if not windows:
            windows = [_window([], [], [], [], 0, dropped=SHORT if text else EMPTY)]
        check_teacher_length([window for window in windows if not window["dropped"]], max_length, teacher_positions)
        windows[0]["document_bytes"] = len((text or "").encode("utf-8", "surrogatepass"))
        rows += windows
    return {name: [row[name] for row in rows] for name in rows[0]}


def check_teacher_length(windows: list[dict[str, Any]], max_length: int, teacher_positions: int | None) -> None:
    """Raise a `ConfigurationError` unless the teacher has positions for all windows of `max_length` student tokens."""
    longest = max((len(window["teacher_input_ids"]) for window in windows), default=0)
    if teacher_positions is not None and longest > teacher_positions:
        raise ConfigurationError(
            f"max_length must be smaller, got {max_length}: a window of so many student tokens has {longest} of the "
            f"teacher, whose learned positions are {teacher_positions}."
        )


@contextmanager
def empty_stream_told() -> Iterator[None]:
    """Raise a `DataError` where accelerate finds no window in a stream, which only reading it tells."""
    try:
        yield
    except ValueError as error:
        if "Batch does not contain any data" not in str(error):
            raise
        raise DataError("The training dataset must hold windows with two anchors, got an empty stream.") from error


def _cut(
    text: str,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Iterator[dict[str, Any]]:
    """The windows of one document."""
    student_prefix, teacher_prefix = special_prefix(student_tokenizer), special_prefix(teacher_tokenizer)
    ids, ends = encode(student_tokenizer, text)
    start = beginning = 0
    while start < len(ids):
        size = window_size(ends[start : start + max_length], max_length - len(student_prefix))
        if not size:
            # The next character alone is longer than a window: it is left out.
            last = next(index for index in range(start, len(ends)) if ends[index] != NO_BOUNDARY)
            yield _window([], [], [], [], 0, dropped=SHORT)
            start, beginning = last + 1, ends[last]
            continue
        end = ends[start + size - 1]
        teacher_ids, teacher_ends = encode(teacher_tokenizer, text[beginning:end])
        student_ends = [e if e == NO_BOUNDARY else e - beginning for e in ends[start : start + size]]
        pairs = merge_ends(student_ends, teacher_ends)
        yield _window(
            student_prefix + ids[start : start + size],
            teacher_prefix + teacher_ids,
            [student + len(student_prefix) for student, _ in pairs],
            [teacher + len(teacher_prefix) for _, teacher in pairs],
            _bytes_between(text, beginning, student_ends, pairs),
            dropped="" if len(pairs) > 1 else SHORT,
        )
        start, beginning = start + size, end


def _bytes_between(text: str, beginning: int, student_ends: list[int], pairs: list[tuple[int, int]]) -> int:
    if not pairs:
        return 0
    first, last = (beginning + student_ends[pairs[index][0]] for index in (0, -1))
    return len(text[first:last].encode("utf-8", "surrogatepass"))


def special_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens that the tokenizer puts before a text."""
    with_special = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    return with_special[: with_special.index(plain[0])] if plain[0] in with_special else []


def _window(
    ids: list[int],
    teacher_ids: list[int],
    student_positions: list[int],
    teacher_positions: list[int],
    scored_bytes: int,
    *,
    dropped: str,
) -> dict[str, Any]:
    return {
        "input_ids": ids,
        "teacher_input_ids": teacher_ids,
        "student_positions": student_positions,
        "teacher_positions": teacher_positions,
        "scored_bytes": scored_bytes,
        "length": len(ids),
        "dropped": dropped,
        "document_bytes": 0,
    }


class DistillationCollator:
    """Pad windows to a batch for both models.

    Args:
        student_tokenizer: Gives the padding side and token of the student.
        teacher_tokenizer: Likewise of the teacher.
    """

    def __init__(self, student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase):
        self.tokenizers = {"student": student_tokenizer, "teacher": teacher_tokenizer}

    def __call__(self, windows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate rows of `prepare_dataset`.

        Returns:
            `input_ids`, `attention_mask`, `labels` (-100 at padding and at each row's first token), all
            `(batch_size, sequence_length)`; `teacher_input_ids`, `teacher_attention_mask`,
            `(batch_size, teacher_sequence_length)`; `student_positions`, `teacher_positions` (0 where padded) and
            `anchor_mask`, `(batch_size, num_anchors)`; `scored_bytes`, `(batch_size,)`.
        """
        ids, mask, student_shift = self._pad("student", [window["input_ids"] for window in windows])
        teacher_ids, teacher_mask, teacher_shift = self._pad(
            "teacher", [window["teacher_input_ids"] for window in windows]
        )
        labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
        labels[torch.arange(len(windows)), student_shift] = IGNORE_INDEX
        anchor_mask, student_positions = _pad_right([w["student_positions"] for w in windows], student_shift)
        _, teacher_positions = _pad_right([w["teacher_positions"] for w in windows], teacher_shift)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "teacher_input_ids": teacher_ids,
            "teacher_attention_mask": teacher_mask,
            "student_positions": student_positions,
            "teacher_positions": teacher_positions,
            "anchor_mask": anchor_mask,
            "scored_bytes": torch.tensor([window["scored_bytes"] for window in windows]),
        }

    def _pad(self, side: str, rows: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, mask, and by how much each row moved to the right."""
        tokenizer = self.tokenizers[side]
        width = max(map(len, rows))
        filler = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        ids = torch.full((len(rows), width), filler, dtype=torch.long)
        mask = torch.zeros_like(ids)
        shift = torch.zeros(len(rows), dtype=torch.long)
        for index, row in enumerate(rows):
            start = width - len(row) if tokenizer.padding_side == "left" else 0
            ids[index, start : start + len(row)] = torch.tensor(row)
            mask[index, start : start + len(row)] = 1
            shift[index] = start
        return ids, mask, shift


def _pad_right(rows: list[list[int]], shift: Tensor) -> tuple[Tensor, Tensor]:
    mask = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.bool)
    positions = torch.zeros(mask.shape, dtype=torch.long)
    for index, row in enumerate(rows):
        mask[index, : len(row)] = True
        positions[index, : len(row)] = torch.tensor(row) + shift[index]
    return mask, positions
