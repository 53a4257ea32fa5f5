"""Defects that these tests catch: swapped direction, missing or doubled temperature ** 2, mean over the vocabulary,
softmax of a softmax, a mask applied after the arithmetic, 0 * log 0, weights that are not mean one, a teacher that
receives gradient, a divisor that depends on the micro-batch.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_trainer.errors import ConfigurationError
from distill_trainer.losses.gap_weights import gap_weights
from distill_trainer.losses.logits import kl_divergence, kl_divergence_loss, lm_loss, mean_belief

DIRECTIONS = ["forward", "reverse", "js"]
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
ALL = torch.ones(2, 5, dtype=torch.bool)


def random_logits(seed: int, vocab_size: int = 7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, 5, vocab_size, generator=generator).unbind(0)


def reference(student_logits, teacher_logits, mask, temperature, direction, weights=None):
    """The definition, one token at a time in float64."""
    terms = []
    for b, t in mask.nonzero().tolist():
        p = torch.softmax(teacher_logits[b, t].double() / temperature, dim=-1)
        q = torch.softmax(student_logits[b, t].double() / temperature, dim=-1)
        m = (p + q) / 2
        value = {
            "forward": (p * (p / q).log()).sum(),
            "reverse": (q * (q / p).log()).sum(),
            "js": ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2,
        }[direction]
        terms.append(temperature**2 * value * (1 if weights is None else weights[b, t].double()))
    return torch.stack(terms).mean().float()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_matches_the_definition(direction, temperature):
    student, teacher = random_logits(seed=0)
    loss = kl_divergence_loss(student, teacher, MASK, temperature=temperature, direction=direction)
    torch.testing.assert_close(loss, reference(student, teacher, MASK, temperature, direction))


@pytest.mark.parametrize("direction", DIRECTIONS)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31 - 1), temperature=st.floats(0.25, 8.0))
def test_is_positive_and_zero_only_at_the_teacher(direction, seed, temperature):
    student, teacher = random_logits(seed)
    loss = kl_divergence_loss(student, teacher, ALL, temperature=temperature, direction=direction)
    assert loss > 0
    assert direction != "js" or loss <= temperature**2 * math.log(2)
    at_teacher = kl_divergence_loss(teacher, teacher, ALL, temperature=temperature, direction=direction)
    assert at_teacher.abs() < 1e-5


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_masked_tokens_change_neither_loss_nor_gradient(direction):
    student, teacher = random_logits(seed=1)
    outside = ~MASK.unsqueeze(-1)
    student = student.masked_fill(outside, float("nan")).requires_grad_()
    loss = kl_divergence_loss(student, teacher.masked_fill(outside, float("nan")), MASK, direction=direction)
    loss.backward()
    torch.testing.assert_close(loss, reference(student.detach(), teacher, MASK, 1.0, direction))
    assert student.grad[~MASK].eq(0).all() and student.grad[MASK].abs().sum() > 0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_empty_mask_gives_zero_and_still_backpropagates(direction):
    student, teacher = random_logits(seed=2)
    student.requires_grad_()
    loss = kl_divergence_loss(student, teacher, ~ALL, direction=direction, token_weights=torch.ones(2, 5))
    loss.backward()
    assert loss == 0 and student.grad.eq(0).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_micro_batches_sum_to_the_whole_batch(direction):
    student, teacher = random_logits(seed=3)
    whole = kl_divergence_loss(student, teacher, MASK, direction=direction)
    parts = sum(
        kl_divergence_loss(student[i], teacher[i], MASK[i], direction=direction, num_items_in_batch=8)
        for i in range(2)
    )
    torch.testing.assert_close(parts, whole)


def test_teacher_and_weights_receive_no_gradient():
    student, teacher = random_logits(seed=4)
    weights = torch.ones(2, 5)
    for tensor in (student, teacher, weights):
        tensor.requires_grad_()
    kl_divergence_loss(student, teacher, ALL, token_weights=weights).backward()
    assert student.grad is not None and teacher.grad is None and weights.grad is None


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_token_weights_multiply_each_token(direction):
    student, teacher = random_logits(seed=5)
    weights = torch.rand(2, 5)
    loss = kl_divergence_loss(student, teacher, MASK, direction=direction, token_weights=weights)
    torch.testing.assert_close(loss, reference(student, teacher, MASK, 1.0, direction, weights))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bfloat16_inputs_are_computed_in_float32(direction):
    student, teacher = random_logits(seed=6)
    loss = kl_divergence_loss(student.bfloat16(), teacher.bfloat16(), ALL, direction=direction)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference(student.bfloat16(), teacher.bfloat16(), ALL, 1.0, direction))


def test_teacher_may_be_log_probabilities_up_to_a_constant():
    student, teacher = random_logits(seed=7)
    shifted = torch.log_softmax(teacher, dim=-1) - 3
    torch.testing.assert_close(
        kl_divergence_loss(student, shifted, ALL, temperature=2.0),
        kl_divergence_loss(student, teacher, ALL, temperature=2.0),
    )


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("value", [float("-inf"), -1e4])
def test_impossible_tokens_give_finite_losses_and_gradients(side, direction, value):
    student, teacher = (x.clone() for x in random_logits(seed=8))
    if side != "teacher":
        student[..., 2] = value
    if side != "student":
        teacher[..., 2] = value
    student.requires_grad_()
    loss = kl_divergence_loss(student, teacher, ALL, direction=direction)
    loss.backward()
    assert loss.isfinite() and loss > 0 and student.grad.isfinite().all()


def test_forward_ignores_what_the_teacher_holds_impossible():
    student, teacher = (x.clone() for x in random_logits(seed=9))
    teacher[..., 2] = float("-inf")
    p, q = torch.softmax(teacher.double(), -1), torch.softmax(student.double(), -1)
    expected = torch.xlogy(p, p / q).sum(-1).mean().float()
    torch.testing.assert_close(kl_divergence_loss(student, teacher, ALL), expected)


def test_reverse_counts_the_logarithm_of_an_impossible_token_as_minus_87():
    student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, float("-inf")]])
    loss = kl_divergence_loss(student, teacher, torch.ones(1, dtype=torch.bool), direction="reverse")
    torch.testing.assert_close(loss, torch.tensor(0.5 * math.log(0.5) + 0.5 * (math.log(0.5) + 87)))


def test_a_student_that_holds_the_teachers_token_very_unlikely_still_learns():
    student = torch.tensor([[200.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 50.0]])
    kl_divergence_loss(student, teacher, torch.ones(1, dtype=torch.bool)).backward()
    torch.testing.assert_close(student.grad, torch.tensor([[1.0, -1.0]]))


def test_gradient_size_does_not_depend_on_a_high_temperature():
    student, teacher = random_logits(seed=10)
    norms = []
    for temperature in (50.0, 100.0):
        leaf = student.clone().requires_grad_()
        kl_divergence_loss(leaf, teacher, ALL, temperature=temperature).backward()
        norms.append(leaf.grad.norm())
    torch.testing.assert_close(norms[0], norms[1], rtol=0.05, atol=0)


def test_unknown_direction_is_named():
    with pytest.raises(ConfigurationError, match="forward, reverse, js, got 'backward'"):
        kl_divergence_loss(*random_logits(0), ALL, direction="backward")


def test_per_token_divergence_takes_p_first():
    p, q = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])
    expected = torch.tensor([0.9 * math.log(1.8) + 0.1 * math.log(0.2)])
    torch.testing.assert_close(kl_divergence(p.log(), q.log()), expected)


def test_lm_loss_is_the_mean_negative_log_likelihood_of_the_labels():
    logits, _ = random_logits(seed=11)
    labels = torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(0))
    expected = [-torch.log_softmax(logits[b, t].double(), -1)[labels[b, t]] for b, t in MASK.nonzero().tolist()]
    loss = lm_loss(logits.masked_fill(~MASK.unsqueeze(-1), float("nan")), labels.masked_fill(~MASK, -100), MASK)
    torch.testing.assert_close(loss, torch.stack(expected).mean().float())


def test_lm_loss_adds_up_over_micro_batches_and_is_zero_without_tokens():
    logits = random_logits(seed=12)[0].requires_grad_()
    labels = torch.ones(2, 5, dtype=torch.long)
    parts = sum(lm_loss(logits[i], labels[i], MASK[i], num_items_in_batch=8) for i in range(2))
    torch.testing.assert_close(parts, lm_loss(logits, labels, MASK))
    empty = lm_loss(logits, labels, ~ALL)
    empty.backward()
    assert empty == 0 and logits.grad.eq(0).all()
    half = lm_loss(logits.bfloat16(), labels, MASK)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, lm_loss(logits, labels, MASK), rtol=0.02, atol=0)


def test_weighted_loss_of_equal_gaps_is_the_plain_loss():
    student, teacher = random_logits(seed=13)
    gap = kl_divergence(F.log_softmax(teacher, -1), F.log_softmax(student, -1))
    equal = kl_divergence_loss(student, teacher, MASK, token_weights=gap_weights(torch.full((2, 5), 0.3), MASK))
    torch.testing.assert_close(equal, kl_divergence_loss(student, teacher, MASK))
    weighted = kl_divergence_loss(student, teacher, MASK, token_weights=gap_weights(gap, MASK))
    assert weighted > equal


def test_the_mean_belief_is_that_of_the_probabilities():
    """And not of the logits, which would be the geometric mean."""
    logits = 3 * torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([torch.softmax(logits[:, m].double(), dim=-1) for m in range(3)]).mean(dim=0).log()
    torch.testing.assert_close(mean_belief(logits).double(), expected, rtol=1e-5, atol=1e-5)
    geometric = torch.log_softmax(logits.double().mean(dim=1), dim=-1)
    assert (expected - geometric).abs().max() > 0.1
