"""Defects that these tests catch: a loss that grows with the hidden size or the scale of the states, sum in place of
mean, masked rows that poison the gradient, a teacher that receives gradient, an outlier channel that blows it up, or
that alone decides it.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_trainer.losses.feature import feature_distance, feature_loss, tame_outliers

MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)


def random_features(seed: int, hidden_size: int = 16):
    return torch.randn(2, 2, 4, hidden_size, generator=torch.Generator().manual_seed(seed)).unbind(0)


def reference(student, teacher, mask):
    """(1 - cosine) + mean squared error of RMS-normalised vectors, one anchor at a time in float64."""
    terms = []
    for b, t in mask.nonzero().tolist():
        s, u = student[b, t].double(), teacher[b, t].double()
        s, u = s / s.square().mean().sqrt(), u / u.square().mean().sqrt()
        cosine = (s @ u) / (s.norm() * u.norm())
        terms.append((1 - cosine) + (s - u).square().mean())
    return torch.stack(terms).mean().float()


@pytest.mark.parametrize("hidden_size", [64, 300])
def test_matches_the_definition_at_every_width(hidden_size):
    student, teacher = random_features(0, hidden_size)
    torch.testing.assert_close(
        feature_loss(student, teacher, MASK), reference(student, teacher, MASK), rtol=1e-4, atol=1e-5
    )


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31 - 1))
def test_is_positive_at_most_six_and_zero_at_the_teacher(seed):
    student, teacher = random_features(seed)
    assert 0 < feature_loss(student, teacher, MASK) <= 6
    assert feature_loss(teacher, teacher, MASK) == 0


def test_opposite_states_reach_the_bound_of_six():
    _, teacher = random_features(1)
    torch.testing.assert_close(feature_loss(-teacher, teacher, MASK), torch.tensor(6.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", [0.1, 1e4])
def test_scale_of_either_side_does_not_matter(scale):
    student, teacher = random_features(2)
    loss = feature_loss(student, teacher, MASK)
    torch.testing.assert_close(feature_loss(student * scale, teacher, MASK), loss, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(feature_loss(student, teacher * scale, MASK), loss, rtol=1e-3, atol=1e-3)


def test_a_massive_channel_of_the_teacher_blows_up_neither_loss_nor_gradient():
    student, teacher = (x.clone() for x in random_features(3))
    plain = student.clone().requires_grad_()
    feature_loss(plain, teacher, MASK).backward()
    teacher[..., 0] *= 1000
    student.requires_grad_()
    loss = feature_loss(student, teacher, MASK)
    loss.backward()
    assert loss <= 6 and student.grad.norm() < 3 * plain.grad.norm()


def with_massive_channels(states, channels):
    """States in which some channels are a thousand times as large, with the same sign in all rows."""
    states = states.clone()
    states[..., channels] = 1000 * states[..., channels].abs()
    return states


@pytest.mark.parametrize("channels", [[5], [5, 100, 900]])
def test_massive_channels_do_not_decide_how_far_states_are_apart(channels):
    student, teacher = random_features(10, 1024)
    apart = feature_loss(student, teacher, MASK)
    # Nothing but the massive channels agrees, and nothing else disagrees.
    agreeing = feature_loss(with_massive_channels(student, channels), with_massive_channels(teacher, channels), MASK)
    disagreeing = feature_loss(teacher, with_massive_channels(teacher, channels), MASK)
    assert agreeing > 0.9 * apart and disagreeing < 0.1 * apart


@pytest.mark.parametrize("channels", [[5], [5, 100, 900]])
def test_massive_channels_draw_a_small_share_of_the_gradient(channels):
    student, teacher = random_features(11, 1024)
    student.requires_grad_()
    feature_loss(student, with_massive_channels(teacher, channels), MASK).backward()
    share = student.grad[..., channels].square().sum() / student.grad.square().sum()
    assert share < 0.1


@pytest.mark.parametrize("size", [1e2, 1e3, 1e5])
@pytest.mark.parametrize("width", [64, 192, 576, 1024])
@pytest.mark.parametrize("count", [1, 3])
def test_what_massive_channels_weigh_depends_on_their_number_and_not_on_their_size(width, count, size):
    states = torch.randn(200, width, generator=torch.Generator().manual_seed(13))
    states[:, :count] = size * states[:, :count].sign()
    energy = tame_outliers(states).square()
    share = energy[:, :count].sum() / energy.sum()
    # Each is cut to 4.6 standard deviations of the others.
    bound = count * 4.6**2 / (count * 4.6**2 + width - count)
    assert 0.9 * bound < share < 1.2 * bound


def test_rows_that_are_mostly_zero_stay():
    states = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5, -2.0], [0.0] * 8])
    assert tame_outliers(states).equal(states)


def test_only_outliers_are_cut_and_equal_rows_with_outliers_have_no_distance():
    states = random_features(12, 1024)[0]
    assert tame_outliers(states).equal(states)
    massive = with_massive_channels(states, [7])
    tamed = tame_outliers(massive)
    assert tamed[..., 8:].equal(massive[..., 8:]) and tamed[..., 7].max() < 5 * states.std()
    assert feature_loss(massive, massive * 0.5, MASK) < 1e-10


def test_states_of_zero_give_a_finite_gradient():
    student, teacher = torch.zeros(2, 4, 16, requires_grad=True), random_features(4)[1]
    feature_loss(student, teacher, MASK).backward()
    assert student.grad.isfinite().all()


def test_masked_anchors_change_neither_loss_nor_gradient():
    student, teacher = random_features(5)
    outside = ~MASK.unsqueeze(-1)
    loss = feature_loss(student, teacher, MASK)
    student = student.masked_fill(outside, float("nan")).requires_grad_()
    garbage = feature_loss(student, teacher.masked_fill(outside, float("nan")), MASK)
    garbage.backward()
    assert garbage.equal(loss) and student.grad[~MASK].eq(0).all()


def test_empty_mask_gives_zero_and_still_backpropagates():
    student, teacher = random_features(6)
    student.requires_grad_()
    loss = feature_loss(student, teacher, torch.zeros_like(MASK))
    loss.backward()
    assert loss == 0 and student.grad.eq(0).all()


def test_micro_batches_sum_to_the_whole_batch():
    student, teacher = random_features(7)
    parts = sum(feature_loss(student[i], teacher[i], MASK[i], num_items_in_batch=6) for i in range(2))
    torch.testing.assert_close(parts, feature_loss(student, teacher, MASK))


def test_teacher_receives_no_gradient():
    student, teacher = random_features(8)
    student.requires_grad_()
    teacher.requires_grad_()
    feature_loss(student, teacher, MASK).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


def test_bfloat16_inputs_are_computed_in_float32():
    student, teacher = (x.bfloat16() for x in random_features(9))
    loss = feature_loss(student, teacher, MASK)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference(student, teacher, MASK), rtol=1e-4, atol=1e-5)


def test_distance_is_one_value_per_row():
    student, teacher = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.0], [5.0, 0.0]])
    torch.testing.assert_close(feature_distance(student, teacher), torch.tensor([3.0, 0.0]), rtol=1e-4, atol=1e-4)
