"""Bounds, mean and formula of the anchors' weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_trainer.errors import ConfigurationError
from distill_trainer.losses.gap_weights import gap_weights


@settings(deadline=None, max_examples=100)
@given(
    gaps=st.lists(st.floats(0, 1e4, width=32), min_size=1, max_size=30),
    bound=st.floats(2, 50),
)
def test_gap_weights_average_to_one_within_their_bounds_and_grow_with_the_gap(gaps, bound):
    gap = torch.tensor(gaps)
    weights = gap_weights(gap, torch.ones(len(gaps), dtype=torch.bool), bound=bound)
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    assert weights.min() >= 0.5 - 1e-5 and weights.max() <= bound + 1e-4
    assert weights[gap.argsort()].diff().ge(-1e-5).all()


def test_gap_weights_follow_their_formula():
    ones = torch.ones(5, dtype=torch.bool)
    torch.testing.assert_close(
        gap_weights(torch.tensor([0.0, 1.0, 2.0, 1.0, 1.0]), ones), torch.tensor([0.5, 1.0, 1.5, 1.0, 1.0])
    )
    # 3.0 is cut to 2; the mean of 0.8 is then lifted by a sixth of the room below 2.
    torch.testing.assert_close(
        gap_weights(torch.tensor([0.0, 0.0, 0.0, 0.0, 7.0]), ones, bound=2.0),
        torch.tensor([0.75, 0.75, 0.75, 0.75, 2.0]),
    )


def test_gap_weights_see_the_mask_only_and_carry_no_gradient():
    gap = torch.tensor([[1.0, float("nan")], [3.0, -2.0]], requires_grad=True)
    mask = torch.tensor([[1, 0], [1, 1]], dtype=torch.bool)
    weights = gap_weights(gap, mask)
    assert not weights.requires_grad and weights[0, 1] == 0
    torch.testing.assert_close(weights[mask], gap_weights(torch.tensor([1.0, 3.0, 0.0]), mask[mask]))


def test_gap_weights_are_one_without_gaps_and_nothing_without_anchors():
    assert gap_weights(torch.zeros(3), torch.ones(3, dtype=torch.bool)).eq(1).all()
    assert gap_weights(torch.ones(3), torch.zeros(3, dtype=torch.bool)).eq(0).all()


def test_gap_weights_refuse_a_bound_that_leaves_no_room():
    with pytest.raises(ConfigurationError, match="bound must be 2 or above, got 1.5"):
        gap_weights(torch.ones(1), torch.ones(1, dtype=torch.bool), bound=1.5)
