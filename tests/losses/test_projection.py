"""Values and gradients of the projected logits against a float64 definition through autograd."""

import pytest
import torch

from distill_trainer.losses.projection import project_logits_

ROWS, TEACHER, STUDENT = 5, 13, 6
# Several to one, one to one, one column that nothing maps to (4), and two tokens without a column.
COLUMNS = torch.tensor([0, 1, 1, 2, 5, 3, 3, 3, 0, 6, 2, 6, 0])
NEXT = torch.tensor([0, 4, 9, 12, 7])


def logits(seed=0, scale=3.0):
    return scale * torch.randn(ROWS, TEACHER, generator=torch.Generator().manual_seed(seed))


def definition(values):
    """Softmax over the tokens with a column, summed by column; and the plain log-softmax at `NEXT`."""
    known = values.masked_fill(COLUMNS == STUDENT, -torch.inf).softmax(-1)
    rows = [torch.stack([row[COLUMNS == column].sum() for column in range(STUDENT)]) for row in known]
    tiny = torch.finfo(torch.float32).tiny
    return torch.stack(rows).clamp(min=tiny).log(), values.log_softmax(-1)[torch.arange(ROWS), NEXT]


@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0])
def test_values_and_gradients_match_the_definition(scale):
    plain = logits(scale=scale).double().requires_grad_()
    expected = definition(plain)
    own = logits(scale=scale).requires_grad_()
    # Written over as the heads do it: a tensor that nobody else holds.
    found = project_logits_(own.clone(), COLUMNS, NEXT, STUDENT)
    weights = torch.randn(ROWS, STUDENT, generator=torch.Generator().manual_seed(1)).double()
    weights[:, 4] = 0
    for side, (logprobs, following) in ((plain, expected), (own, found)):
        side.grad = None
        ((weights.to(logprobs.dtype) * logprobs).sum() + 2 * following.sum()).backward()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own.grad.double(), plain.grad, rtol=1e-4, atol=1e-5)


def test_the_mass_is_one_and_a_column_without_tokens_is_at_the_floor():
    logprobs, _ = project_logits_(logits(), COLUMNS, NEXT, STUDENT)
    torch.testing.assert_close(logprobs.double().exp().sum(-1), torch.ones(ROWS, dtype=torch.float64))
    assert logprobs[:, 4].exp().max() < 1e-37 and logprobs.isfinite().all()


def test_a_gradient_at_the_floor_moves_nothing():
    own = logits().requires_grad_()
    logprobs, _ = project_logits_(own.clone(), COLUMNS, NEXT, STUDENT)
    logprobs[:, 4].sum().backward()
    assert own.grad.abs().max() == 0


def test_the_logits_are_written_over_and_extreme_ones_stay_finite():
    own = logits(scale=1.0)
    own[0, 3], own[1] = 1e4, -1e4
    before = own.clone()
    logprobs, following = project_logits_(own, COLUMNS, NEXT, STUDENT)
    assert not torch.equal(own, before)
    assert logprobs.isfinite().all() and following.isfinite().all() and logprobs[0, 2] == 0


def test_no_rows_give_no_rows():
    own = torch.zeros(0, TEACHER, requires_grad=True)
    logprobs, following = project_logits_(own.clone(), COLUMNS, NEXT[:0], STUDENT)
    (logprobs.sum() + following.sum()).backward()
    assert logprobs.shape == (0, STUDENT) and following.shape == (0,) and own.grad.shape == (0, TEACHER)
