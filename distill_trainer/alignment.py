"""Two tokenizations of one text: where they meet, and how beliefs over one vocabulary read in the other."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from distill_trainer.errors import TokenizerError
from distill_trainer.losses.projection import project_logits_
from distill_trainer.tokens import CHARACTER_OF_BYTE, NO_BOUNDARY, check_byte_level, encode, token_bytes

ROLES = ("eos_token_id", "bos_token_id", "pad_token_id", "unk_token_id")


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
        exact: True where t and f(t) stand for the same bytes or role, bool, `(teacher_vocab_size,)`. None: nowhere.
    """

    student_ids: Tensor
    columns: Tensor
    matching_student_ids: Tensor
    matching_teacher_ids: Tensor
    reachable: Tensor

    def __init__(self, student_ids: Tensor, student_vocab_size: int, exact: Tensor | None = None):
        super().__init__()
        self.student_vocab_size = student_vocab_size
        self.register_buffer("student_ids", student_ids, persistent=False)
        columns = student_ids.masked_fill(student_ids < 0, student_vocab_size)
        self.register_buffer("columns", columns, persistent=False)
        teacher_ids = student_ids.new_zeros(0) if exact is None else exact.nonzero()[:, 0]
        # Where several teacher tokens stand for the same student token, the first counts.
        matching, place = torch.unique(student_ids[teacher_ids], return_inverse=True)
        first = torch.full_like(matching, len(student_ids)).scatter_reduce(0, place, teacher_ids, "amin")
        self.register_buffer("matching_student_ids", matching, persistent=False)
        self.register_buffer("matching_teacher_ids", first, persistent=False)
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
        exact = torch.zeros(teacher_vocab_size, dtype=torch.bool)
        special = _counterparts(teacher_tokenizer, student_tokenizer)
        student_special = _special_ids(student_tokenizer)
        known = {t: i for t, i in student_tokenizer.get_vocab().items() if i not in student_special}
        by_bytes: dict[bytes, set[int]] = {}
        for token, index in known.items():
            by_bytes.setdefault(token_bytes(token), set()).add(index)
        unmatched: dict[int, bytes] = {}
        for token, index in teacher_tokenizer.get_vocab().items():
            if index in special:
                student_ids[index], exact[index] = special[index], special[index] >= 0
            elif token in known:
                student_ids[index], exact[index] = known[token], True
            elif len(by_bytes.get(content := token_bytes(token), ())) == 1:
                student_ids[index], exact[index] = min(by_bytes[content]), True
            else:
                # None, or several as where an added token repeats another: the tokenizer's own choice decides.
                unmatched[index] = content
        for index, first in zip(unmatched, _first_tokens(student_tokenizer, list(unmatched.values())), strict=True):
            student_ids[index], exact[index] = first, first in by_bytes.get(unmatched[index], ())
        return cls(student_ids, student_vocab_size, exact)

    @property
    def matches(self) -> tuple[Tensor, Tensor]:
        """Student and teacher ids of the tokens that stand in both vocabularies, each once, `(num_matches,)`."""
        return self.matching_student_ids, self.matching_teacher_ids

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
        rows = teacher_logits.float().flatten(end_dim=-2).clone()
        logprobs, _ = self.log_probs_(rows, torch.zeros(len(rows), dtype=torch.long, device=rows.device))
        return logprobs.view(*teacher_logits.shape[:-1], self.student_vocab_size)

    def log_probs_(self, teacher_logits: Tensor, next_ids: Tensor) -> tuple[Tensor, Tensor]:
        """`log_probs` that overwrites the logits, and the teacher's own log-probability of a token in each row.

        Args:
            teacher_logits: Float32, `(num_rows, teacher_vocab_size)`.
            next_ids: The teacher's tokens, `(num_rows,)`.

        Returns:
            `(num_rows, student_vocab_size)` and `(num_rows,)`.
        """
        return project_logits_(teacher_logits, self.columns, next_ids, self.student_vocab_size)


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
