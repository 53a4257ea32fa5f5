"""Two tokenizations of one text: where they meet, and how beliefs over one vocabulary read in the other."""

import unicodedata

import torch
from tokenizers.normalizers import Normalizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from distill_trainer.errors import TokenizerError

# The alphabet of byte-level vocabularies (GPT-2): printable Latin-1 bytes are themselves, the rest follow from 256.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
CHARACTER_OF_BYTE = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(OTHERS)}
BYTE_OF_CHARACTER = {character: byte for byte, character in CHARACTER_OF_BYTE.items()}
ROLES = ("eos_token_id", "bos_token_id", "pad_token_id", "unk_token_id")
NO_BOUNDARY = -1
# More marks than any language puts on one character (Stream-Safe Text Format, Unicode Standard Annex 15).
LONGEST_GROUP = 31


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Token ids of a text, and where in the text each token ends.

    No special tokens are added, and text that looks like one is plain text. Ends are counted in characters of the
    original text, whatever the tokenizer normalises. They come from the tokens' own bytes, because reported offsets
    leave out characters that a normaliser composed, and blanks that a post-processor trims.

    Args:
        tokenizer: A fast tokenizer with a byte-level vocabulary.
        text: Any text.

    Returns:
        Ids and ends, equally long. An end is -1 where the tokens up to there do not hold exactly a prefix of the text:
        inside a character, or inside characters that the tokenizer normalises together. A character that the
        tokenizer leaves out, because its vocabulary lacks the byte (0x04 in SmolLM's), belongs to the next token.

    Raises:
        TokenizerError: If the tokenizer gives no offsets, is not byte-level, or changes the text.
    """
    check_byte_level(tokenizer)
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    normalized, ends = _normalization_ends(tokenizer, text)
    # Byte offset in the normalised text -> character offset in the original.
    end_at_byte: dict[int, int] = {}
    position, lost = 0, _lost_bytes(tokenizer)
    for index, character in enumerate(normalized, 1):
        position += len(character.encode("utf-8").translate(None, lost))
        if index in ends:
            end_at_byte.setdefault(position, ends[index])
    token_ends, consumed = [], 0
    for token in tokenizer.convert_ids_to_tokens(ids):
        consumed += len(token_bytes(token))
        token_ends.append(end_at_byte.get(consumed, NO_BOUNDARY))
    if consumed != position:
        raise TokenizerError(
            f"The tokenizer {type(tokenizer).__name__} does not keep the bytes of the text: {position} bytes went in, "
            f"{consumed} came out. Use a tokenizer that decodes to what it encoded."
        )
    return ids, token_ends


def token_bytes(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary stands for. An added token stands for its own text."""
    if all(character in BYTE_OF_CHARACTER for character in token):
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    return token.encode("utf-8")


def _lost_bytes(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """Bytes without a token, which the tokenizer silently leaves out of a text."""
    find = tokenizer.backend_tokenizer.token_to_id
    return bytes(byte for byte, character in CHARACTER_OF_BYTE.items() if find(character) is None)


def check_byte_level(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a `TokenizerError` unless it is a fast tokenizer whose tokens are written in the byte-level alphabet."""
    name = type(tokenizer).__name__
    if not tokenizer.is_fast:
        raise TokenizerError(
            f"The tokenizer {name} gives no offsets, so its tokens cannot be aligned with text. Use a fast tokenizer "
            "(one with a tokenizer.json)."
        )
    decoder = tokenizer.backend_tokenizer.decoder
    if decoder is None or b'"ByteLevel"' not in decoder.__getstate__():
        raise TokenizerError(
            f"The tokenizer {name} is not byte-level (as those of GPT-2, Llama 3, Qwen and SmolLM are). "
            "Only byte-level tokenizers can be aligned."
        )


def _normalization_ends(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, dict[int, int]]:
    """The text as the tokenizer normalises it, and which of its prefixes are those of which original prefixes.

    Returns:
        The normalised text, and a map from lengths of its prefixes to lengths of the original's, in characters.
    """
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is None or normalizer.normalize_str(text) == text:
        return text, {length: length for length in range(1, len(text) + 1)}
    ends, pieces, length, start = {}, [], 0, 0
    for stop in range(1, len(text) + 1):
        group = text[start:stop]
        if stop < len(text) and _joins(normalizer, group, text[stop]):
            continue
        pieces.append(normalizer.normalize_str(group))
        for cut in range(1, len(group)) if len(group) <= LONGEST_GROUP else ():
            head = normalizer.normalize_str(group[:cut])
            if head + normalizer.normalize_str(group[cut:]) == pieces[-1]:
                ends[length + len(head)] = start + cut
        length += len(pieces[-1])
        ends[length] = stop
        start = stop
    return "".join(pieces), ends


def _joins(normalizer: Normalizer, group: str, following: str) -> bool:
    """Whether a character combines with the ones before it, or normalises differently behind them."""
    if following.isascii():
        return False
    if unicodedata.combining(unicodedata.normalize("NFD", following)[0]):
        return True
    normalize = normalizer.normalize_str
    return normalize(group + following) != normalize(group) + normalize(following)


def merge_ends(student_ends: list[int], teacher_ends: list[int]) -> list[tuple[int, int]]:
    """Pairs of positions whose tokens end at the same place, by one walk over both lists."""
    pairs, teacher = [], 0
    for student, end in enumerate(student_ends):
        if end == NO_BOUNDARY:
            continue
        while teacher < len(teacher_ends) and teacher_ends[teacher] < end:
            teacher += 1
        if teacher < len(teacher_ends) and teacher_ends[teacher] == end:
            pairs.append((student, teacher))
    return pairs


def anchor_pairs(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    text: str,
    max_length: int | None = None,
) -> list[tuple[int, int]]:
    """Where both tokenizations of a text have read exactly the same: the anchors.

    Args:
        student_tokenizer: A fast byte-level tokenizer.
        teacher_tokenizer: Another, or the same.
        text: Any text.
        max_length: Only the first window of at most this many student tokens. None takes the whole text.

    Returns:
        `(student position, teacher position)` of every anchor, both strictly increasing, in the encodings without
        special tokens. For equal tokenizers every position that ends at a character is paired with itself.

    Raises:
        TokenizerError: If a tokenizer cannot be aligned.
    """
    student_ends = encode(student_tokenizer, text)[1]
    if max_length is not None and len(student_ends) > max_length:
        size = window_size(student_ends, max_length)
        text = text[: student_ends[size - 1]] if size else ""
        student_ends = student_ends[:size]
    return merge_ends(student_ends, encode(teacher_tokenizer, text)[1])


def window_size(ends: list[int], max_length: int) -> int:
    """How many tokens make the longest window of at most `max_length` that ends at a character; 0 if none does."""
    return next((size for size in range(min(max_length, len(ends)), 0, -1) if ends[size - 1] != NO_BOUNDARY), 0)


class VocabularyProjection(nn.Module):
    """The teacher's beliefs about the next token, read in the student's vocabulary.

    Each teacher token t gives all its mass to f(t), the first student token of its bytes: q(s) = sum of p(t) over
    f(t) = s. No mass is split or sorted; only rows that the student cannot write at all give none.

    Args:
        student_ids: f(t) for each row of the teacher's head, -1 where it has none (rows past the vocabulary),
            `(teacher_vocab_size,)`.
        student_vocab_size: Rows of the student's head.
    """

    student_ids: Tensor
    reachable: Tensor

    def __init__(self, student_ids: Tensor, student_vocab_size: int):
        super().__init__()
        self.student_vocab_size = student_vocab_size
        self.register_buffer("student_ids", student_ids, persistent=False)
        reachable = torch.zeros(student_vocab_size, dtype=torch.bool)
        reachable[student_ids[student_ids >= 0]] = True
        self.register_buffer("reachable", reachable, persistent=False)

    @classmethod
    def from_tokenizers(
        cls,
        teacher_tokenizer: PreTrainedTokenizerBase,
        student_tokenizer: PreTrainedTokenizerBase,
        teacher_vocab_size: int,
        student_vocab_size: int,
    ) -> "VocabularyProjection":
        """Build f from the tokenizers.

        End-of-text maps to the student's, another special token to that of its name, else of its role, else to none.

        Raises:
            TokenizerError: If a tokenizer is not byte-level, or has more tokens than its model has rows.
        """
        for tokenizer, size, side in (
            (teacher_tokenizer, teacher_vocab_size, "teacher"),
            (student_tokenizer, student_vocab_size, "student"),
        ):
            check_byte_level(tokenizer)
            if len(tokenizer) > size:
                raise TokenizerError(
                    f"The {side}'s tokenizer has {len(tokenizer)} tokens, its model only {size}. "
                    f"Use the tokenizer that the {side} was trained with."
                )
        student_ids = torch.full((teacher_vocab_size,), -1, dtype=torch.long)
        special = _counterparts(teacher_tokenizer, student_tokenizer)
        student_special = _special_ids(student_tokenizer)
        student_vocabulary = {
            token_bytes(token): index
            for token, index in student_tokenizer.get_vocab().items()
            if index not in student_special
        }
        unmatched: dict[int, bytes] = {}
        for token, index in teacher_tokenizer.get_vocab().items():
            if index in special:
                student_ids[index] = special[index]
            elif (content := token_bytes(token)) in student_vocabulary:
                student_ids[index] = student_vocabulary[content]
            else:
                unmatched[index] = content
        for index, first in zip(unmatched, _first_tokens(student_tokenizer, list(unmatched.values())), strict=True):
            student_ids[index] = first
        return cls(student_ids, student_vocab_size)

    def forward(self, teacher_probs: Tensor) -> Tensor:
        """Sum the mass of all teacher tokens that begin with the same student token.

        Args:
            teacher_probs: `(..., teacher_vocab_size)`.

        Returns:
            `(..., student_vocab_size)`, sums to the mass of the rows that have a student token.
        """
        real = self.student_ids >= 0
        projected = teacher_probs.new_zeros(*teacher_probs.shape[:-1], self.student_vocab_size)
        return projected.index_add(-1, self.student_ids.clamp(min=0), teacher_probs * real)

    def log_probs(self, teacher_logits: Tensor) -> Tensor:
        """Log of the projected softmax, with gradients to the logits.

        Args:
            teacher_logits: `(..., teacher_vocab_size)`. Rows that are no token get no mass.

        Returns:
            `(..., student_vocab_size)`, float32. The smallest normal float stands in for 0, so nothing is infinite.
        """
        logits = teacher_logits.float().masked_fill(self.student_ids < 0, -torch.inf)
        return self(torch.softmax(logits, dim=-1)).clamp(min=torch.finfo(torch.float32).tiny).log()


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {i for i, t in tokenizer.added_tokens_decoder.items() if t.special} | set(tokenizer.all_special_ids)


def _counterparts(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> dict[int, int]:
    """Student id of each special token of the teacher, -1 for those without a counterpart."""
    named = {student.convert_ids_to_tokens(index): index for index in _special_ids(student)}
    special = {index: named.get(teacher.convert_ids_to_tokens(index), -1) for index in _special_ids(teacher)}
    for role in reversed(ROLES):
        own, other = getattr(teacher, role), getattr(student, role)
        # End-of-text goes by its role. Else a name says more: Qwen's padding is another model's end-of-text.
        if own is not None and other is not None and (role == "eos_token_id" or special[own] < 0):
            special[own] = other
    return special


def _first_tokens(tokenizer: PreTrainedTokenizerBase, contents: list[bytes]) -> list[int]:
    """First token of each byte string in the tokenizer's own encoding, -1 where it encodes to nothing."""
    texts, positions, first = [], [], [-1] * len(contents)
    for position, content in enumerate(contents):
        try:
            texts.append(content.decode("utf-8"))
            positions.append(position)
        except UnicodeDecodeError:
            # Pieces of characters never pass the pre-tokenizer: the merges alone decide.
            pieces = tokenizer.backend_tokenizer.model.tokenize("".join(CHARACTER_OF_BYTE[byte] for byte in content))
            first[position] = pieces[0].id if pieces else -1
    if texts:
        encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for position, ids in zip(positions, encoded, strict=True):
            first[position] = ids[0] if ids else -1
    return first
