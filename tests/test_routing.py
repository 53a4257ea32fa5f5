import copy
import math
from dataclasses import replace

import pytest
import torch
from builders import (
    collated,
    distillation_model,
    last_router,
    projection,
    run,
    scheduled,
    tiny_llama,
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


def test_what_a_target_of_two_losses_asks_of_its_router_is_their_mean():
    teacher, batch = targets_teacher(), collated()
    model = distillation_model(teacher, layers=[1])
    at = [layer for _, layer in model.pairs.layerwise].index(1)
    model.layerwise_projections[at].load_state_dict(model.feature_projections[0].state_dict())
    model.pairs = replace(model.pairs, feature=(model.pairs.layerwise[at],))
    one, two = (
        run(model, teacher, batch, frozenset(names))["router"]["student_feature"].detach()
        for names in (["feature"], ["feature", "layerwise"])
    )
    torch.testing.assert_close(two, one)


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
    assert result["losses"]["layerwise"].item() == pytest.approx(sum(by_hand) / 2, rel=1e-5)
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


def plain_choices(teacher, batch):
    """What the gates choose while the teacher's own model reads the text, most weight first, by layer."""
    anchors, found = Anchors.of(batch), {}

    def keep(layer):
        def hook(module, inputs, outputs):
            _, weights, experts = outputs
            ranked = [sorted(zip(w, e, strict=True), reverse=True) for w, e in zip(weights, experts, strict=True)]
            found[layer] = torch.tensor([[int(expert) for _, expert in pairs] for pairs in ranked])

        return hook

    hooks = [block.gate.register_forward_hook(keep(layer)) for layer, block in teacher.blocks.items()]
    with torch.no_grad():
        teacher.model(batch["teacher_input_ids"], attention_mask=batch["teacher_attention_mask"])
    for hook in hooks:
        hook.remove()
    length = batch["teacher_input_ids"].shape[1]
    return {layer: experts[anchors.rows * length + anchors.teacher_positions] for layer, experts in found.items()}


@pytest.mark.parametrize("router_layers", ["last", "last:2", "all", ["0", "1"]])
def test_the_gates_choice_is_that_of_the_teacher_as_it_is_in_every_rerouted_layer(router_layers):
    teacher = Teacher(tiny_moe(), copy.deepcopy(projection()), router_layers=router_layers)
    batch, model = collated(padding_side="left"), distillation_model(teacher)
    output = teacher(batch, Anchors.of(batch), layers=teacher.routed.targets)
    routed = model.route_batch(batch, teacher, output, scheduled(top_k=1))
    expected = plain_choices(teacher, batch)
    assert tuple(routed.decisions) == teacher.routed.all
    for layer, decision in routed.decisions.items():
        assert torch.equal(decision.gate_experts, expected[layer])
    assert routed.highest is routed.decisions[2]
    # The test would be void if the layers below changed no gate's mind.
    again = routed.highest.gate_logits.argmax(dim=-1) != routed.highest.gate_experts[:, 0]
    assert again.any().item() is (router_layers in ("last:2", "all"))


def test_the_gates_first_expert_is_known_whatever_order_the_gate_gives():
    teacher, batch = tiny_teacher(), collated()
    model = distillation_model(teacher)
    torch.nn.init.zeros_(last_router(model).query.weight)
    before = route(model, teacher, batch, top_k=2).highest
    gate = teacher.blocks[2].gate
    gate.register_forward_hook(lambda _, __, outputs: (outputs[0], *(values.flip(-1) for values in outputs[1:])))
    after = route(model, teacher, batch, top_k=2).highest
    assert torch.equal(after.gate_experts, before.gate_experts)
    assert torch.equal(after.router.selected_experts[:, 0], after.gate_experts[:, 0])


@pytest.mark.parametrize("router_layers", ["last", "all"])
def test_what_is_logged_of_the_router_matches_a_loop_over_the_anchors(router_layers):
    teacher, batch = Teacher(tiny_moe(), copy.deepcopy(projection()), router_layers=router_layers), collated()
    model = distillation_model(teacher)
    routed = route(model, teacher, batch, top_k=2)
    decision, first = routed.decisions[2].router, plain_choices(teacher, batch)[2][:, 0].tolist()
    anchors = len(first)
    found = run(model, teacher, batch, num_anchors_in_batch=torch.tensor(2.0 * anchors))["metrics"]
    load, changed, entropy, capacity = [0.0] * 4, 0, 0.0, 0.0
    for n in range(anchors):
        scores = [math.exp(score) for score in decision.router_logits[n].tolist()]
        shares = [score / sum(scores) for score in scores]
        best = sorted(range(4), key=lambda expert: -shares[expert])[:2]
        for expert in best:
            load[expert] += shares[expert] / sum(shares[e] for e in best)
        changed += best[0] != first[n]
        entropy -= sum(share * math.log(share) for share in shares)
        capacity += 1 / (1 + math.exp(-decision.capacity_logits[n].item()))
    # Neither half of the anchors, nor the same load for two experts: each mistake would show.
    assert 0 < changed < anchors and abs(2 * changed - anchors) > 1 and len({round(value, 2) for value in load}) == 4
    expected = {"changed_fraction": changed, "router_entropy": entropy, "capacity": capacity}
    expected |= {f"expert_load_{expert}": value for expert, value in enumerate(load)}
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value / (2 * anchors), rel=1e-4), name


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_router_receives_both_states_entropy_and_gap_of_its_own_anchor(padding_side):
    teacher, batch = tiny_teacher(), collated(padding_side=padding_side)
    # A student this sure of itself has another entropy and gap at every anchor.
    model, received = distillation_model(teacher, tiny_llama(initializer_range=0.3)), []
    last_router(model).register_forward_pre_hook(lambda _, inputs: received.append(inputs))
    route(model, teacher, batch, top_k=1, router_temperature=0.7)
    ((teacher_states, student_states, entropy, gap, gate_logits, top_k, temperature),) = received
    assert (top_k, temperature) == (1, 0.7)

    inputs_of_block = []
    hook = teacher.blocks[2].register_forward_pre_hook(lambda _, inputs: inputs_of_block.append(inputs[0]))
    with torch.no_grad():
        sides = (("", model.causal_lm), ("teacher_", teacher.model))
        outputs = [
            side(batch[f"{name}input_ids"], attention_mask=batch[f"{name}attention_mask"], output_hidden_states=True)
            for name, side in sides
        ]
    hook.remove()
    anchors = Anchors.of(batch)
    places = zip(anchors.rows, anchors.student_positions, anchors.teacher_positions, strict=True)
    for n, (row, student_position, teacher_position) in enumerate(places):
        student = outputs[0].logits[row, student_position].double().log_softmax(dim=-1)
        belief = teacher.projection.log_probs(outputs[1].logits[row, teacher_position][None].double())[0]
        torch.testing.assert_close(student_states[n], outputs[0].hidden_states[-1][row, student_position])
        torch.testing.assert_close(teacher_states[n], inputs_of_block[0][row, teacher_position])
        scores = teacher.blocks[2].gate(inputs_of_block[0][row, teacher_position][None])[0][0]
        torch.testing.assert_close(gate_logits[n], scores)
        share = -float((student.exp() * student).sum()) / math.log(len(student))
        assert entropy[n].item() == pytest.approx(share, rel=1e-4)
        assert gap[n].item() == pytest.approx(float((belief.exp() * (belief - student)).sum()), rel=1e-3)
    assert gap.std() > 0.05 and entropy.std() > 1e-3
