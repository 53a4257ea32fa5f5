"""Defects that these tests catch: a sum over layers in place of the mean, unlocking from the top, unlocking nothing,
a last layer that never unlocks, a layer with massive activations that outweighs the others.
"""

import pytest
import torch

from distill_trainer.errors import ConfigurationError
from distill_trainer.losses.feature import feature_loss
from distill_trainer.losses.layerwise import layerwise_loss, num_unlocked

MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)


def random_layers(seed: int, widths=(8, 12, 8, 16)):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(2, 4, width, generator=generator) for width in widths] for _ in range(2)]


@pytest.mark.parametrize("fraction, unlocked", [(0.0, 1), (0.25, 1), (0.3, 2), (0.5, 2), (0.9, 4), (1.0, 4)])
def test_is_the_mean_distance_of_the_unlocked_pairs_from_the_bottom(fraction, unlocked):
    student, teacher = random_layers(0)
    expected = torch.stack([feature_loss(s, t, MASK) for s, t in zip(student, teacher, strict=True)])[:unlocked].mean()
    torch.testing.assert_close(layerwise_loss(student, teacher, MASK, unlocked_fraction=fraction), expected)


def test_rounding_never_unlocks_a_pair_too_many():
    assert [num_unlocked(100, count / 100) for count in range(1, 101)] == list(range(1, 101))


def test_is_zero_at_the_teacher_and_at_most_six_with_massive_activations():
    student, teacher = random_layers(1)
    assert layerwise_loss(teacher, teacher, MASK) == 0
    for layer in teacher:
        layer[..., 0] *= 1000
    assert 0 < layerwise_loss(student, teacher, MASK) <= 6


def test_masked_anchors_change_neither_loss_nor_gradient():
    student, teacher = random_layers(2)
    loss = layerwise_loss(student, teacher, MASK)
    student, teacher = (
        [x.masked_fill(~MASK.unsqueeze(-1), float("nan")) for x in side] for side in (student, teacher)
    )
    student[1].requires_grad_()
    garbage = layerwise_loss(student, teacher, MASK)
    garbage.backward()
    assert garbage.equal(loss)
    assert student[1].grad[~MASK].eq(0).all() and student[1].grad[MASK].abs().sum() > 0


def test_locked_layers_receive_no_gradient_and_the_teacher_never():
    student, teacher = random_layers(3)
    for layer in student + teacher:
        layer.requires_grad_()
    layerwise_loss(student, teacher, MASK, unlocked_fraction=0.5).backward()
    assert [layer.grad is not None for layer in student] == [True, True, False, False]
    assert all(layer.grad is None for layer in teacher)


def test_empty_mask_gives_zero_and_still_backpropagates():
    student, teacher = random_layers(4)
    student[0].requires_grad_()
    loss = layerwise_loss(student, teacher, torch.zeros_like(MASK))
    loss.backward()
    assert loss == 0 and student[0].grad.eq(0).all()


def test_micro_batches_sum_to_the_whole_batch():
    student, teacher = random_layers(5)
    parts = sum(
        layerwise_loss([x[i] for x in student], [x[i] for x in teacher], MASK[i], num_items_in_batch=6)
        for i in range(2)
    )
    torch.testing.assert_close(parts, layerwise_loss(student, teacher, MASK))


def test_bfloat16_is_near_float32():
    student, teacher = random_layers(6)
    half = layerwise_loss([x.bfloat16() for x in student], [x.bfloat16() for x in teacher], MASK)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, layerwise_loss(student, teacher, MASK), rtol=0.02, atol=0)


@pytest.mark.parametrize("student, teacher", [([], []), ([torch.zeros(1, 2)], [])])
def test_missing_layers_are_counted_in_the_error(student, teacher):
    with pytest.raises(ConfigurationError, match=f"got {len(student)} and {len(teacher)} layers"):
        layerwise_loss(student, teacher, torch.ones(1, dtype=torch.bool))
