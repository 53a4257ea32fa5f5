"""Where two tokenizers have read the same text, and a teacher's beliefs in the student's vocabulary.

Both tokenizers must be byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM, OLMo, ...): there a token is a string of bytes, so
that the end of every token is known from the tokens alone. The offsets that tokenizers report are not used: for text
that a normaliser composes they cover only the first of the composed characters.
"""

import math
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from unicodedata import normalize

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from distill_trainer.errors import ConfigurationError, TokenizerError


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: the byte of each character that may stand in a byte-level token's string."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTE_OF_LETTER = _byte_alphabet()
LETTER_OF_BYTE = {byte: letter for letter, byte in BYTE_OF_LETTER.items()}


class TokenBytes:
    """The bytes of every token of a byte-level BPE tokenizer.

    Args:
        tokenizer: A fast tokenizer.

    Attributes:
        of_id: Bytes of each token, a list of `num_rows` (highest token id + 1). Empty for ids that are no token.
        lengths: Number of bytes of each token, `(num_rows,)`.
        special_ids: Tokens that stand for no text, such as end-of-text.
        id_of_bytes: The token that holds exactly these bytes, special tokens excluded.
        absent: Finds a byte that has no token (SmolLM's vocabulary lacks some control characters: its tokenizer drops
            them silently). None when every byte has one.

    Raises:
        TokenizerError: If tokens are not strings of bytes, or text is changed by more than canonical composition.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        _check_byte_level(tokenizer)
        vocabulary = tokenizer.get_vocab()
        added = {index: token for index, token in tokenizer.added_tokens_decoder.items()}
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self.of_id = [b""] * (max(vocabulary.values()) + 1)
        try:
            for token, index in vocabulary.items():
                self.of_id[index] = token.encode() if index in added else bytes(BYTE_OF_LETTER[c] for c in token)
        except KeyError as error:
            raise TokenizerError(
                f"{_name(tokenizer)} must be a byte-level BPE tokenizer, got the token {token!r}, which is no string of "
                "bytes. Choose a model of the GPT-2, Llama 3, Qwen or SmolLM kind."
            ) from error
        self.lengths = np.array([len(piece) for piece in self.of_id])
        # Added tokens come last: where one repeats the bytes of a normal token, the tokenizer chooses the added one.
        order = sorted(vocabulary.values(), key=added.__contains__)
        self.id_of_bytes = {self.of_id[index]: index for index in order if index not in self.special_ids}
        absent = [byte for byte in range(256) if bytes([byte]) not in self.id_of_bytes]
        self.absent = re.compile(b"[" + b"".join(re.escape(bytes([byte])) for byte in absent) + b"]") if absent else None


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__


def _check_byte_level(tokenizer: PreTrainedTokenizerBase) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise TokenizerError(
            f"{_name(tokenizer)} must be a fast tokenizer, got {type(tokenizer).__name__}, which gives no offsets. "
            "Load it with AutoTokenizer and install the package 'tokenizers', or choose another model."
        )
    backend = tokenizer.backend_tokenizer
    if type(backend.model).__name__ != "BPE":
        raise TokenizerError(
            f"{_name(tokenizer)} must be a byte-level BPE tokenizer, got a {type(backend.model).__name__} model. "
            "Choose a model of the GPT-2, Llama 3, Qwen or SmolLM kind."
        )
    normalisers = set(re.findall(r"(\w+)\(", repr(backend.normalizer))) - {"Sequence"}
    if not normalisers <= {"NFC", "NFD"} or "add_prefix_space=True" in repr(backend.pre_tokenizer):
        raise TokenizerError(
            f"{_name(tokenizer)} must read the text as it is (at most NFC or NFD), got {backend.normalizer!r} and "
            f"{backend.pre_tokenizer!r}. Load it with add_prefix_space=False, or choose another model."
        )


_TOKEN_BYTES: "weakref.WeakKeyDictionary[PreTrainedTokenizerBase, TokenBytes]" = weakref.WeakKeyDictionary()


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
    """The tokenizer's `TokenBytes`, made once and again only after tokens were added."""
    known = _TOKEN_BYTES.get(tokenizer)
    if known is None or sum(map(bool, known.of_id)) != len(tokenizer):
        known = _TOKEN_BYTES[tokenizer] = TokenBytes(tokenizer)
    return known


@dataclass(frozen=True)
class TokenEnds:
    """A text's tokens and where each ends.

    Attributes:
        input_ids: The tokens, special tokens excluded, `(num_tokens,)`.
        read: The text as the tokenizer reads it: normalised, and up to the first character that it drops.
        read_ends: Characters of `read` up to the end of each token, `(num_tokens,)`. -1 where the token ends inside a
            character or behind `read`. Increasing where not -1.
        ends: The same in characters of the original text; -1 also where a normaliser moved or composed characters
            across the token's end.
        complete: False when the tokenizer dropped a character.
    """

    input_ids: np.ndarray
    read: str
    read_ends: np.ndarray
    ends: np.ndarray
    complete: bool

    def part(self, start: int, stop: int) -> "TokenEnds":
        """The tokens from `start` to `stop` (excluded) as a text of their own; both must be at ends of the text."""
        read_start, text_start = (self.read_ends[start - 1], self.ends[start - 1]) if start else (0, 0)

        def shifted(ends: np.ndarray, by: int) -> np.ndarray:
            return np.where(ends[start:stop] < 0, -1, ends[start:stop] - by)

        return TokenEnds(
            input_ids=self.input_ids[start:stop],
            read=self.read[read_start : self.read_ends[stop - 1]],
            read_ends=shifted(self.read_ends, read_start),
            ends=shifted(self.ends, text_start),
            complete=self.complete,
        )


def equivalent_offsets(first: str, second: str) -> np.ndarray:
    """For each offset of `first` the offset of `second` where both have read canonically equivalent text, else -1.

    The strings are normalisations of one text, or beginnings of such. Composition merges characters and canonical
    ordering moves combining marks past each other, so two prefixes are equivalent exactly when their decompositions hold
    the same letters (https://www.unicode.org/reports/tr15/, definition D70 of the standard). Every character is read once.

    Returns:
        `(len(first) + 1,)`, increasing where not -1.
    """
    offsets = np.full(len(first) + 1, -1)
    offsets[0] = 0
    strings, read, letters = (first, second), [0, 0], [0, 0]
    unmatched: dict[str, int] = {}
    while read[side := int(letters[0] > letters[1])] < len(strings[side]):
        for letter in normalize("NFD", strings[side][read[side]]):
            letters[side] += 1
            unmatched[letter] = unmatched.get(letter, 0) + (1, -1)[side]
            if unmatched[letter] == 0:
                del unmatched[letter]
        read[side] += 1
        if not unmatched:
            offsets[read[0]] = read[1]
    return offsets


def _read_text(table: TokenBytes, input_ids: np.ndarray, text: str, normaliser) -> tuple[str, bool]:
    """The text that the tokens hold up to the first character that was dropped, and whether none was."""
    pieces = b"".join([table.of_id[index] for index in input_ids])
    if table.absent is not None:
        normalised = (text if normaliser is None else normaliser.normalize_str(text)).encode()
        if dropped := table.absent.search(normalised):
            return normalised[: dropped.start()].decode(errors="ignore"), False
    return pieces.decode(), True


def _character_ends(byte_ends: np.ndarray, text: str) -> np.ndarray:
    """Characters of `text` up to each number of UTF-8 bytes, -1 inside a character or behind the text."""
    encoded = np.frombuffer(text.encode(), dtype=np.uint8)
    # One more start behind the last byte: the end of the text is the end of a character.
    starts = np.append((encoded & 0xC0) != 0x80, True)
    characters = np.where(starts, np.cumsum(starts) - 1, -1)
    return np.where(byte_ends < len(starts), characters[np.minimum(byte_ends, len(encoded))], -1)


def token_ends(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[TokenEnds]:
    """Tokens of each text and their ends, in time linear in the texts' lengths.

    What looks like a special token is read as plain text, and no special token is added.

    Raises:
        TokenizerError: If the tokenizer is not a fast byte-level BPE.
    """
    table = token_bytes(tokenizer)
    if not texts:
        return []
    # pylint-free one call for all: the Rust side encodes in parallel. verbose=False: documents may pass the model's length.
    encoded = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    results = []
    for text, token_list in zip(texts, encoded):
        input_ids = np.asarray(token_list, dtype=np.int64)
        read, complete = _read_text(table, input_ids, text, tokenizer.backend_tokenizer.normalizer)
        read_ends = ends = _character_ends(np.cumsum(table.lengths[input_ids]), read)
        if read != text[: len(read)]:
            ends = np.where(read_ends < 0, -1, equivalent_offsets(read, text)[read_ends])
        results.append(TokenEnds(input_ids, read, read_ends, ends, complete))
    return results


def shared_ends(student: TokenEnds, teacher: TokenEnds) -> list[tuple[int, int]]:
    """The anchors: (student position, teacher position) of all tokens after which both have read the same text.

    "The same" is up to canonical equivalence, which is all that normalisers may change. Linear in the lengths.
    """
    teacher_position = np.full(len(teacher.read) + 1, -1)
    (whole,) = np.nonzero(teacher.read_ends >= 0)
    teacher_position[teacher.read_ends[whole]] = whole
    (candidates,) = np.nonzero(student.read_ends >= 0)
    offsets = student.read_ends[candidates]
    if student.read != teacher.read:
        offsets = equivalent_offsets(student.read, teacher.read)[offsets]
    partners = np.where(offsets < 0, -1, teacher_position[offsets])
    return [(int(i), int(j)) for i, j in zip(candidates, partners) if j >= 0]


def window_bounds(student: TokenEnds, max_length: int) -> list[tuple[int, int]]:
    """Cuts a text into windows (start, stop) of at most `max_length` student tokens, each as long as it can be.

    Cuts are where the text has a character boundary. Tokens from which no cut is within reach are left out.
    """
    (cuts,) = np.nonzero(student.ends >= 0)
    bounds, start, last = [], 0, 0
    for cut in cuts.tolist():
        stop = cut + 1
        if stop - start > max_length:
            if last > start:
                bounds.append((start, last))
            start = last if stop - last <= max_length else stop
        last = stop
    return [*bounds, (start, last)] if last > start else bounds


def anchor_pairs(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    text: str,
    max_length: int | None = None,
) -> list[tuple[int, int]]:
    """Anchors of one text: where both tokenizers have read exactly the same characters.

    Args:
        student_tokenizer: Fast byte-level BPE tokenizer.
        teacher_tokenizer: The same kind, any vocabulary.
        text: Any text.
        max_length: Only the first window, of at most this many student tokens. None takes the whole text.

    Returns:
        (student position, teacher position) in the encodings without special tokens, both strictly increasing.

    Raises:
        TokenizerError: If a tokenizer is not a fast byte-level BPE.
    """
    (student,) = token_ends(student_tokenizer, [text])
    if max_length is not None and len(student.input_ids) > max_length:
        bounds = window_bounds(student, max_length)
        if not bounds or bounds[0][0] > 0:
            token_bytes(teacher_tokenizer)
            return []
        student, text = student.part(*bounds[0]), text[: student.ends[bounds[0][1] - 1]]
    (teacher,) = token_ends(teacher_tokenizer, [text])
    return shared_ends(student, teacher)


class VocabularyProjection(nn.Module):
    """Teacher probabilities over the student's vocabulary: q(s) = sum of p(t) over the teacher tokens t with f(t) = s.

    f(t) is the student token of t's bytes, or the first token of the student's own encoding of them. Every bit of mass
    of a real token is kept; rows past the teacher's vocabulary and special tokens without a counterpart give none.

    Args:
        student_ids: f(t), -1 where a row has no counterpart, `(teacher_vocab_size,)`.
        student_vocab_size: Rows of the student's output layer.
    """

    student_ids: Tensor
    reachable: Tensor

    def __init__(self, student_ids: Tensor, student_vocab_size: int):
        super().__init__()
        self.student_vocab_size = student_vocab_size
        reachable = torch.zeros(student_vocab_size, dtype=torch.bool)
        reachable[student_ids[student_ids >= 0]] = True
        # Made from the tokenizers at every start, so no checkpoint holds them.
        self.register_buffer("student_ids", student_ids, persistent=False)
        self.register_buffer("reachable", reachable, persistent=False)

    @classmethod
    def from_tokenizers(
        cls,
        teacher_tokenizer: PreTrainedTokenizerBase,
        student_tokenizer: PreTrainedTokenizerBase,
        teacher_vocab_size: int,
        student_vocab_size: int,
    ) -> "VocabularyProjection":
        """The projection between two byte-level BPE tokenizers; sizes are the rows of the models' output layers.

        Raises:
            TokenizerError: If a tokenizer is not a fast byte-level BPE.
            ConfigurationError: If a model has fewer rows than its tokenizer has tokens.
        """
        teacher, student = token_bytes(teacher_tokenizer), token_bytes(student_tokenizer)
        for field, size, table in (
            ("teacher_vocab_size", teacher_vocab_size, teacher),
            ("student_vocab_size", student_vocab_size, student),
        ):
            if size < len(table.of_id):
                raise ConfigurationError(
                    f"{field} must be at least the tokenizer's {len(table.of_id)} tokens, got {size}. "
                    "Load the model and the tokenizer from the same place, or resize the model's embeddings."
                )
        first = torch.full((teacher_vocab_size,), -1)
        first[: len(teacher.of_id)] = torch.tensor(_first_student_tokens(teacher, student, student_tokenizer))
        for index, counterpart in _special_counterparts(teacher_tokenizer, student_tokenizer).items():
            first[index] = counterpart
        return cls(first, student_vocab_size)

    def forward(self, teacher_probs: Tensor) -> Tensor:
        """Projects `(..., teacher_vocab_size)` to `(..., student_vocab_size)`; keeps the dtype.

        The result sums to the mass of the tokens that have a counterpart.
        """
        # Rows without a counterpart fall into one more bucket, which is cut off.
        target = torch.where(self.student_ids < 0, self.student_vocab_size, self.student_ids)
        projected = teacher_probs.new_zeros(*teacher_probs.shape[:-1], self.student_vocab_size + 1)
        return projected.index_add(-1, target, teacher_probs)[..., :-1]

    def log_probs(self, teacher_logits: Tensor) -> Tensor:
        """Log of the projected softmax of `(..., teacher_vocab_size)`, float32, `(..., student_vocab_size)`, in nats.

        Values are at least log(1.2e-38), so that student tokens that receive no mass stay finite.
        """
        tiny = torch.finfo(torch.float32).tiny
        return self(teacher_logits.float().softmax(dim=-1)).clamp(min=tiny).log()
