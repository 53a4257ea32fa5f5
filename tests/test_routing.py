import copy
import math
from types import SimpleNamespace

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
from distill_trainer.routing import routing_metrics
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


def test_every_router_reads_its_layer_the_student_and_what_the_survey_found():
    """Against the plain models: their own hidden states, beliefs and gate."""
    teacher, batch = Teacher(tiny_moe(), copy.deepcopy(projection()), router_layers="last:2"), collated()
    model = distillation_model(teacher)
    anchors, seen = Anchors.of(batch), {}
    for name, router in model.routing.routers.items():
        router.register_forward_pre_hook(lambda module, inputs, name=name: seen.setdefault(name, inputs))
    route(model, teacher, batch, top_k=3, router_temperature=1.7)
    at_student, at_teacher = (anchors.rows, anchors.student_positions), (anchors.rows, anchors.teacher_positions)
    tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
    own = {"input_ids": batch["teacher_input_ids"], "attention_mask": batch["teacher_attention_mask"]}
    with torch.no_grad():
        student = model.causal_lm(**tokens, output_hidden_states=True)
        plain = teacher.model(**own, output_hidden_states=True)
    belief = torch.log_softmax(student.logits[at_student].double(), dim=-1)
    target = teacher.projection.log_probs(plain.logits[at_teacher]).double()
    gap = (target.exp() * (target - belief)).sum(dim=-1).clamp(min=0)
    entropy = -(belief.exp() * belief).sum(dim=-1) / math.log(belief.shape[-1])
    assert list(seen) == ["1", "2"] and gap.std() > 0 and entropy.std() > 0
    for name, inputs in seen.items():
        hidden, states, found_entropy, found_gap, gate_logits, top_k, temperature = inputs
        torch.testing.assert_close(states, student.hidden_states[-1][at_student])
        torch.testing.assert_close(found_gap.double(), gap, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found_entropy.double(), entropy, rtol=1e-4, atol=1e-5)
        assert (top_k, temperature) == (3, 1.7) and hidden.shape == (len(anchors), teacher.model.config.hidden_size)
        gate = teacher.model.model.layers[int(name)].mlp.gate
        torch.testing.assert_close(gate_logits, hidden.float() @ gate.weight.T.float(), rtol=1e-4, atol=1e-5)


def test_logged_metrics_match_a_loop_over_the_anchors():
    teacher, batch = tiny_teacher(), collated()
    model = distillation_model(teacher)
    prefer(last_router(model), 1, strength=0.3)
    routed = route(model, teacher, batch, top_k=2)
    at = SimpleNamespace(num_anchors=None)
    found = {name: float(value) for name, value in routing_metrics(at, routed).items()}
    count = len(routed.gap)
    load, changed, entropy = [0.0] * 4, 0, 0.0
    for n in range(count):
        experts = routed.router.selected_experts[n].tolist()
        for expert, weight in zip(experts, routed.router.routing_weights[n].tolist(), strict=True):
            load[expert] += weight / count
        changed += experts[0] != int(routed.gate_experts[n, 0])
        entropy -= sum(p * math.log(p) for p in routed.router.router_logits[n].double().softmax(dim=-1).tolist())
    assert found.pop("changed_fraction") == pytest.approx(changed / count) and 0 < changed != count / 2
    assert found.pop("router_entropy") == pytest.approx(entropy / count, rel=1e-5)
    assert found.pop("capacity") == pytest.approx(routed.router.capacity.mean().item(), rel=1e-5)
    assert found == pytest.approx({f"expert_load_{e}": load[e] for e in range(4)}, rel=1e-5)
    assert len({round(value, 4) for value in load}) == 4


def test_the_decisions_of_all_layers_stand_under_their_numbers_the_highest_first():
    teacher = Teacher(tiny_moe(), copy.deepcopy(projection()), router_layers="all")
    model = distillation_model(teacher)
    for layer, expert in (("0", 1), ("1", 3), ("2", 0)):
        prefer(model.routing.routers[layer], expert)
    routed = route(model, teacher, collated(), top_k=1)
    assert [decision.layer for decision in routed.decisions] == [2, 0, 1]
    assert {found.layer: int(found.router.router_logits[0].argmax()) for found in routed.decisions} == {
        0: 1,
        1: 3,
        2: 0,
    }
