"""Defects that these tests catch, over all four: a missing or doubled temperature factor, one side's temperature left
out, swapped direction, a mean over outcomes, arithmetic in bfloat16, a teacher that receives gradient, NaN from -inf.

Top-k: the student's top k in place of the teacher's, no bucket for the rest, renormalised top k, softening after the
coarse-graining, log(1 - sum) for the bucket, a NaN gradient from an empty bucket, a `top_k` above the vocabulary size.
ULD: unsorted or ascending probabilities, truncation in place of padding, L2 in place of L1.
Hybrid: matches paired in another order, no bucket, matched tokens left among the unmatched, unmatched probabilities
renormalised, the wrong factor on either term, a NaN gradient from unmatched tokens that are all padding.
ALM: one outcome only, 1 - p softened by itself, a logarithm of 1 - p that cancels near either end, an infinite
gradient at p = 1, a floor that keeps a very unlikely student from learning.
"""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_trainer.errors import ConfigurationError
from distill_trainer.losses.cross_tokenizer import alm_divergence, hybrid_distance, top_k_divergence, uld_distance
from distill_trainer.losses.logits import LOGPROB_FLOOR, divergence, tempered_logprobs

DIRECTIONS = ["forward", "reverse", "js"]
TEMPERATURES = [0.5, 1.0, 4.0]
INF = float("inf")
STUDENT_MATCHES, TEACHER_MATCHES = torch.tensor([4, 0, 6]), torch.tensor([1, 9, 3])


def normal(seed: int, *shape: int) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(name: str, seed: int = 0, num_rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """What the student and the teacher give to the function of that name."""
    student, teacher = normal(seed, num_rows, 7), normal(seed + 1, num_rows, 11)
    if name == "top_k":
        return student, teacher[:, :7].log_softmax(dim=-1)
    if name == "alm":
        return -student[:, 0].exp(), -teacher[:, 0].exp()
    return student, teacher


def call(name, student, teacher, temperature=1.0, direction="forward"):
    if name == "uld":
        return uld_distance(student, teacher, temperature=temperature)
    settings = {"temperature": temperature, "direction": direction}
    if name == "top_k":
        return top_k_divergence(student, teacher, top_k=3, **settings)
    if name == "hybrid":
        return hybrid_distance(student, teacher, STUDENT_MATCHES, TEACHER_MATCHES, **settings)
    return alm_divergence(student, teacher, **settings)


def reference_divergence(student, teacher, direction):
    """The definition over two lists of probabilities. One of 0 has the logarithm -87."""
    value = torch.zeros((), dtype=torch.float64)
    for q, p in zip(student, teacher, strict=True):
        m = (p + q) / 2
        log_q, log_p, log_m = (x.log() if x > 0 else torch.tensor(-87.0).double() for x in (q, p, m))
        terms = {
            "forward": p * (log_p - log_q),
            "reverse": q * (log_q - log_p),
            "js": (p * (log_p - log_m) + q * (log_q - log_m)) / 2,
        }
        value = value + terms[direction]
    return value


def reference_distance(student, teacher):
    """Sum of differences between the most likely of both, the second most likely of both, and so on."""
    student, teacher = (sorted(probs, key=torch.Tensor.item, reverse=True) for probs in (student, teacher))
    value = torch.zeros((), dtype=torch.float64)
    for i in range(max(len(student), len(teacher))):
        q, p = (probs[i] if i < len(probs) else 0 for probs in (student, teacher))
        value = value + abs(q - p)
    return value


def reference_row(name, student, teacher, temperature, direction):
    """One row of the function of that name, in float64."""
    if name == "alm":
        q, p = (torch.exp(x.double() / temperature) for x in (student, teacher))
        return temperature * reference_divergence([q, 1 - q], [p, 1 - p], direction)
    student, teacher = (list((x.double() / temperature).softmax(dim=-1)) for x in (student, teacher))
    if name == "uld":
        return temperature * reference_distance(student, teacher)
    if name == "top_k":
        student_ids = teacher_ids = sorted(range(7), key=lambda i: -float(teacher[i]))[:3]
    else:
        student_ids, teacher_ids = STUDENT_MATCHES.tolist(), TEACHER_MATCHES.tolist()
    student_rest = [q for i, q in enumerate(student) if i not in student_ids]
    teacher_rest = [p for i, p in enumerate(teacher) if i not in teacher_ids]
    value = temperature**2 * reference_divergence(
        [student[i] for i in student_ids] + [sum(student_rest)],
        [teacher[i] for i in teacher_ids] + [sum(teacher_rest)],
        direction,
    )
    return value + (temperature * reference_distance(student_rest, teacher_rest) if name == "hybrid" else 0)


def value_and_gradient(function, student, *args, **kwargs):
    student = student.detach().clone().requires_grad_()
    value = function(student, *args, **kwargs)
    value.sum().backward()
    return value.detach(), student.grad


NAMES_AND_DIRECTIONS = [("uld", None)] + [(n, d) for n in ("top_k", "hybrid", "alm") for d in DIRECTIONS]
each_function = pytest.mark.parametrize(("name", "direction"), NAMES_AND_DIRECTIONS)
each_direction = pytest.mark.parametrize("direction", DIRECTIONS)


def check_definition(name, student, teacher, temperature, direction):
    def reference(x):
        rows = [reference_row(name, *pair, temperature, direction) for pair in zip(x, teacher, strict=True)]
        return torch.stack(rows).float()

    value, gradient = value_and_gradient(partial(call, name), student, teacher, temperature, direction)
    expected_value, expected_gradient = value_and_gradient(reference, student)
    assert value.dtype == torch.float32 and value.shape == student.shape[:1]
    torch.testing.assert_close(value, expected_value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)
    return value


@each_function
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_value_and_gradient_match_the_definition(name, direction, temperature):
    check_definition(name, *inputs(name), temperature, direction)


@each_function
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_padding_of_minus_infinity_matches_the_definition(name, direction, side):
    """Padding stands both among the tokens that keep an outcome of their own and among the others."""
    student, teacher = inputs(name, seed=2)
    if side != "teacher":
        student[..., [0, 2]] = -INF
    if side != "student":
        teacher[..., [0, 3]] = -INF
    if name != "alm":
        check_definition(name, student, teacher, 2.0, direction)
    value, gradient = value_and_gradient(partial(call, name), *inputs_swapped(name, student, teacher), 2.0, direction)
    assert value.isfinite().all() and gradient.isfinite().all()


def inputs_swapped(name, student, teacher):
    """The teacher as the student where their sizes permit, so that the student has the teacher's padding too."""
    return (teacher, student) if name in ("top_k", "alm") else (student, teacher)


@each_function
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31 - 2), temperature=st.floats(0.25, 8.0))
def test_is_at_least_zero(name, direction, seed, temperature):
    assert (call(name, *inputs(name, seed), temperature, direction) > -1e-6).all()


@each_function
@pytest.mark.parametrize("padded", [False, True])
def test_identical_sides_give_zero_and_no_gradient(name, direction, padded):
    same = inputs(name, seed=3)[0]
    if padded and name != "alm":
        same[:, 2:4] = -INF

    def function(x):
        if name == "hybrid":
            both = torch.tensor([5, 2, 0])
            return hybrid_distance(x, same, both, both, temperature=2.0, direction=direction)
        return call(name, x, same, 2.0, direction)

    value, gradient = value_and_gradient(function, same)
    torch.testing.assert_close(value, torch.zeros(4), rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


@each_function
def test_teacher_receives_no_gradient(name, direction):
    student, teacher = (x.requires_grad_() for x in inputs(name))
    call(name, student, teacher, 2.0, direction).sum().backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


@each_function
def test_inputs_stay_as_they_were(name, direction):
    student, teacher = inputs(name)
    student_before, teacher_before = student.clone(), teacher.clone()
    call(name, student, teacher, 1.0, direction)
    assert student.equal(student_before) and teacher.equal(teacher_before)


@each_function
def test_no_rows_give_no_values_and_still_backpropagate(name, direction):
    student, teacher = inputs(name, num_rows=0)
    value, gradient = value_and_gradient(partial(call, name), student, teacher, 2.0, direction)
    assert value.shape == (0,) and value.dtype == torch.float32 and gradient.shape == student.shape


@each_function
def test_bfloat16_inputs_are_computed_in_float32(name, direction):
    student, teacher = (x.bfloat16() for x in inputs(name))
    value = call(name, student, teacher, 2.0, direction)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, call(name, student.float(), teacher.float(), 2.0, direction))


@each_function
def test_gradient_size_does_not_depend_on_a_high_temperature(name, direction):
    pair = inputs(name, seed=4)
    if name == "hybrid":
        # Vocabularies of one size: uniform distributions over different sizes differ, which the square makes grow.
        pair = normal(4, 4, 11), pair[1]
    low, high = (value_and_gradient(partial(call, name), *pair, t, direction)[1].norm() for t in (200.0, 400.0))
    torch.testing.assert_close(low, high, rtol=0.05, atol=0)


@pytest.mark.parametrize("name", ["top_k", "hybrid", "alm"])
@pytest.mark.parametrize("num_rows", [0, 4])
def test_unknown_direction_is_named(name, num_rows):
    with pytest.raises(ConfigurationError, match="forward, reverse, js, got 'backward'"):
        call(name, *inputs(name, num_rows=num_rows), direction="backward")


@each_direction
@pytest.mark.parametrize("top_k", [7, 100])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_top_k_of_the_whole_vocabulary_is_the_full_divergence(direction, top_k, temperature):
    student, teacher = inputs("top_k", seed=5)
    student[:, 3] = -INF

    def full(x):
        teacher_logprobs = tempered_logprobs(teacher, temperature)
        return temperature**2 * divergence(tempered_logprobs(x, temperature), teacher_logprobs, direction)

    def coarse(x):
        return top_k_divergence(x, teacher, top_k=top_k, temperature=temperature, direction=direction)

    torch.testing.assert_close(value_and_gradient(coarse, student), value_and_gradient(full, student))


@each_direction
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31 - 2), temperature=st.floats(0.25, 8.0))
def test_top_k_grows_with_k_up_to_the_full_divergence(direction, seed, temperature):
    student, teacher = inputs("top_k", seed)
    values = [
        top_k_divergence(student, teacher, top_k=k, temperature=temperature, direction=direction) for k in range(1, 8)
    ]
    assert all((more >= less - 1e-4).all() for less, more in zip(values, values[1:], strict=False))


@each_direction
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("top_k", [2, 3])
def test_top_k_outcomes_without_any_mass_count_as_the_floor(direction, side, top_k):
    full, empty = torch.tensor([[0.3, 0.3, 0.2, 0.2]]).log(), torch.tensor([[0.0, 0.0, -INF, -INF]])
    student, teacher = (empty, full) if side == "student" else (full, empty)

    def function(x):
        return top_k_divergence(x, teacher, top_k=top_k, temperature=1.0, direction=direction)

    value, gradient = value_and_gradient(function, student)
    outcomes = [[0.3, 0.3, 0.4], [0.5, 0.5, 0.0]] if top_k == 2 else [[0.3, 0.3, 0.2, 0.2], [0.5, 0.5, 0.0, 0.0]]
    q, p = (torch.tensor(x).double() for x in (outcomes if side == "teacher" else outcomes[::-1]))
    torch.testing.assert_close(value, reference_divergence(q, p, direction).float().reshape(1))
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("direction", "confident"), [("forward", "student"), ("reverse", "teacher")])
def test_top_k_bucket_of_a_mass_that_one_minus_sum_takes_for_zero_is_exact(direction, confident):
    student, teacher = torch.zeros(1, 3), torch.tensor([[0.0, -25.0, -26.0]])
    if confident == "student":
        student, teacher = teacher, student
    rest = math.log(math.exp(-25) + math.exp(-26))
    expected = 1 / 3 * math.log(1 / 3) + 2 / 3 * (math.log(2 / 3) - rest)
    value = top_k_divergence(student, teacher, top_k=1, temperature=1.0, direction=direction)
    torch.testing.assert_close(value, torch.tensor([expected]))


def test_top_k_names_two_shapes_that_differ():
    with pytest.raises(ConfigurationError, match=r"got \(2, 8\) and \(2, 7\)"):
        top_k_divergence(torch.zeros(2, 8), torch.zeros(2, 7), top_k=3, temperature=1.0, direction="forward")


def test_uld_does_not_depend_on_the_order_of_the_tokens():
    student, teacher = inputs("uld", seed=6)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        uld_distance(student, teacher[:, order], temperature=2.0), uld_distance(student, teacher, temperature=2.0)
    )
    torch.testing.assert_close(uld_distance(teacher, teacher[:, order], temperature=2.0), torch.zeros(4))


def test_uld_counts_what_the_larger_vocabulary_has_more_of():
    uniform = [torch.zeros(1, size) for size in (2, 4)]
    for student, teacher in (uniform, uniform[::-1]):
        torch.testing.assert_close(uld_distance(student, teacher, temperature=3.0), torch.tensor([3.0]))


@each_direction
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_hybrid_is_the_full_divergence_where_all_tokens_match(direction, temperature):
    student, teacher = inputs("top_k", seed=7)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    value = hybrid_distance(
        student, teacher[:, order], order, torch.arange(7), temperature=temperature, direction=direction
    )
    full = divergence(tempered_logprobs(student, temperature), tempered_logprobs(teacher, temperature), direction)
    torch.testing.assert_close(value, temperature**2 * full)


@each_direction
def test_hybrid_is_the_uld_distance_where_no_token_matches(direction):
    student, teacher = inputs("hybrid", seed=8)
    none = torch.empty(0, dtype=torch.long)
    value = hybrid_distance(student, teacher, none, none, temperature=2.0, direction=direction)
    torch.testing.assert_close(value, uld_distance(student, teacher, temperature=2.0))


@each_direction
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_hybrid_with_only_padding_unmatched_has_a_finite_gradient(direction, side):
    student, teacher = inputs("hybrid", seed=9)
    for name, logits, matches in (("student", student, STUDENT_MATCHES), ("teacher", teacher, TEACHER_MATCHES)):
        if side in (name, "both"):
            logits[:, [i for i in range(logits.shape[1]) if i not in matches]] = -INF
    check_definition("hybrid", student, teacher, 2.0, direction)


@pytest.mark.parametrize(("student", "teacher"), [([1, 1], [2, 3]), ([1, 2], [3, 3]), ([1], [3, 4]), ([1, 2], [3])])
def test_hybrid_refuses_matches_that_are_no_pairs(student, teacher):
    with pytest.raises(ConfigurationError, match="name each token once"):
        hybrid_distance(
            *inputs("hybrid"), torch.tensor(student), torch.tensor(teacher), temperature=1.0, direction="forward"
        )


@each_direction
@pytest.mark.parametrize("teacher", [0.0, -1e-30, -1e-3, -20.0, -1e4, -INF])
@pytest.mark.parametrize("student", [0.0, -1e-38, -1e-30, -1e-6, -0.7, -100.0, -1e4, -INF])
def test_alm_is_finite_at_both_ends(direction, student, teacher):
    pair = torch.tensor([student]), torch.tensor([teacher])
    value, gradient = value_and_gradient(alm_divergence, *pair, temperature=2.0, direction=direction)
    assert value.isfinite() and value > -1e-6 and gradient.isfinite()
    assert student != teacher or value.abs() < 1e-6


@each_direction
def test_alm_gradient_is_exact_where_one_minus_p_cancels(direction):
    student, teacher = torch.tensor([-1e-5, -1e-4, -18.0]), torch.tensor([-2e-5, -0.5, -20.0])

    def reference(x):
        q, p = (y.double() for y in (x, teacher))
        log_q, log_p = (torch.stack([y, (-y.expm1()).log()], dim=-1) for y in (q, p))
        return divergence(log_q, log_p, direction)

    value, gradient = value_and_gradient(alm_divergence, student, teacher, temperature=1.0, direction=direction)
    expected_value, expected_gradient = value_and_gradient(reference, student)
    # The mixture of js rounds 1 - p to float32's steps near 1.
    tolerance = {"rtol": 2e-3, "atol": 1e-6 if direction == "js" else 1e-9}
    torch.testing.assert_close(value, expected_value.float(), **tolerance)
    torch.testing.assert_close(gradient, expected_gradient, **tolerance)


def test_alm_at_certainty_counts_the_logarithm_of_the_rest_as_minus_87():
    pair = torch.zeros(1), torch.tensor([math.log(0.5)])
    value, gradient = value_and_gradient(alm_divergence, *pair, temperature=1.0, direction="forward")
    torch.testing.assert_close(value, torch.tensor([0.5 * (math.log(0.5) - LOGPROB_FLOOR) + 0.5 * math.log(0.5)]))
    assert gradient == 0


def test_alm_still_teaches_a_student_that_holds_the_chunk_very_unlikely():
    pair = torch.tensor([-1e4]), torch.tensor([0.0])
    _, gradient = value_and_gradient(alm_divergence, *pair, temperature=1.0, direction="forward")
    torch.testing.assert_close(gradient, torch.tensor([-1.0]))
