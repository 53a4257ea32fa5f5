import math

import pytest
import torch
from builders import SAME, STUDENT_ROWS, collated, projection, tiny_llama, tiny_moe
from transformers import MambaConfig, MambaForCausalLM

from distill_trainer.aligned import RoutedBatch
from distill_trainer.evaluation import agreement
from distill_trainer.evaluation.agreement import (
    ROUTER_KEYS,
    attention_similarity,
    gap_closed,
    replace_at_anchors,
    retention_sums,
    router_figures,
    router_sums,
)
from distill_trainer.evaluation.measure import forward_logits
from distill_trainer.router import RouterOutput


def routed(seed=0, num_anchors=6, num_experts=4, top_k=2, gate_top_k=1):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_anchors, num_experts, generator=generator)
    weights, experts = logits.softmax(dim=-1).topk(top_k)
    decision = RouterOutput(
        router_logits=logits,
        routing_weights=weights / weights.sum(dim=-1, keepdim=True),
        selected_experts=experts,
        capacity=torch.rand(num_anchors, generator=generator),
        importance=torch.zeros_like(logits),
        capacity_logits=torch.zeros(num_anchors),
    )
    gate = torch.randn(num_anchors, num_experts, generator=generator)
    nothing = torch.zeros(num_anchors, 1)
    gap = torch.rand(num_anchors, generator=generator)
    mask = torch.ones(1, num_anchors, dtype=torch.bool)
    return RoutedBatch(nothing, nothing, gap, mask, decision, gate, gate.topk(gate_top_k).indices)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_retention_is_summed_over_anchors_whatever_the_chunks(monkeypatch, padding_side):
    batch = collated(5, padding_side=padding_side)
    with torch.no_grad():
        student_logits = forward_logits(tiny_llama(), batch, "student")
        teacher_logits = forward_logits(tiny_moe(), batch, "teacher")
    divergence = agreed = shared = anchors = 0
    for row, anchor in batch["anchor_mask"].nonzero().tolist():
        p = projection()(
            teacher_logits[row, batch["teacher_positions"][row, anchor]]
            .double()
            .masked_fill(projection().student_ids < 0, -torch.inf)
            .softmax(dim=-1)
        )
        q = student_logits[row, batch["student_positions"][row, anchor]].double().softmax(dim=-1)
        divergence += sum((p[v] * (p[v] / q[v]).log()).item() for v in p.nonzero()[:, 0].tolist())
        agreed += int(p.argmax() == q.argmax())
        shared += len({*p.topk(5).indices.tolist()} & {*q.topk(5).indices.tolist()}) / 5
        anchors += 1
    monkeypatch.setattr(agreement, "ANCHORS_PER_CHUNK", 4)
    sums = retention_sums(student_logits, teacher_logits, batch, projection().log_probs)
    assert sums.tolist() == pytest.approx([divergence, agreed, shared, anchors], rel=1e-4)


def test_only_the_routed_anchors_get_other_beliefs():
    batch = collated(5, padding_side="left")
    mask = batch["anchor_mask"].clone()
    mask[:, -1] = False
    mask[0, 0] = False
    values = torch.zeros(*batch["teacher_input_ids"].shape, 3)
    rows = torch.arange(1.0, int(mask.sum()) + 1)[:, None].expand(-1, 3).half()
    replaced = replace_at_anchors(values, rows, batch, mask)
    expected, number = torch.zeros_like(values), 0
    for row, anchor in mask.nonzero().tolist():
        number += 1
        expected[row, batch["teacher_positions"][row, anchor]] = number
    assert replaced is values and torch.equal(values, expected)


@pytest.mark.parametrize(
    ("before", "after", "teacher", "closed"),
    [
        (3.0, 2.5, 2.0, 0.5),
        (3.0, 3.5, 2.0, -0.5),
        (3.0, 1.5, 2.0, 1.5),
        (2.0, 1.9, 2.0, None),
        (2.0, 1.9, 2.5, None),
        (None, 1.9, 2.5, None),
        (3.0, None, 2.5, None),
        (3.0, 2.0, None, None),
    ],
)
def test_the_closed_gap_is_a_share_of_what_the_teacher_knew_more(before, after, teacher, closed):
    assert gap_closed(before, after, teacher) == closed


def eager_similarity(student, teacher, batch):
    """From the attention maps that the eager implementation returns, one anchor and one span at a time."""
    maps = []
    for model, prefix, side in ((student, "", "student"), (teacher, "teacher_", "teacher")):
        model.set_attn_implementation("eager")
        with torch.no_grad():
            attentions = model(
                input_ids=batch[f"{prefix}input_ids"],
                attention_mask=batch[f"{prefix}attention_mask"],
                output_attentions=True,
            ).attentions[-1]
        model.set_attn_implementation("sdpa")
        maps.append((attentions.double().mean(dim=1), batch[f"{side}_positions"]))
    values = []
    for row, present in enumerate(batch["anchor_mask"].sum(dim=1).tolist()):
        for anchor in range(1, present):
            p, q = (
                [
                    attention[row, positions[row, anchor], start + 1 : positions[row, span] + 1].sum().item()
                    for span, start in enumerate([-1, *positions[row, :anchor].tolist()])
                ]
                for attention, positions in maps
            )
            middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
            halves = [sum(a * math.log2(a / m) for a, m in zip(side, middle, strict=True) if a) for side in (p, q)]
            values.append(1 - sum(halves) / 2)
    return sum(values) / len(values)


def test_attention_is_compared_in_the_last_layer_over_the_spans_between_anchors():
    student, teacher, batch = tiny_llama(), tiny_moe(), collated(5)
    similarity = attention_similarity(student, teacher, [batch])
    assert 0.1 < similarity < 0.999
    assert similarity == pytest.approx(eager_similarity(student, teacher, batch), rel=1e-5)


def test_a_model_attends_as_itself():
    batch = collated(2, sides=SAME)
    assert attention_similarity(tiny_llama(), tiny_llama(), [batch]) == pytest.approx(1.0)


def test_attention_that_cannot_be_read_or_compared_has_no_similarity():
    batch = collated(2, sides=SAME)
    config = MambaConfig(vocab_size=STUDENT_ROWS, hidden_size=16, state_size=4, num_hidden_layers=2)
    assert attention_similarity(tiny_llama(), MambaForCausalLM(config), [batch]) is None
    batch["anchor_mask"][:, 1:] = False
    assert attention_similarity(tiny_llama(), tiny_llama(), [batch]) is None


def test_routing_figures_match_a_loop_over_anchors():
    batches = [routed(seed=0, num_anchors=6), routed(seed=1, num_anchors=3)]
    load, gate_load, changed, entropy, capacity, gap, anchors = [0.0] * 4, [0] * 4, 0, 0.0, 0.0, 0.0, 0
    for batch in batches:
        decision = batch.router
        for n in range(len(batch.gap)):
            for expert, weight in zip(decision.selected_experts[n], decision.routing_weights[n], strict=True):
                load[expert] += weight.item()
            gate_load[batch.gate_experts[n, 0]] += 1
            changed += int(decision.selected_experts[n, 0] != batch.gate_experts[n, 0])
            entropy -= sum(p * math.log(p) for p in decision.router_logits[n].double().softmax(dim=-1).tolist())
            capacity += decision.capacity[n].item()
            gap += batch.gap[n].item()
            anchors += 1
    sums = [router_sums(batch) for batch in batches]
    figures = router_figures({key: sums[0][key] + sums[1][key] for key in sums[0]}, top_k=2)
    assert tuple(figures) == ROUTER_KEYS
    assert 0 < changed < anchors
    assert figures["expert_load"] == pytest.approx([value / anchors for value in load], rel=1e-6)
    assert figures["gate_load"] == pytest.approx([value / anchors for value in gate_load])
    assert figures["changed_fraction"] == changed / anchors
    assert figures["entropy"] == pytest.approx(entropy / anchors)
    assert figures["capacity"] == pytest.approx(capacity / anchors)
    assert figures["gap"] == pytest.approx(gap / anchors)
    assert figures["top_k"] == 2


def test_without_a_router_its_figures_are_null():
    assert router_figures({}, 0) == dict.fromkeys(ROUTER_KEYS)
