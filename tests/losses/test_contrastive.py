"""Defects that these tests catch: the positive among the negatives, repeated text among them, here or on another rank,
text that agrees in part taken for repeated, a temperature that multiplies, repeated or missing anchors in the
selection, more negatives than allowed, NaN for an empty batch, half-precision products.
"""

import pytest
import torch

from distill_trainer.errors import ConfigurationError
from distill_trainer.losses import contrastive
from distill_trainer.losses.contrastive import MAX_ANCHORS, contrastive_loss, evenly_spaced

MASK = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]], dtype=torch.bool)


def random_features(seed: int, shape=(2, 4, 64)):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed)).unbind(0)


def reference(student, teacher, temperature=0.07, groups=None):
    """-log of the positive's share, one anchor at a time in float64; rows are the counted anchors.

    Teacher rows past the student's are negatives only. Those of one group are not each other's.
    """
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


def texts_of(groups):
    """Three integers that all agree for one group, two for all anchors."""
    return torch.stack([torch.ones_like(groups), groups, torch.zeros_like(groups)], dim=-1)


def test_a_massive_channel_of_all_states_leaves_them_told_apart():
    _, teacher = random_features(16, (10, 512))
    mask = torch.ones(10, dtype=torch.bool)
    massive = teacher.clone()
    massive[:, 3] = 1000.0
    plain, told = contrastive_loss(teacher, teacher, mask), contrastive_loss(massive, massive, mask)
    # Cosines of one for all would give log 10.
    torch.testing.assert_close(told, plain, atol=1e-3, rtol=0)


def test_repeated_text_is_no_negative():
    student, teacher = random_features(3)
    groups = torch.tensor([[5, 6, 9, 5], [6, 7, 8, 5]])
    loss = contrastive_loss(student, teacher, MASK, texts=texts_of(groups))
    torch.testing.assert_close(loss, reference(student[MASK], teacher[MASK], groups=groups[MASK].tolist()))
    assert loss < contrastive_loss(student, teacher, MASK)


def test_anchors_that_all_repeat_give_zero_and_finite_gradients():
    student, teacher = random_features(4)
    student.requires_grad_()
    loss = contrastive_loss(student, teacher, MASK, texts=torch.zeros(2, 4, 3, dtype=torch.long))
    loss.backward()
    assert loss == 0 and student.grad.eq(0).all()


@pytest.mark.parametrize("max_anchors, chosen", [(2, [0, 9]), (4, [0, 3, 6, 9]), (7, [0, 1, 3, 4, 6, 7, 9])])
def test_more_anchors_than_allowed_are_thinned_out_evenly(max_anchors, chosen):
    student, teacher = random_features(5, (10, 64))
    groups = torch.tensor([0, 1, 2, 0, 3, 0, 0, 4, 5, 0])
    mask = torch.ones(10, dtype=torch.bool)
    loss = contrastive_loss(student, teacher, mask, max_anchors=max_anchors, texts=texts_of(groups))
    torch.testing.assert_close(loss, reference(student[chosen], teacher[chosen], groups=groups[chosen].tolist()))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_states_of_others_are_negatives_and_nothing_else(count):
    student, teacher = random_features(11, (count, 64))
    others = torch.randn(5, 64, generator=torch.Generator().manual_seed(12)).requires_grad_()
    mask = torch.ones(count, dtype=torch.bool)
    student.requires_grad_()
    loss = contrastive_loss(student, teacher, mask, other_features=others)
    loss.backward()
    assert others.grad is None and student.grad.abs().sum().gt(0) == bool(count)
    if count:
        torch.testing.assert_close(loss, reference(student.detach(), torch.cat([teacher, others.detach()])))
    else:
        assert loss == 0


def test_repeated_text_of_others_is_no_negative():
    student, teacher = random_features(13, (4, 64))
    others = torch.randn(3, 64, generator=torch.Generator().manual_seed(14))
    groups, other_groups = torch.tensor([0, 1, 0, 2]), torch.tensor([2, 7, 0])
    loss = contrastive_loss(
        student,
        teacher,
        torch.ones(4, dtype=torch.bool),
        texts=texts_of(groups),
        other_features=others,
        other_texts=texts_of(other_groups),
    )
    expected = reference(student, torch.cat([teacher, others]), groups=[*groups.tolist(), *other_groups.tolist()])
    torch.testing.assert_close(loss, expected)


def test_a_batch_of_any_size_gives_at_most_a_fixed_number_of_negatives(monkeypatch):
    seen, original = [], contrastive.F.cross_entropy

    def watched(scores, *args, **kwargs):
        seen.append(tuple(scores.shape))
        return original(scores, *args, **kwargs)

    monkeypatch.setattr(contrastive.F, "cross_entropy", watched)
    for count in (100, 256, 3000):
        contrastive_loss(*random_features(15, (count, 4)), torch.ones(count, dtype=torch.bool))
    assert seen == [(100, 100), (256, 256), (256, 256)] and MAX_ANCHORS == 256


@pytest.mark.parametrize(("count", "limit"), [(0, 4), (1, 4), (3, 4), (4, 4), (9, 4), (1000, 256)])
def test_evenly_spaced_rows_are_distinct_and_reach_from_the_first_to_the_last(count, limit):
    rows = evenly_spaced(count, limit).tolist()
    assert len(rows) == min(count, limit) == len(set(rows)) and rows == sorted(rows)
    assert not rows or (rows[0], rows[-1]) == (0, count - 1)


def test_fewer_than_two_anchors_give_zero_and_still_backpropagate():
    for count in (0, 1):
        student, teacher = random_features(6)
        student.requires_grad_()
        mask = torch.zeros_like(MASK)
        mask[0, :count] = True
        loss = contrastive_loss(student, teacher, mask, texts=torch.zeros(2, 4, 3, dtype=torch.long))
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
