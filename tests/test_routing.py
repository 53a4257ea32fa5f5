import copy

import pytest
import torch
from builders import (
    collated,
    distillation_model,
    last_router,
    projection,
    run,
    scheduled,
    tiny_moe,
    tiny_teacher,
)

from distill_trainer.anchors import Anchors
from distill_trainer.losses.feature import feature_loss
from distill_trainer.teacher import Teacher


def targets_teacher():
    """A teacher whose layer 1 is re-routed as a target only, beside the last."""
    return Teacher(tiny_moe(), copy.deepcopy(projection()), router_layers=["1"])


def route(model, teacher, batch, **changes):
    return model.route_batch(batch, teacher, teacher(batch, Anchors.of(batch)), scheduled(**changes))


def prefer(router, expert, strength=60.0):
    """Add `strength` to the router's score of one expert, whatever it reads."""

    def forward(*inputs):
        decision = original(*inputs)
        decision.router_logits = decision.router_logits.clone()
        decision.router_logits[:, expert] += strength
        return decision

    original, router.forward = router.forward, forward


def test_a_target_is_learnable_for_its_router_and_fixed_for_the_student():
    teacher = targets_teacher()
    model = distillation_model(teacher)
    run(model, teacher, collated())["router"]["student_feature"].backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.ne(0).any()}
    assert moved == {"routing.routers.1.query.weight", "routing.routers.1.keys"}


def test_the_student_learns_from_the_rerouted_target_and_does_not_move_it():
    teacher, batch = targets_teacher(), collated()
    model = distillation_model(teacher)
    seen, original = [], teacher.reroute

    def spy(output, choose):
        seen.append((output, original(output, choose)))
        return seen[-1][1]

    teacher.reroute = spy
    result = run(model, teacher, batch, frozenset({"layerwise"}))
    result["losses"]["layerwise"].backward()
    assert all(p.grad is None or not p.grad.any() for p in model.routing.parameters())

    (output, rerouted), states = seen[0], []
    hooks = [
        layer.register_forward_hook(lambda _, __, state: states.append(state))
        for layer in model.causal_lm.model.layers
    ]
    model.causal_lm(batch["input_ids"], attention_mask=batch["attention_mask"])
    for hook in hooks:
        hook.remove()
    at, mask = (output.anchors.rows, output.anchors.student_positions), torch.ones(len(output.residual)).bool()
    students = [project(state[at]) for project, state in zip(model.layerwise_projections, states, strict=True)]
    targets = rerouted.layers[1], rerouted.residual
    by_hand = [
        float(feature_loss(student, target, mask).detach()) for student, target in zip(students, targets, strict=True)
    ]
    assert float(result["losses"]["layerwise"]) == pytest.approx(sum(by_hand) / 2, rel=1e-5)
    own = float(feature_loss(students[0], output.layers[1], mask).detach())
    assert abs(own - by_hand[0]) > 1e-3, "the own gate's state would be another target"


def test_samples_are_drawn_from_the_routers_scores_and_their_states_averaged():
    teacher, batch = tiny_teacher(), collated()
    model = distillation_model(teacher)
    prefer(last_router(model), 1)
    model.routing.num_samples = 5
    sampled = route(model, teacher, batch, top_k=1)
    output = teacher(batch, Anchors.of(batch))
    expert = torch.full((len(output.residual), 1), 1)
    expected = teacher.reroute(output, lambda *_: (expert, torch.ones(expert.shape)))
    torch.testing.assert_close(sampled.residual, expected.residual)
    # At a temperature far above the scores the draws are even.
    even = route(model, teacher, batch, top_k=1, router_temperature=1e6)
    assert (even.residual - expected.residual).abs().max() > 1e-2


def test_the_residual_of_samples_is_their_mean():
    teacher, batch = tiny_teacher(), collated()
    model = distillation_model(teacher)
    model.routing.num_samples = 3
    torch.manual_seed(0)
    routed = route(model, teacher, batch, top_k=1)
    torch.manual_seed(0)
    seen = []
    original = teacher.reroute

    def spy(output, choose):
        seen.append(original(output, choose))
        return seen[-1]

    teacher.reroute = spy
    route(model, teacher, batch, top_k=1)
    assert seen[0].residual.shape[1] == 3
    torch.testing.assert_close(routed.residual, seen[0].residual.mean(dim=1))


def test_the_gates_first_expert_is_known_whatever_order_the_gate_gives():
    teacher, batch = tiny_teacher(), collated()
    model = distillation_model(teacher)
    torch.nn.init.zeros_(last_router(model).query.weight)
    before = route(model, teacher, batch, top_k=2)
    output = teacher(batch, Anchors.of(batch))
    for own in output.experts.values():
        own.selected_experts, own.routing_weights = own.selected_experts.flip(-1), own.routing_weights.flip(-1)
    after = model.route_batch(batch, teacher, output, scheduled(top_k=2))
    assert torch.equal(after.gate_experts, before.gate_experts)
    assert torch.equal(after.router.selected_experts[:, 0], after.gate_experts[:, 0])
