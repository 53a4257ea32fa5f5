"""Defects that these tests catch: the positive among the negatives, negatives of another row's group, a temperature
that multiplies, repeated or missing anchors in the selection, NaN for an empty batch, half-precision products.
"""

import pytest
import torch

from distill_trainer.errors import ConfigurationError
from distill_trainer.losses.contrastive import contrastive_loss

MASK = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]], dtype=torch.bool)


def random_features(seed: int, shape=(2, 4, 16)):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed)).unbind(0)


def reference(student, teacher, temperature=0.07, groups=None):
    """-log of the positive's share, one anchor at a time in float64; rows are the counted anchors."""
    student, teacher = student.double(), teacher.double()
    terms = []
    for i, s in enumerate(student):
        score = [torch.exp(torch.cosine_similarity(s, t, dim=0) / temperature) for t in teacher]
        kept = [j for j in range(len(teacher)) if j == i or groups is None or groups[j] != groups[i]]
        terms.append(-torch.log(score[i] / sum(score[j] for j in kept)))
    return torch.stack(terms).mean().float()


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_matches_the_definition(temperature):
    student, teacher = random_features(0)
    loss = contrastive_loss(student, teacher, MASK, temperature=temperature)
    torch.testing.assert_close(loss, reference(student[MASK], teacher[MASK], temperature))


def test_is_positive_and_smaller_when_student_and_teacher_agree():
    student, teacher = random_features(1)
    agreeing, unrelated = contrastive_loss(teacher, teacher, MASK), contrastive_loss(student, teacher, MASK)
    swapped = contrastive_loss(teacher.flip(0, 1), teacher, torch.ones_like(MASK))
    assert 0 < agreeing < 0.1 < unrelated < swapped


def test_scale_of_either_side_does_not_matter():
    student, teacher = random_features(2)
    torch.testing.assert_close(
        contrastive_loss(student * 100, teacher * 0.01, MASK), contrastive_loss(student, teacher, MASK)
    )


def test_repeated_text_is_no_negative():
    student, teacher = random_features(3)
    groups = torch.tensor([[5, 6, 9, 5], [6, 7, 8, 5]])
    loss = contrastive_loss(student, teacher, MASK, groups=groups)
    torch.testing.assert_close(loss, reference(student[MASK], teacher[MASK], groups=groups[MASK].tolist()))
    assert loss < contrastive_loss(student, teacher, MASK)


def test_anchors_that_all_repeat_give_zero_and_finite_gradients():
    student, teacher = random_features(4)
    student.requires_grad_()
    loss = contrastive_loss(student, teacher, MASK, groups=torch.zeros(2, 4, dtype=torch.long))
    loss.backward()
    assert loss == 0 and student.grad.eq(0).all()


@pytest.mark.parametrize("max_anchors, chosen", [(2, [0, 9]), (4, [0, 3, 6, 9]), (7, [0, 1, 3, 4, 6, 7, 9])])
def test_more_anchors_than_allowed_are_thinned_out_evenly(max_anchors, chosen):
    student, teacher = random_features(5, (10, 16))
    groups = torch.tensor([0, 1, 2, 0, 3, 0, 0, 4, 5, 0])
    loss = contrastive_loss(student, teacher, torch.ones(10, dtype=torch.bool), max_anchors=max_anchors, groups=groups)
    torch.testing.assert_close(loss, reference(student[chosen], teacher[chosen], groups=groups[chosen].tolist()))


def test_fewer_than_two_anchors_give_zero_and_still_backpropagate():
    for count in (0, 1):
        student, teacher = random_features(6)
        student.requires_grad_()
        mask = torch.zeros_like(MASK)
        mask[0, :count] = True
        loss = contrastive_loss(student, teacher, mask, groups=torch.zeros(2, 4, dtype=torch.long))
        loss.backward()
        assert loss == 0 and student.grad.eq(0).all()


def test_masked_anchors_change_neither_loss_nor_gradient():
    student, teacher = random_features(7)
    loss = contrastive_loss(student, teacher, MASK)
    outside = ~MASK.unsqueeze(-1)
    student = student.masked_fill(outside, float("nan")).requires_grad_()
    garbage = contrastive_loss(student, teacher.masked_fill(outside, float("nan")), MASK)
    garbage.backward()
    assert garbage.equal(loss)
    assert student.grad[~MASK].eq(0).all() and student.grad[MASK].abs().sum() > 0


def test_teacher_receives_no_gradient():
    student, teacher = random_features(8)
    teacher.requires_grad_()
    contrastive_loss(student.requires_grad_(), teacher, MASK).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_inputs_and_autocast_are_computed_in_float32(autocast):
    student, teacher = (x.bfloat16() for x in random_features(9))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = contrastive_loss(student, teacher, MASK)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference(student[MASK], teacher[MASK]))


def test_a_limit_without_negatives_is_refused():
    with pytest.raises(ConfigurationError, match="max_anchors must be 2 or above, got 1"):
        contrastive_loss(*random_features(10), MASK, max_anchors=1)
