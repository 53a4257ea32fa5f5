import math

import pytest
import torch
from builders import SAME, STUDENT_ROWS, TEXTS, collated, projection, tiny_llama, tiny_moe, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MambaConfig, MambaForCausalLM

from distill_trainer.anchors import Anchors
from distill_trainer.evaluation import agreement
from distill_trainer.evaluation.agreement import (
    attention_similarity,
    gap_deciles,
    quantile_groups,
    replace_at_anchors,
    retention_values,
)
from distill_trainer.evaluation.measure import forward_logits
from distill_trainer.evaluation.windows import evaluation_batches


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_retention_is_that_of_every_anchor_that_a_token_follows_whatever_the_chunks(monkeypatch, padding_side):
    batch = collated(5, padding_side=padding_side)
    with torch.no_grad():
        student_logits = forward_logits(tiny_llama(), batch, "student")
        teacher_logits = forward_logits(tiny_moe(), batch, "teacher")
    expected = []
    assert 0 < len(Anchors.of(batch)) < int(batch["anchor_mask"].sum())
    for row, anchor in Anchors.of(batch).mask.nonzero().tolist():
        p = projection()(
            teacher_logits[row, batch["teacher_positions"][row, anchor]]
            .double()
            .masked_fill(projection().student_ids < 0, -torch.inf)
            .softmax(dim=-1)
        )
        q = student_logits[row, batch["student_positions"][row, anchor]].double().softmax(dim=-1)
        divergence = sum((p[v] * (p[v] / q[v]).log()).item() for v in p.nonzero()[:, 0].tolist())
        shared = len({*p.topk(5).indices.tolist()} & {*q.topk(5).indices.tolist()}) / 5
        expected.append((divergence, int(p.argmax() == q.argmax()), shared))
    monkeypatch.setattr(agreement, "ANCHORS_PER_CHUNK", 4)
    values = retention_values(student_logits, teacher_logits, batch, projection().log_probs)
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5)


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
    present = batch.get("window_anchor_mask", batch["anchor_mask"])
    for row, anchors in enumerate(present.sum(dim=1).tolist()):
        for anchor in range(1, anchors):
            if not batch["anchor_mask"][row, anchor]:
                continue
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


def test_the_context_of_a_window_is_attended_to_in_its_own_spans():
    student, teacher = tiny_llama(), tiny_moe()
    tokenizers = tokenizer("student"), tokenizer("teacher")
    batches, _ = evaluation_batches(TEXTS, *tokenizers, max_length=16, stride=6, batch_size=64)
    (batch,) = batches
    assert (batch["window_anchor_mask"] & ~batch["anchor_mask"]).sum() > 20
    expected = eager_similarity(student, teacher, batch)
    assert attention_similarity(student, teacher, [batch]) == pytest.approx(expected, rel=1e-5)
    # Where the context is one span, the models look more alike.
    coarse = {key: value for key, value in batch.items() if key != "window_anchor_mask"}
    assert attention_similarity(student, teacher, [coarse]) != pytest.approx(expected, rel=1e-3)


def test_a_model_attends_as_itself():
    batch = collated(2, sides=SAME)
    assert attention_similarity(tiny_llama(), tiny_llama(), [batch]) == pytest.approx(1.0)


def test_attention_that_cannot_be_read_or_compared_has_no_similarity():
    batch = collated(2, sides=SAME)
    config = MambaConfig(vocab_size=STUDENT_ROWS, hidden_size=16, state_size=4, num_hidden_layers=2)
    assert attention_similarity(tiny_llama(), MambaForCausalLM(config), [batch]) is None
    # Its attention has sinks, which a tap would drop.
    assert attention_similarity(tiny_llama(), tiny_moe("gpt_oss"), [batch]) is None
    batch["anchor_mask"][:, 1:] = False
    assert attention_similarity(tiny_llama(), tiny_llama(), [batch]) is None


@settings(deadline=None, max_examples=60)
@given(values=st.lists(st.integers(0, 30), max_size=60), num_groups=st.integers(1, 12))
def test_groups_hold_every_value_once_in_order_and_equal_ones_together(values, num_groups):
    values = torch.tensor(values, dtype=torch.float64)
    groups = quantile_groups(values, num_groups)
    assert sorted(torch.cat(groups).tolist()) == list(range(len(values))) if groups else not len(values)
    assert len(groups) <= num_groups and all(len(members) for members in groups)
    for lower, upper in zip(groups, groups[1:], strict=False):
        assert values[lower].max() < values[upper].min()


@settings(deadline=None, max_examples=60)
@given(size=st.integers(0, 80), num_groups=st.integers(1, 12), seed=st.integers(0, 1000))
def test_groups_of_different_values_are_equally_large(size, num_groups, seed):
    values = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).double()
    sizes = [len(members) for members in quantile_groups(values, num_groups)]
    assert len(sizes) == min(size, num_groups)
    assert not sizes or max(sizes) - min(sizes) <= 1


def test_deciles_are_the_means_of_ten_groups_sorted_by_the_gap_before():
    generator = torch.Generator().manual_seed(0)
    before, after, baseline = torch.rand(3, 57, generator=generator, dtype=torch.float64)
    order = sorted(range(57), key=lambda anchor: before[anchor].item())
    expected = []
    for decile in range(10):
        members = [anchor for rank, anchor in enumerate(order) if rank * 10 // 57 == decile]
        means = {
            name: sum(values[anchor].item() for anchor in members) / len(members)
            for name, values in (("before", before), ("after", after), ("baseline", baseline))
        }
        expected.append({"anchors": len(members), **means})
    found = gap_deciles(before, after, baseline)
    assert [decile["anchors"] for decile in found] == [decile["anchors"] for decile in expected]
    for decile, wanted in zip(found, expected, strict=True):
        assert decile == pytest.approx(wanted)


def test_what_the_deciles_need_and_lack_is_null():
    gaps = torch.rand(30)
    assert gap_deciles(None, gaps, gaps) is None
    assert {decile["baseline"] for decile in gap_deciles(gaps, gaps, None)} == {None}
    # Too few anchors for ten groups.
    assert [decile["anchors"] for decile in gap_deciles(gaps[:3], gaps[:3], None)] == [1, 1, 1]


def test_a_gap_that_changes_by_chance_alone_falls_in_the_last_decile_and_rises_in_the_first():
    before, after = torch.rand(2, 5000, generator=torch.Generator().manual_seed(1))
    first, *_, last = gap_deciles(before, after, None)
    assert first["after"] > first["before"] + 0.3 and last["after"] < last["before"] - 0.3
