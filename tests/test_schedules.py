import pytest

from distill_trainer.schedules import (
    LOSS_NAMES,
    PHASE_LOSSES,
    competence,
    effective_logit_weights,
    linear,
    phase,
    phase_weights,
    stepped,
    unlocked_fraction,
)

WEIGHTS = {"kl": 0.7, "feature": 0.1, "attention": 0.2, "layerwise": 0.05, "contrastive": 0.06, "lm": 0.3}


@pytest.mark.parametrize("progress, value", [(-1, 4.0), (0, 4.0), (0.25, 3.25), (1, 1.0), (7, 1.0)])
def test_linear_is_a_straight_line_and_constant_outside(progress, value):
    assert linear(4.0, 1.0, progress) == value


@pytest.mark.parametrize(
    "start, end, expected",
    [
        (1, 4, [1, 1, 2, 2, 3, 3, 4, 4]),
        (4, 1, [4, 4, 3, 3, 2, 2, 1, 1]),
        (2, 2, [2] * 8),
        (1, 2, [1, 1, 1, 1, 2, 2, 2, 2]),
    ],
)
def test_stepped_gives_every_integer_an_equal_share_in_both_directions(start, end, expected):
    assert [stepped(start, end, step / 8) for step in range(8)] == expected
    assert [stepped(start, end, progress) for progress in (-1.0, 1.0, 9.0)] == [start, end, end]


def test_stepped_returns_integers():
    assert type(stepped(1, 4, 0.3)) is int and type(stepped(1, 4, 1.0)) is int


@pytest.mark.parametrize(
    "boundaries, expected",
    [
        ((0.3, 0.6), [1, 1, 1, 2, 2, 2, 3, 3, 3, 3]),
        ((0.0, 0.0), [3] * 10),
        ((0.0, 0.5), [2] * 5 + [3] * 5),
        ((1.0, 1.0), [1] * 10),
    ],
)
def test_phases_start_at_their_boundaries(boundaries, expected):
    assert [phase(step / 10, boundaries) for step in range(10)] == expected


def test_each_phase_adds_its_losses_and_keeps_the_weights():
    active = [{name for name, weight in phase_weights(WEIGHTS, number).items() if weight} for number in (1, 2, 3)]
    assert active == [{"kl", "lm"}, {"kl", "lm", "attention", "feature"}, set(LOSS_NAMES)]
    assert phase_weights(WEIGHTS, 3) == WEIGHTS
    assert phase_weights(WEIGHTS, 1) == {**dict.fromkeys(LOSS_NAMES, 0.0), "kl": 0.7, "lm": 0.3}


def test_every_loss_belongs_to_one_phase():
    assert sorted(name for names in PHASE_LOSSES.values() for name in names) == sorted(LOSS_NAMES)


@pytest.mark.parametrize(
    "lm_weight, gap_ratio, expected",
    [
        (None, 1.0, (0.7, 0.3)),
        (None, 0.5, (0.35, 0.65)),
        (None, 0.0, (0.0, 1.0)),
        (None, -2.0, (0.0, 1.0)),
        (None, 3.0, (0.7, 0.3)),
        (0.2, 0.5, (0.35, 0.2)),
        (0.0, 1.0, (0.7, 0.0)),
    ],
)
def test_lm_takes_over_as_the_gap_closes(lm_weight, gap_ratio, expected):
    assert effective_logit_weights(0.7, lm_weight, gap_ratio) == pytest.approx(expected)


def test_a_kl_weight_above_one_never_makes_the_lm_weight_negative():
    assert effective_logit_weights(2.0, None, 1.0) == (2.0, 0.0)


@pytest.mark.parametrize(
    "progress, expected", [(0.0, 0.0), (0.59, 0.0), (0.6, 0.0), (0.7, 0.5), (0.8, 1.0), (1.0, 1.0)]
)
def test_layers_unlock_from_the_third_phase_to_halfway_to_the_end(progress, expected):
    assert unlocked_fraction(progress, 0.6) == pytest.approx(expected)


@pytest.mark.parametrize("progress, share", [(0.0, 0.01), (0.25, 0.50007), (1.0, 1.0), (3.0, 1.0)])
def test_competence_is_a_square_root_from_its_start_to_one(progress, share):
    assert competence(progress) == pytest.approx(share, rel=1e-4)
    assert competence(0.0, start=0.5) == 0.5


def test_layers_stay_locked_when_the_third_phase_never_comes():
    assert unlocked_fraction(0.99, 1.0) == unlocked_fraction(1.0, 1.0) == 0.0
