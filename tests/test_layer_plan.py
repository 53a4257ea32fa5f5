import pytest

from distill_trainer.errors import ConfigurationError
from distill_trainer.layer_plan import LayerPairs, RoutedLayers, uniform_layer_map


@pytest.mark.parametrize(
    ("students", "teachers", "expected"),
    [(3, 3, [0, 1, 2]), (2, 4, [1, 3]), (4, 2, [0, 0, 1, 1]), (1, 5, [4]), (5, 1, [0] * 5)],
)
def test_a_uniform_map_keeps_relative_depth(students, teachers, expected):
    assert uniform_layer_map(students, teachers) == expected


@pytest.mark.parametrize(("students", "teachers"), [(30, 28), (28, 30), (6, 48), (12, 5)])
def test_a_uniform_map_rises_and_ends_at_the_last_layer(students, teachers):
    mapped = uniform_layer_map(students, teachers)
    assert mapped == sorted(mapped) and mapped[-1] == teachers - 1 and min(mapped) >= 0


def plan(students=30, teachers=28, layer_map="uniform", feature_layers=None, attention_layers=None):
    return LayerPairs.plan(
        students, teachers, layer_map=layer_map, feature_layers=feature_layers, attention_layers=attention_layers
    )


def test_the_default_plan_compares_last_layers_and_evenly_spaced_pairs():
    pairs = plan()
    assert pairs.feature == pairs.attention == ((29, 27),)
    assert pairs.layerwise == ((6, 6), (14, 13), (21, 20), (29, 27))


def test_a_shallow_student_is_compared_layer_by_layer():
    assert plan(2, 4).layerwise == ((0, 1), (1, 3))


def test_an_explicit_map_is_used_whole_and_sorted():
    pairs = plan(layer_map=["8:20", "2:5"], feature_layers=[20], attention_layers=[6, 5])
    assert pairs.layerwise == ((2, 5), (8, 20))
    assert pairs.feature == ((8, 20),) and pairs.attention == ((2, 5), (2, 6))


def test_chosen_teacher_layers_meet_the_student_layer_of_that_depth():
    assert plan(4, 8, feature_layers=[3, 7]).feature == ((1, 3), (3, 7))


@pytest.mark.parametrize(
    ("said", "changes"),
    [
        (
            "layer_map must name layers below 30 of the student and below 28 of the teacher, got 30:0",
            {"layer_map": ["30:0"]},
        ),
        (
            "layer_map must name layers below 30 of the student and below 28 of the teacher, got 0:28",
            {"layer_map": ["0:28"]},
        ),
        ("feature_layers must name layers of the teacher below 28, got 28", {"feature_layers": [3, 28]}),
        ("attention_layers must name layers of the teacher below 28, got 99", {"attention_layers": [99]}),
    ],
)
def test_a_layer_that_does_not_exist_is_named(said, changes):
    with pytest.raises(ConfigurationError, match=said):
        plan(**changes)


def test_the_last_layers_are_compared_whatever_the_map():
    for chosen in (plan(30, 28), plan(30, 28, layer_map=["2:5", "8:20"]), plan(4, 2)):
        assert chosen.feature == chosen.attention
    assert plan(30, 28, layer_map=["2:5", "8:20"]).attention == ((29, 27),)
    assert plan(30, 28, layer_map=["2:5", "8:20"], attention_layers=[21]).attention == ((8, 21),)
    # Two layers of the student stand for one of the teacher: the higher of them is compared.
    assert plan(4, 2, attention_layers=[1]).attention == ((3, 1),)


def test_a_loss_without_weight_needs_no_pairs():
    used = plan().used_by({"feature": 0.1, "layerwise": 0.0, "attention": 0.0})
    assert used.feature and not used.layerwise and not used.attention


@pytest.mark.parametrize(
    ("choice", "depth", "targets"),
    [
        ("last", (7,), ()),
        ("last:1", (7,), ()),
        ("last:2", (5, 7), ()),
        ("all", (1, 3, 5, 7), ()),
        ("last:4", (1, 3, 5, 7), ()),
        (["3"], (7,), (3,)),
        (["5", "1", "7"], (7,), (1, 5)),
    ],
)
def test_a_choice_means_layers_with_experts(choice, depth, targets):
    # Every second layer has experts, and the last layer of all has none.
    routed = RoutedLayers.plan(choice, [1, 3, 5, 7])
    assert (routed.depth, routed.targets) == (depth, targets)
    assert routed.all == tuple(sorted(set(depth + targets)))


@pytest.mark.parametrize(("choice", "got"), [(["2"], "got 2"), (["9"], "got 9"), ("last:5", "got last:5")])
def test_layers_without_experts_cannot_be_routed(choice, got):
    with pytest.raises(ConfigurationError, match=f"router_layers must .* {got}"):
        RoutedLayers.plan(choice, [1, 3, 5, 7])
