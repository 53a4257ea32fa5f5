import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_trainer.router import (
    ANCHOR_CORNER,
    ANCHOR_REACH,
    GAP_DECAY,
    GAP_WARMUP_STEPS,
    ROUTER_PARTS,
    KnowledgeGap,
    StudentAwareRouter,
    anchor_cost,
    routing_losses,
    routing_objective,
    sample_experts,
    select_experts,
    student_divergence,
)

EXPERTS, TEACHER, STUDENT, ANCHORS = 5, 12, 8, 7


def router(seed=0):
    torch.manual_seed(seed)
    return StudentAwareRouter(torch.randn(EXPERTS, TEACHER), STUDENT)


def awake(seed=0):
    """A router whose learned part is no longer zero."""
    module = router(seed)
    torch.nn.init.normal_(module.query.weight, std=0.3)
    return module


def inputs(seed=1, **changes):
    generator = torch.Generator().manual_seed(seed)
    values = {
        "teacher_hidden": torch.randn(ANCHORS, TEACHER, generator=generator),
        "student_hidden": torch.randn(ANCHORS, STUDENT, generator=generator),
        "student_entropy": torch.rand(ANCHORS, generator=generator),
        "gap": torch.rand(ANCHORS, generator=generator) * 3,
        "gate_logits": torch.randn(ANCHORS, EXPERTS, generator=generator),
        "top_k": 2,
        "temperature": 1.0,
    }
    return values | changes


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    top_k=st.integers(1, EXPERTS),
    temperature=st.floats(0.1, 10),
    spread=st.sampled_from([0.01, 1, 30]),
)
def test_exactly_top_k_experts_are_selected_and_their_weights_sum_to_one(seed, top_k, temperature, spread):
    logits = spread * torch.randn(ANCHORS, EXPERTS, generator=torch.Generator().manual_seed(seed))
    weights, selected = select_experts(logits, top_k, temperature)
    assert weights.shape == selected.shape == (ANCHORS, top_k)
    assert all(len(set(row)) == top_k for row in selected.tolist())
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(ANCHORS))
    assert (weights[:, 1:] <= weights[:, :-1]).all() and (weights >= 0).all()


@pytest.mark.parametrize("top_k", range(1, EXPERTS + 1))
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_an_untrained_router_is_the_teachers_gate(top_k, temperature):
    values = inputs(top_k=top_k, temperature=temperature)
    output = router()(**values)
    probabilities = (values["gate_logits"].double() / temperature).softmax(dim=-1)
    chosen, selected = probabilities.topk(top_k)
    assert output.importance.eq(0).all() and torch.equal(output.router_logits, values["gate_logits"])
    assert torch.equal(output.selected_experts, selected)
    torch.testing.assert_close(
        output.routing_weights.double(), chosen / chosen.sum(-1, keepdim=True), atol=1e-6, rtol=0
    )


def test_importance_is_the_scaled_product_of_query_and_keys():
    module, values = awake(), inputs()
    output = module(**values)
    teacher, student = (
        values[name].double() / values[name].double().square().mean(-1, keepdim=True).sqrt()
        for name in ("teacher_hidden", "student_hidden")
    )
    modulation = torch.stack([output.capacity.double(), (1 + values["gap"].double()).log()], dim=-1)
    query = torch.cat([teacher, student, modulation], dim=-1) @ module.query.weight.double().T
    expected = query @ module.keys.double().T / TEACHER**0.5
    torch.testing.assert_close(output.importance.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.router_logits, values["gate_logits"] + output.importance)


@pytest.mark.parametrize("name", ["teacher_hidden", "student_hidden", "gap", "student_entropy"])
def test_a_trained_router_reads_each_of_its_inputs(name):
    module, values = awake(), inputs()
    changed = values | {name: values[name].flip(0)}
    assert not torch.allclose(module(**values).router_logits, module(**changed).router_logits, atol=1e-5)


def train(module, permutation, steps=5):
    """Train on a fixed target, with the experts in the given order."""
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    values = inputs(seed=3)
    values["gate_logits"] = values["gate_logits"][:, permutation]
    target = torch.rand(ANCHORS, EXPERTS, generator=torch.Generator().manual_seed(4))[:, permutation]
    for _ in range(steps):
        output = module(**values)
        loss = (target.gather(-1, output.selected_experts) * output.routing_weights).sum()
        parts = routing_losses(output, values["gate_logits"], torch.full((ANCHORS,), 0.3))
        optimizer.zero_grad()
        (loss + parts["anchor"] + parts["balance"] + parts["capacity_bce"]).backward()
        optimizer.step()
    return module(**values)


def test_permuted_experts_are_routed_alike_before_and_after_training():
    permutation = torch.tensor([3, 0, 4, 1, 2])
    rows = torch.randn(EXPERTS, TEACHER, generator=torch.Generator().manual_seed(0))
    for steps in (0, 5):
        outputs = []
        for order in (torch.arange(EXPERTS), permutation):
            torch.manual_seed(1)
            outputs.append(train(StudentAwareRouter(rows[order], STUDENT), order, steps))
        plain, permuted = outputs
        assert torch.equal(permutation[permuted.selected_experts], plain.selected_experts)
        torch.testing.assert_close(permuted.routing_weights, plain.routing_weights, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(permuted.router_logits, plain.router_logits[:, permutation], atol=1e-4, rtol=1e-4)
    assert plain.importance.abs().max() > 0.1


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_routing_weights_carry_a_live_gradient(top_k):
    module = router()
    output = module(**inputs(top_k=top_k))
    output.routing_weights[:, 0].sum().backward()
    assert module.query.weight.grad.abs().max() > 1e-3


def test_a_single_weight_is_one_with_the_gradient_of_its_log_probability():
    logits = torch.randn(ANCHORS, EXPERTS, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights, selected = select_experts(logits, 1, 2.0)
    assert weights.eq(1).all()
    weights.sum().backward()
    reference = logits.detach().clone().requires_grad_()
    (reference / 2.0).log_softmax(-1).gather(-1, selected).sum().backward()
    torch.testing.assert_close(logits.grad, reference.grad)


def test_no_gradient_reaches_the_students_or_the_teachers_side():
    values = inputs()
    for name in ("teacher_hidden", "student_hidden", "student_entropy", "gap", "gate_logits"):
        values[name].requires_grad_()
    output = awake()(**values)
    parts = routing_losses(output, values["gate_logits"], values["student_entropy"])
    sum(parts.values()).backward()
    assert all(values[name].grad is None for name in values if isinstance(values[name], torch.Tensor))
    # Only the mixture itself is differentiated by the gate, for the routers of the layers below it.
    awake()(**values).routing_weights.square().sum().backward()
    assert values["gate_logits"].grad.ne(0).any()
    assert all(values[name].grad is None for name in ("teacher_hidden", "student_hidden", "student_entropy", "gap"))


def test_the_routing_does_not_bend_the_capacity():
    module = awake()
    output = module(**inputs())
    parts = routing_losses(output, inputs()["gate_logits"], torch.full((ANCHORS,), 0.3))
    (output.routing_weights.square().sum() + parts["anchor"] + parts["balance"]).backward()
    assert all(p.grad is None for n, p in module.named_parameters() if n.startswith("capacity"))
    assert module.query.weight.grad.ne(0).any()


def test_the_capacity_learns_what_the_student_can_do():
    module, values = router(), inputs()
    target = torch.linspace(0.05, 0.9, ANCHORS)
    before = module(**values).capacity.detach()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        routing_losses(module(**values), values["gate_logits"], target)["capacity_bce"].backward()
        optimizer.step()
    after = module(**values).capacity.detach()
    assert (after - target).abs().max() < 0.1 < (before - target).abs().max()


def test_the_parts_match_their_definitions():
    module, values = awake(), inputs()
    output = module(**values)
    truth = torch.linspace(0.1, 0.9, ANCHORS)
    parts = routing_losses(output, values["gate_logits"], truth)

    probabilities = output.router_logits.double().softmax(-1)
    gate = values["gate_logits"].double().softmax(-1)
    anchor_kl = (gate * (gate / probabilities).log()).sum(-1).mean()
    load = torch.zeros(ANCHORS, EXPERTS, dtype=torch.double)
    for anchor in range(ANCHORS):
        for weight, expert in zip(output.routing_weights[anchor], output.selected_experts[anchor], strict=True):
            load[anchor, expert] += weight.double()
    balance = EXPERTS * (load.mean(0) * probabilities.mean(0)).sum()
    capacity = output.capacity.double()
    bce = -(truth.double() * capacity.log() + (1 - truth.double()) * (1 - capacity).log()).mean()
    left = anchor_kl / (anchor_kl + ANCHOR_REACH)
    anchor = left / (left + ANCHOR_CORNER) ** 0.5
    for name, expected in (("anchor_kl", anchor_kl), ("anchor", anchor), ("balance", balance), ("capacity_bce", bce)):
        torch.testing.assert_close(parts[name].double(), expected, atol=1e-6, rtol=1e-5)


def test_leaving_the_gate_costs_most_at_first_and_is_bounded():
    kl = torch.tensor([0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 1e4], dtype=torch.double)
    cost = anchor_cost(kl)
    slopes = cost.diff() / kl.diff()
    assert cost[0] == 0 and cost.diff().gt(0).all() and slopes.diff().lt(0).all() and 0.99 < cost[-1] < 1
    # Like the root in between: a tenth of the divergence costs a third.
    assert float(cost[3] / cost[2]) == pytest.approx(10**0.5, rel=0.2)


def learned_on(signal, anchor_weight, seed=0):
    """KL to the gate after training where experts cost noise, and the gate's favourite `signal` nats more."""
    generator = torch.Generator().manual_seed(seed)
    module = router()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    truth = torch.zeros(64)
    for _ in range(150):
        values = {
            "teacher_hidden": torch.randn(64, TEACHER, generator=generator),
            "student_hidden": torch.randn(64, STUDENT, generator=generator),
            "student_entropy": torch.rand(64, generator=generator),
            "gap": torch.rand(64, generator=generator),
            "gate_logits": torch.randn(64, EXPERTS, generator=generator) + torch.tensor([2.0, 0, 0, 0, 0]),
        }
        output = module(**values, top_k=EXPERTS, temperature=1.0)
        costs = torch.randn(64, EXPERTS, generator=generator) + signal * torch.eye(EXPERTS)[0]
        parts = routing_losses(output, values["gate_logits"], truth)
        weights = {"student_weight": 0.0, "anchor_weight": anchor_weight, "balance_weight": 0.0}
        loss = (output.routing_weights * costs.gather(-1, output.selected_experts)).sum(-1).mean()
        optimizer.zero_grad()
        (loss + routing_objective(parts, **weights, capacity_weight=0.0)).backward()
        optimizer.step()
    return parts["anchor_kl"].item()


def test_the_anchor_holds_the_gate_against_noise_and_lets_it_go_for_a_gain():
    assert learned_on(signal=0.0, anchor_weight=0.1) < 0.1 * learned_on(signal=0.0, anchor_weight=0.0)
    assert learned_on(signal=1.0, anchor_weight=0.1) > 2 / 3 * learned_on(signal=1.0, anchor_weight=0.0) > 1


def test_equal_load_has_balance_one_and_a_collapsed_router_more():
    values = inputs(gate_logits=torch.zeros(ANCHORS, EXPERTS), top_k=EXPERTS)
    even = routing_losses(router()(**values), values["gate_logits"], torch.zeros(ANCHORS))["balance"]
    one_sided = torch.tensor([[9.0, 0, 0, 0, 0]]).expand(ANCHORS, -1)
    collapsed = routing_losses(
        router()(**(values | {"gate_logits": one_sided, "top_k": 1})), one_sided, torch.zeros(ANCHORS)
    )
    assert even.item() == pytest.approx(1) and collapsed["balance"].item() == pytest.approx(EXPERTS, rel=0.01)


def test_parts_of_micro_batches_add_up_where_they_are_means_over_anchors():
    module, values = awake(), inputs()
    truth = torch.linspace(0.1, 0.9, ANCHORS)
    whole = routing_losses(module(**values), values["gate_logits"], truth)
    sums = {"anchor_kl": 0.0, "capacity_bce": 0.0}
    for part in (slice(0, 2), slice(2, ANCHORS)):
        some = {n: v[part] if isinstance(v, torch.Tensor) else v for n, v in values.items()}
        losses = routing_losses(module(**some), some["gate_logits"], truth[part], num_items_in_batch=ANCHORS)
        sums = {name: sums[name] + losses[name] for name in sums}
    for name, value in sums.items():
        torch.testing.assert_close(value, whole[name])


def test_no_anchors_give_zero_and_still_backpropagate():
    module = awake()
    values = {n: v[:0] if isinstance(v, torch.Tensor) else v for n, v in inputs().items()}
    parts = routing_losses(module(**values), values["gate_logits"], torch.zeros(0))
    sum(parts.values()).backward()
    assert all(part == 0 for part in parts.values()) and module.query.weight.grad.eq(0).all()


def test_student_divergence_matches_its_definition_over_reachable_tokens():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(ANCHORS, 9, generator=generator)
    teacher = torch.randn(ANCHORS, 9, generator=generator)
    reachable = torch.tensor([True] * 6 + [False, True, False])
    teacher = teacher.masked_fill(~reachable, -torch.inf).log_softmax(-1).clamp(min=-87)
    q = student.double()[:, reachable].softmax(-1)
    p = teacher.double()[:, reachable].softmax(-1)
    expected = (q * (q / p).log()).sum(-1)
    torch.testing.assert_close(
        student_divergence(student, teacher, reachable).double(), expected, atol=1e-6, rtol=1e-5
    )


def test_student_divergence_moves_the_teachers_side_only():
    student = torch.randn(3, 4, requires_grad=True)
    teacher = torch.randn(3, 4, requires_grad=True)
    student_divergence(
        student.log_softmax(-1), teacher.log_softmax(-1), torch.ones(4, dtype=torch.bool)
    ).sum().backward()
    assert student.grad is None and teacher.grad.ne(0).any()


def test_the_objective_is_the_weighted_sum_of_its_parts():
    parts = {
        name: torch.tensor(value)
        for name, value in {
            "ce": 1.0,
            "student_kl": 2.0,
            "anchor": 3.0,
            "balance": 5.0,
            "capacity_bce": 7.0,
        }.items()
    }
    weights = {"student_weight": 0.5, "anchor_weight": 0.1, "balance_weight": 0.01}
    assert float(routing_objective(parts, **weights)) == pytest.approx(0.1 * 3 + 0.01 * 5 + 7)
    assert float(routing_objective(parts, **weights, capacity_weight=0.5)) == pytest.approx(0.1 * 3 + 0.01 * 5 + 3.5)
    parts["student_feature"] = torch.tensor(11.0)
    assert float(routing_objective(parts, **weights)) == pytest.approx(0.1 * 3 + 0.01 * 5 + 7 + 0.5 * 11)


READS = {
    "importance": ("teacher_hidden", "student_hidden"),
    "capacity": ("student_entropy", "student_hidden"),
    "gap": ("gap",),
}


@pytest.mark.parametrize("parts", [(), ("importance",), ("capacity",), ("gap",), ("capacity", "gap"), ROUTER_PARTS])
def test_a_router_reads_what_its_parts_name_and_nothing_else(parts):
    torch.manual_seed(0)
    module = StudentAwareRouter(torch.randn(EXPERTS, TEACHER), STUDENT, parts)
    if parts:
        torch.nn.init.normal_(module.query.weight, std=0.3)
    plain = module(**inputs()).importance
    read = {name for part in parts for name in READS[part]}
    for name in ("teacher_hidden", "student_hidden", "student_entropy", "gap"):
        other = module(**inputs(**{name: inputs(seed=9)[name]})).importance
        assert torch.equal(plain, other) is (name not in read), name
    assert bool(plain.eq(0).all()) is (not parts)


def test_without_parts_the_router_is_the_gate_and_still_fits_the_capacity():
    module = StudentAwareRouter(torch.randn(EXPERTS, TEACHER), STUDENT, ())
    output = module(**inputs())
    assert torch.equal(output.router_logits, inputs()["gate_logits"])
    routing_losses(output, inputs()["gate_logits"], torch.rand(ANCHORS))["capacity_bce"].backward()
    assert module.capacity_output.weight.grad.ne(0).any()


def test_a_duplicated_expert_shares_its_load():
    """Expert 2 twice, in the gate and so in the keys: the copies get the same weight everywhere, trained or not."""
    rows = torch.randn(EXPERTS, TEACHER, generator=torch.Generator().manual_seed(3))
    order = [0, 1, 2, 3, 4, 2]
    torch.manual_seed(0)
    module = StudentAwareRouter(rows[order], STUDENT)
    torch.nn.init.normal_(module.query.weight, std=0.3)
    gate_logits = inputs()["gate_logits"][:, order]

    def load(gate_logits, top_k):
        output = module(**inputs(gate_logits=gate_logits, top_k=top_k))
        return torch.zeros(ANCHORS, 6).scatter(-1, output.selected_experts, output.routing_weights)

    both = load(gate_logits, 6)
    alone = load(gate_logits.index_fill(1, torch.tensor([5]), -torch.inf), 5)
    torch.testing.assert_close(both[:, 2], both[:, 5])
    # Together they get more than the expert alone, each of them less: the softmax has one more term.
    assert (both[:, 2] < alone[:, 2]).all() and (2 * both[:, 2] > alone[:, 2]).all()
    for top_k in (2, 3):
        few = load(gate_logits, top_k)
        chosen = (few[:, 2] > 0) & (few[:, 5] > 0)
        assert chosen.any()
        torch.testing.assert_close(few[chosen, 2], few[chosen, 5])
    # Where one is chosen, one of two that are the same does for both.
    one, single = load(gate_logits, 1), load(gate_logits.index_fill(1, torch.tensor([5]), -torch.inf), 1)
    assert torch.equal(one[:, 2] + one[:, 5], single[:, 2]) and single[:, 2].any()


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_samples_are_sets_drawn_by_the_probabilities(top_k):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    torch.manual_seed(0)
    weights, chosen = sample_experts(logits, top_k, 1.5, 20000)
    assert weights.shape == chosen.shape == (1, 20000, top_k)
    assert all(len(set(row)) == top_k for row in chosen[0, :500].tolist())
    probabilities = (logits[0] / 1.5).softmax(-1)
    first = torch.bincount(chosen[0, :, 0], minlength=4) / 20000
    torch.testing.assert_close(first, probabilities, atol=0.015, rtol=0)
    if top_k == 2:
        pair = (chosen[0] == torch.tensor([0, 1])).all(-1).float().mean()
        expected = probabilities[0] * probabilities[1] / (1 - probabilities[0])
        torch.testing.assert_close(pair, expected, atol=0.015, rtol=0)
    own = probabilities[chosen]
    torch.testing.assert_close(weights, own / own.sum(-1, keepdim=True))


@pytest.mark.parametrize("top_k", [1, 2])
def test_sampled_weights_carry_a_live_gradient(top_k):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], requires_grad=True)
    weights, _ = sample_experts(logits, top_k, 1.0, 2)
    (weights * torch.arange(1.0, 1 + 2 * top_k).view(1, 2, top_k)).sum().backward()
    assert logits.grad.ne(0).any()


def test_the_gap_starts_as_the_mean_of_the_first_steps_and_then_follows():
    gap = KnowledgeGap()
    values = [float(v) for v in torch.linspace(2, 1, GAP_WARMUP_STEPS)]
    for value in values:
        assert gap.ratio() == 1.0
        gap.update(torch.tensor(value))
    mean = sum(values) / len(values)
    assert float(gap.start) == pytest.approx(mean) == pytest.approx(float(gap.running)) and gap.ratio() == 1.0
    gap.update(torch.tensor(0.0))
    assert float(gap.start) == pytest.approx(mean) and gap.ratio() == pytest.approx(GAP_DECAY)


@settings(deadline=None, max_examples=20)
@given(values=st.lists(st.floats(-10, 10), min_size=GAP_WARMUP_STEPS, max_size=GAP_WARMUP_STEPS + 30))
def test_the_gap_ratio_stays_between_zero_and_one(values):
    gap = KnowledgeGap()
    for value in values:
        gap.update(torch.tensor(value))
        assert 0.0 <= gap.ratio() <= 1.0


def test_a_student_that_is_ahead_from_the_start_has_no_gap():
    gap = KnowledgeGap()
    for _ in range(GAP_WARMUP_STEPS + 1):
        gap.update(torch.tensor(-0.5))
    assert gap.ratio() == 0.0


def test_the_gap_lives_in_buffers_so_that_a_copy_continues_it():
    gap = KnowledgeGap()
    for value in range(30):
        gap.update(torch.tensor(float(value)))
    restored = KnowledgeGap()
    restored.load_state_dict(copy.deepcopy(gap.state_dict()))
    assert not list(gap.parameters()) and restored.ratio() == gap.ratio()
    for module in (gap, restored):
        module.update(torch.tensor(3.0))
    assert torch.equal(gap.running, restored.running)
