"""Defects that these tests catch: mass moved the wrong way, mass added without being removed, a missing floor, an
infinite or NaN gradient, rows changed that have nothing to correct, more than one copy of the vocabulary.
"""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast

from distill_trainer.alignment import VocabularyProjection, anchor_pairs
from distill_trainer.losses.span_correction import correct_spans

NONE = float("-inf")
TINY = torch.finfo(torch.float32).tiny
FLOOR = math.log(TINY)


def random_case(seed: int, vocab_size: int = 7, dtype=torch.float32):
    """Six rows: three to correct, and one of each kind that stays."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = (3 * torch.randn(6, vocab_size, generator=generator, dtype=dtype)).log_softmax(-1)
    first_ids, true_ids = torch.tensor([0, 5, 6, 2, -1, 4]), torch.tensor([3, 1, 0, 2, 3, 1])
    share = torch.rand(6, generator=generator, dtype=dtype).clamp(min=1e-3)
    span = logprobs.gather(1, first_ids.clamp(min=0)[:, None])[:, 0] + share.log()
    span[5] = NONE
    return logprobs, first_ids, true_ids, span


def reference(logprobs, first_ids, true_ids, span_logprobs):
    """The definition, one anchor at a time, in probabilities and float64."""
    rows = []
    for row, first, true, span in zip(logprobs.double(), first_ids, true_ids, span_logprobs.double(), strict=True):
        moved = torch.zeros_like(row)
        if first >= 0 and first != true:
            moved[first], moved[true] = -1.0, 1.0
        rows.append((row.exp() + moved * span.exp()).log())
    return torch.stack(rows)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**31 - 1))
def test_matches_the_definition_and_keeps_the_mass(seed):
    case = random_case(seed)
    corrected = correct_spans(*case)
    torch.testing.assert_close(corrected.double(), reference(*case), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(corrected.exp().sum(-1), torch.ones(6), atol=1e-6, rtol=0)
    double = random_case(seed, dtype=torch.float64)
    torch.testing.assert_close(correct_spans(*double), reference(*double), atol=1e-10, rtol=1e-10)


def test_the_share_leaves_the_first_piece_and_reaches_the_true_token():
    logprobs = torch.tensor([[0.5, 0.3, 0.2]]).log()
    corrected = correct_spans(logprobs, torch.tensor([0]), torch.tensor([2]), torch.tensor([0.4]).log())
    torch.testing.assert_close(corrected.exp(), torch.tensor([[0.1, 0.3, 0.6]]))


def test_rows_without_a_correction_stay_as_they_are_bit_for_bit():
    logprobs, first_ids, true_ids, span = random_case(seed=1)
    # Not lifted to the floor either.
    logprobs[3:] -= 200
    corrected = correct_spans(logprobs, first_ids, true_ids, span)
    assert torch.equal(corrected[3:], logprobs[3:])
    changed = corrected != logprobs
    assert changed.sum(-1).tolist() == [2, 2, 2, 0, 0, 0]
    none = correct_spans(logprobs, first_ids, true_ids, torch.full((6,), NONE))
    assert torch.equal(none, logprobs)


def test_the_given_distribution_is_not_changed_in_place():
    logprobs, *rest = random_case(seed=2)
    before = logprobs.clone()
    correct_spans(logprobs, *rest)
    assert torch.equal(logprobs, before)


def test_no_anchors_give_an_empty_result_with_a_gradient_path():
    logprobs = torch.zeros(0, 7, requires_grad=True)
    ids = torch.zeros(0, dtype=torch.long)
    corrected = correct_spans(logprobs, ids, ids, torch.zeros(0))
    assert corrected.shape == (0, 7)
    corrected.sum().backward()
    assert logprobs.grad.shape == (0, 7)


def test_gradients_are_those_of_finite_differences():
    logprobs, first_ids, true_ids, span = (tensor[:5] for tensor in random_case(seed=3, dtype=torch.float64))
    inputs = logprobs.requires_grad_(), span.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, log_p: correct_spans(q, first_ids, true_ids, log_p), inputs)


def test_rows_without_a_correction_pass_their_gradient_on_and_give_the_span_none():
    logprobs, first_ids, true_ids, span = random_case(seed=4)
    logprobs.requires_grad_()
    span.requires_grad_()
    weights = torch.rand(6, 7)
    (correct_spans(logprobs, first_ids, true_ids, span) * weights).sum().backward()
    assert torch.equal(logprobs.grad[3:], weights[3:])
    assert span.grad[3:].eq(0).all() and span.grad[:3].ne(0).all()
    assert logprobs.grad.isfinite().all() and span.grad.isfinite().all()


@pytest.mark.parametrize("above", [0.0, 1e-6, 1e-3], ids=["all of it", "rounded up", "far too much"])
def test_at_most_the_mass_of_the_first_piece_is_moved(above):
    logprobs = torch.tensor([[0.5, 0.5 - TINY, TINY]]).log().requires_grad_()
    span = (logprobs.detach()[:, 0] + above).requires_grad_()
    corrected = correct_spans(logprobs, torch.tensor([0]), torch.tensor([2]), span)
    assert corrected[0, 0] == torch.tensor(TINY).log()
    torch.testing.assert_close(corrected.exp(), torch.tensor([[TINY, 0.5, 0.5]]))
    (100 * corrected).sum().backward()
    assert logprobs.grad.isfinite().all() and span.grad.isfinite().all()


@pytest.mark.parametrize("below", [0.0, 1e-7, 1e-3, 5.0, 60.0, 500.0])
@pytest.mark.parametrize("true", [0.0, -1.0, FLOOR])
@pytest.mark.parametrize("first", [0.0, -1.0, -60.0, -85.0, FLOOR])
def test_values_and_gradients_are_finite_at_the_extremes(first, true, below):
    logprobs = torch.tensor([[first, true, -5.0]], requires_grad=True)
    span = torch.tensor([first - below], requires_grad=True)
    corrected = correct_spans(logprobs, torch.tensor([0]), torch.tensor([1]), span)
    assert corrected.isfinite().all() and corrected.min() >= FLOOR - 1e-5
    torch.testing.assert_close(corrected.exp().sum(), logprobs.exp().sum(), atol=1e-6, rtol=1e-6)
    (1e3 * corrected).sum().backward()
    assert logprobs.grad.isfinite().all() and span.grad.isfinite().all()


def test_a_span_that_is_no_number_is_not_hidden():
    logprobs, first_ids, true_ids, span = random_case(seed=5)
    span[0] = float("nan")
    assert correct_spans(logprobs, first_ids, true_ids, span)[0].isnan().any()


class LargeResults(TorchDispatchMode):
    """Counts the operations that give at least so many elements."""

    def __init__(self, size):
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += isinstance(result, torch.Tensor) and result.numel() >= self.size
        return result


def test_the_vocabulary_is_copied_once():
    logprobs, *rest = random_case(seed=6, vocab_size=1000)
    with LargeResults(logprobs.numel() // 2) as large:
        correct_spans(logprobs, *rest)
    assert large.count == 1


# What follows compares with the exact answer on tokenizers so small that everything can be enumerated.


def letter_tokenizer(letters, merges):
    """Byte-level BPE over a few letters, in one piece however long the text."""
    tokens = [*letters, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def ids_of(tokenizer, texts):
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def first_token_of_texts(student, letters, longest=7):
    """Student's first token of every text of the length from which on it no longer changes, and that length.

    It is the shortest after which no further letters change the first token of any text of up to `longest` letters.
    """
    texts = ["".join(text) for n in range(1, longest + 1) for text in itertools.product(letters, repeat=n)]
    first = {text: ids[0] for text, ids in zip(texts, ids_of(student, texts), strict=True)}
    length = next(
        n for n in range(1, longest) if all(first[text[:n]] == token for text, token in first.items() if len(text) > n)
    )
    return {text: token for text, token in first.items() if len(text) == length}, length


def exact_distribution(table, tokens, previous, first_tokens, student_vocab_size):
    """Student's next-token distribution, by the sum over all teacher tokens that may follow `previous`."""
    known, length = first_tokens
    exact = torch.zeros(student_vocab_size, dtype=torch.float64)
    paths = [("", previous, 1.0)]
    while paths:
        text, last, probability = paths.pop()
        if len(text) >= length:
            exact[known[text[:length]]] += probability
        else:
            following = enumerate(table[last].tolist())
            paths += [(text + tokens[i], i, probability * share) for i, share in following if share > 0]
    return exact


def random_table(teacher, seed, *, canonical):
    """A teacher that knows the last token alone: p(next | previous), `(vocab_size, vocab_size)`, float64.

    A canonical one writes each text in the one way that its tokenizer does, as trained models nearly do; any other
    also gives mass to other spellings.
    """
    size, tokens = len(teacher), teacher.convert_ids_to_tokens(range(len(teacher)))
    table = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp()
    if canonical:
        for previous, following in itertools.product(range(size), repeat=2):
            if ids_of(teacher, [tokens[previous] + tokens[following]]) != [[previous, following]]:
                table[previous, following] = 0
    return table / table.sum(-1, keepdim=True)


def sample(table, num_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = [0]
    for _ in range(num_tokens):
        ids.append(int(torch.multinomial(table[ids[-1]], 1, generator=generator)))
    return ids


def spans_of(student, teacher, text, table, projection):
    """Of every anchor that has a next one: the teacher's token, f(t1), s, and log P where s takes several tokens."""
    student_ids, teacher_ids = ids_of(student, [text])[0], ids_of(teacher, [text])[0]
    rows = []
    for (i, j), (next_i, next_j) in itertools.pairwise(anchor_pairs(student, teacher, text)):
        several = next_i == i + 1 and next_j > j + 1
        path = itertools.pairwise(teacher_ids[j : next_j + 1])
        span = math.fsum(math.log(table[a, b]) for a, b in path) if several else NONE
        rows.append((teacher_ids[j], int(projection.student_ids[teacher_ids[j + 1]]), student_ids[i + 1], span))
    previous, first_ids, true_ids, spans = zip(*rows, strict=True)
    return previous, torch.tensor(first_ids), torch.tensor(true_ids), torch.tensor(spans, dtype=torch.float64)


class Errors(NamedTuple):
    """Mean distance from the exact answer, of the plain projection and of the corrected one `(2,)`, or their ratio.

    Attributes:
        true_token: |q(s) - q*(s)| at anchors whose true next token s takes several teacher tokens.
        variation: Total variation of q and q* at the same anchors.
        variation_of_all: Total variation at all anchors.
    """

    true_token: Tensor | float
    variation: Tensor | float
    variation_of_all: Tensor | float


def measure(letters, teacher_merges, student_merges, *, canonical, seed, num_tokens=1000):
    teacher, student = letter_tokenizer(letters, teacher_merges), letter_tokenizer(letters, student_merges)
    tokens = teacher.convert_ids_to_tokens(range(len(teacher)))
    table = random_table(teacher, seed, canonical=canonical)
    projection = VocabularyProjection.from_tokenizers(teacher, student, len(teacher), len(student))
    first_tokens = first_token_of_texts(student, letters)
    exact_after = [exact_distribution(table, tokens, i, first_tokens, len(student)) for i in range(len(teacher))]
    torch.testing.assert_close(torch.stack(exact_after).sum(-1), torch.ones(len(teacher), dtype=torch.float64))

    ids = sample(table, num_tokens, seed)
    text = "".join(tokens[i] for i in ids)
    assert not canonical or ids_of(teacher, [text]) == [ids]
    previous, *spans = spans_of(student, teacher, text, table, projection)
    exact = torch.stack([exact_after[i] for i in previous])
    plain = projection(table)[list(previous)].clamp(min=TINY)
    corrected = correct_spans(plain.log(), *spans).exp()

    several = ~spans[-1].isneginf()
    assert several.sum() > 5
    true_ids = spans[1].unsqueeze(1)
    at_true = [(q - exact).gather(1, true_ids)[:, 0].abs() for q in (plain, corrected)]
    variation = [(q - exact).abs().sum(-1) / 2 for q in (plain, corrected)]
    return Errors(
        torch.stack([error[several].mean() for error in at_true]),
        torch.stack([error[several].mean() for error in variation]),
        torch.stack([error.mean() for error in variation]),
    )


def test_a_token_with_a_single_spelling_gets_its_exact_probability():
    teacher, student = letter_tokenizer("ab", []), letter_tokenizer("ab", [("a", "b")])
    table = torch.tensor([[0.7, 0.3], [0.6, 0.4]], dtype=torch.float64)
    # Behind "b": "ab" with 0.6 * 0.3, "a" that no "b" follows with 0.6 * 0.7, "b" with 0.4.
    exact = exact_distribution(table, "ab", 1, first_token_of_texts(student, "ab"), 3)
    torch.testing.assert_close(exact, torch.tensor([0.42, 0.4, 0.18], dtype=torch.float64))

    projection = VocabularyProjection.from_tokenizers(teacher, student, 2, 3)
    previous, *spans = spans_of(student, teacher, "bab", table, projection)
    assert previous == (1,) and spans[1].tolist() == [2]
    plain = projection(table)[[1]].clamp(min=TINY)
    torch.testing.assert_close(plain[0], torch.tensor([0.6, 0.4, 0.0], dtype=torch.float64))
    torch.testing.assert_close(correct_spans(plain.log(), *spans).exp()[0], exact)


LETTERS = "abc"
# Student tokens of up to three teacher tokens, whose ends are ends of the teacher's.
NESTED = [("a", "b")], [("a", "b"), ("ab", "c"), ("c", "c"), ("b", "a"), ("abc", "cc")]
# Teacher tokens that reach over the ends of the student's.
CROSSING = [("a", "a"), ("c", "b")], [("a", "b"), ("ab", "c"), ("b", "b"), ("c", "a"), ("ca", "b")]


@pytest.mark.parametrize("merges", [NESTED, CROSSING], ids=["nested", "crossing"])
def test_the_enumeration_goes_as_far_as_the_first_token_depends_on_the_text(merges):
    """In a long text too, where each token is the first one of the rest."""
    student = letter_tokenizer(LETTERS, merges[1])
    known, length = first_token_of_texts(student, LETTERS)
    draws = torch.randint(len(LETTERS), (4000,), generator=torch.Generator().manual_seed(0))
    text = "".join(LETTERS[i] for i in draws)
    for index in ids_of(student, [text])[0]:
        assert known.get(text[:length], index) == index
        text = text.removeprefix(student.convert_ids_to_tokens(index))
    assert not text


@pytest.mark.parametrize(
    "merges, canonical, at_most",
    [
        (NESTED, True, Errors(0.03, 0.45, 0.88)),
        (NESTED, False, Errors(0.12, 0.6, 0.93)),
        (CROSSING, True, Errors(0.6, 0.75, 0.95)),
        (CROSSING, False, Errors(0.6, 0.8, 0.99)),
    ],
    ids=["nested", "nested, any spelling", "crossing", "crossing, any spelling"],
)
def test_the_correction_brings_the_projection_nearer_to_the_exact_answer(merges, canonical, at_most):
    """The bounds are fractions of the plain projection's error."""
    runs = [measure(LETTERS, *merges, canonical=canonical, seed=seed) for seed in range(4)]
    for name, errors, bound in zip(Errors._fields, zip(*runs, strict=True), at_most, strict=True):
        plain, corrected = torch.stack(errors).mean(0).tolist()
        assert plain > 0.05, name
        assert corrected <= bound * plain, name
