import math

import pytest
import torch
from builders import EXCHANGED, collated, tiny_llama, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_trainer.aligned import LayerDecision, RoutedBatch
from distill_trainer.anchors import IGNORE_INDEX, Anchors
from distill_trainer.evaluation import routing
from distill_trainer.evaluation.measure import forward_logits
from distill_trainer.evaluation.routing import (
    ROUTER_KEYS,
    TOKEN_CLASSES,
    RoutingRecord,
    calibration_error,
    passage_windows,
    reliability_bins,
    token_class,
    true_token_answers,
)
from distill_trainer.router import RouterOutput

NUM_EXPERTS = 4


def decided(num_anchors, generator, top_k=2, gate_top_k=1):
    """A decision at random."""
    logits = torch.randn(num_anchors, NUM_EXPERTS, generator=generator)
    weights, experts = logits.softmax(dim=-1).topk(top_k)
    decision = RouterOutput(
        router_logits=logits,
        routing_weights=weights / weights.sum(dim=-1, keepdim=True),
        selected_experts=experts,
        capacity=torch.rand(num_anchors, generator=generator),
        importance=torch.zeros_like(logits),
        capacity_logits=torch.zeros(num_anchors),
    )
    gate = torch.randn(num_anchors, NUM_EXPERTS, generator=generator)
    return LayerDecision(decision, gate, gate.topk(gate_top_k).indices)


def routed(batch, seed=0, layers=(2,), **changes):
    """Decisions at random for the anchors of a batch."""
    generator = torch.Generator().manual_seed(seed)
    mask = Anchors.of(batch).mask
    num_anchors = int(mask.sum())
    decisions = {layer: decided(num_anchors, generator, **changes) for layer in layers}
    nothing = torch.zeros(num_anchors, 1)
    gap = torch.rand(num_anchors, generator=generator)
    return RoutedBatch(nothing, nothing, gap, mask, decisions)


def answered(batch, seed=0):
    """Answers at random, NaN where no student token follows."""
    anchors = Anchors.of(batch)
    answers = torch.rand(*anchors.mask.shape, 2, generator=torch.Generator().manual_seed(seed))
    return answers.masked_fill(~anchors.mask.unsqueeze(-1), torch.nan)


def recorded(batches, side="teacher", **changes):
    """The figures of random decisions on batches, and the decisions."""
    decisions = [routed(batch, seed, **changes) for seed, batch in enumerate(batches)]
    record = RoutingRecord(tokenizer(side), batches)
    for decision, batch in zip(decisions, batches, strict=True):
        record.add(decision, answered(batch), batch)
    return record.figures(), decisions


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (" The", "word start"),
        ("\nThe", "word start"),
        (" don't", "word start"),
        ("ing", "word part"),
        ("'s", "word part"),
        ("(self", "word part"),
        ("é", "word part"),
        ("日本", "word part"),
        ("7", "digits"),
        (" 1862", "digits"),
        ("½", "digits"),
        (" (", "punctuation"),
        (");", "punctuation"),
        ("—", "punctuation"),
        ("$", "punctuation"),
        ("🎉", "punctuation"),
        (" ", "blank"),
        ("\r\n\t", "blank"),
        ("\x00", "other"),
        ("\u200d", "other"),
        ("", "other"),
    ],
)
def test_tokens_are_classed_by_what_they_spell(text, name):
    assert token_class(text.encode()) == name


def test_a_piece_of_a_character_is_no_text():
    assert token_class("é".encode()[:1]) == token_class(" 日".encode()[:-1]) == "other"


@settings(deadline=None, max_examples=200)
@given(content=st.one_of(st.binary(max_size=6), st.text(max_size=6).map(lambda text: text.encode("utf-8"))))
def test_every_token_has_one_class(content):
    assert token_class(content) in TOKEN_CLASSES


@pytest.mark.parametrize("gate_top_k", [1, 2])
def test_routing_figures_match_a_loop_over_anchors(gate_top_k):
    batches = [collated(3), collated(5, padding_side="left")]
    figures, decisions = recorded(batches, gate_top_k=gate_top_k)
    load, gate_load, changed, entropy, capacity, gap, anchors = [0.0] * 4, [0] * 4, 0, 0.0, 0.0, 0.0, 0
    for batch in decisions:
        decision = batch.router
        for n in range(len(batch.gap)):
            for expert, weight in zip(decision.selected_experts[n], decision.routing_weights[n], strict=True):
                load[expert] += weight.item()
            for expert in batch.highest.gate_experts[n]:
                gate_load[expert] += 1 / gate_top_k
            changed += int(decision.selected_experts[n, 0] != batch.highest.gate_experts[n, 0])
            entropy -= sum(p * math.log(p) for p in decision.router_logits[n].double().softmax(dim=-1).tolist())
            capacity += decision.capacity[n].item()
            gap += batch.gap[n].item()
            anchors += 1
    assert tuple(figures) == ROUTER_KEYS
    assert 0 < changed < anchors
    assert figures["expert_load"] == pytest.approx([value / anchors for value in load], rel=1e-6)
    assert figures["gate_load"] == pytest.approx([value / anchors for value in gate_load])
    assert figures["changed_fraction"] == pytest.approx(changed / anchors)
    assert figures["entropy"] == pytest.approx(entropy / anchors)
    assert figures["capacity"] == pytest.approx(capacity / anchors)
    assert figures["gap"] == pytest.approx(gap / anchors)
    assert figures["top_k"] == 2


def test_every_rerouted_layer_has_its_own_loads_and_the_other_figures_are_those_of_the_highest():
    batches = [collated(3), collated(5, padding_side="left")]
    figures, found = recorded(batches, layers=(0, 3, 7), gate_top_k=2)
    anchors = sum(len(batch.gap) for batch in found)
    assert [layer["layer"] for layer in figures["layers"]] == [0, 3, 7]
    for layer in figures["layers"]:
        load, gate_load, changed = [0.0] * 4, [0.0] * 4, 0
        for batch in found:
            decision = batch.decisions[layer["layer"]]
            for n, gate in enumerate(decision.gate_experts.tolist()):
                experts = decision.router.selected_experts[n].tolist()
                for expert, weight in zip(experts, decision.router.routing_weights[n].tolist(), strict=True):
                    load[expert] += weight / anchors
                for expert in gate:
                    gate_load[expert] += 1 / 2 / anchors
                changed += experts[0] != gate[0]
        assert layer["expert_load"] == pytest.approx(load, rel=1e-6)
        assert layer["gate_load"] == pytest.approx(gate_load)
        assert layer["changed_fraction"] == pytest.approx(changed / anchors)
    assert len({layer["changed_fraction"] for layer in figures["layers"]}) == 3
    assert {"layer": 7} | {key: figures[key] for key in ("expert_load", "gate_load", "changed_fraction")} == figures[
        "layers"
    ][-1]
    capacity = sum(batch.decisions[7].router.capacity.sum().item() for batch in found)
    assert figures["capacity"] == pytest.approx(capacity / anchors)


def test_loads_by_class_match_a_loop_over_the_teachers_tokens():
    batches = [collated(5), collated(4, padding_side="left")]
    figures, decisions = recorded(batches)
    expected = {}
    for batch, decision in zip(batches, decisions, strict=True):
        places = [(row, anchor) for row, anchor in decision.mask.nonzero().tolist()]
        for n, (row, anchor) in enumerate(places):
            token = batch["teacher_input_ids"][row, batch["teacher_positions"][row, anchor]]
            text = tokenizer("teacher").decode([token])
            name = (
                "blank"
                if text.isspace()
                else "digits"
                if text.isdigit()
                else "punctuation"
                if not any(map(str.isalnum, text))
                else "word start"
                if text[0] == " "
                else "word part"
            )
            found = expected.setdefault(name, {"anchors": 0, "load": [0.0] * 4, "gate": [0] * 4})
            found["anchors"] += 1
            found["gate"][decision.highest.gate_experts[n, 0]] += 1
            experts = decision.router.selected_experts[n].tolist()
            for expert, weight in zip(experts, decision.router.routing_weights[n].tolist(), strict=True):
                found["load"][expert] += weight
    assert len(expected) >= 4
    # In a fixed order, and without the classes that no anchor belongs to.
    assert [found["name"] for found in figures["token_classes"]] == [
        name for name in TOKEN_CLASSES if name in expected
    ]
    for found in figures["token_classes"]:
        wanted = expected[found["name"]]
        assert found["anchors"] == wanted["anchors"]
        assert found["expert_load"] == pytest.approx([value / wanted["anchors"] for value in wanted["load"]], abs=1e-6)
        assert found["gate_load"] == pytest.approx([value / wanted["anchors"] for value in wanted["gate"]])


def test_without_a_router_all_figures_are_null():
    assert RoutingRecord(tokenizer("teacher"), [collated(2)]).figures() == dict.fromkeys(ROUTER_KEYS)


def test_a_router_at_no_anchor_has_null_figures():
    batch = collated(2)
    batch["labels"].fill_(IGNORE_INDEX)
    assert recorded([batch])[0] == dict.fromkeys(ROUTER_KEYS)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("sides", [("student", "teacher"), EXCHANGED])
def test_answers_are_those_to_the_token_that_follows_each_anchor(monkeypatch, padding_side, sides):
    batch = collated(5, padding_side=padding_side, sides=sides)
    with torch.no_grad():
        logits = forward_logits(tiny_llama(vocab_size=4100, initializer_range=0.3), batch, "student")
    # The likeliest token is the true one at some anchors.
    logits[0, :-1].scatter_(-1, batch["input_ids"][0, 1:].unsqueeze(-1), 30.0)
    expected = torch.full((*batch["anchor_mask"].shape, 2), torch.nan)
    for row, anchor in batch["anchor_mask"].nonzero().tolist():
        upcoming = batch["student_positions"][row, anchor].item() + 1
        if upcoming < batch["labels"].shape[1] and batch["labels"][row, upcoming] != IGNORE_INDEX:
            probabilities = logits[row, upcoming - 1].double().softmax(dim=-1)
            token = batch["input_ids"][row, upcoming]
            expected[row, anchor, 0] = probabilities[token]
            expected[row, anchor, 1] = float(probabilities.argmax() == token)
    monkeypatch.setattr(routing, "ANCHORS_PER_CHUNK", 3)
    answers = true_token_answers(logits, batch)
    torch.testing.assert_close(answers, expected, equal_nan=True, rtol=1e-4, atol=1e-7)
    # Where there is an answer the router was asked as well.
    assert torch.equal(~answers[..., 0].isnan(), Anchors.of(batch).mask)
    assert 0 < answers[..., 1].nansum() < (~answers[..., 1].isnan()).sum()


def test_bins_are_the_means_of_a_tenth_of_the_anchors_each():
    generator = torch.Generator().manual_seed(3)
    capacity, probability = torch.rand(2, 84, generator=generator, dtype=torch.float64)
    correct = (torch.rand(84, generator=generator) < 0.4).double()
    probability[[5, 40]] = correct[[5, 40]] = torch.nan
    known = [anchor for anchor in range(84) if anchor not in (5, 40)]
    order = sorted(known, key=lambda anchor: capacity[anchor].item())
    bins = reliability_bins(capacity, probability, correct)
    assert sum(found["anchors"] for found in bins) == 82 and len(bins) == 10
    error = 0.0
    for number, found in enumerate(bins):
        members = [anchor for rank, anchor in enumerate(order) if rank * 10 // 82 == number]
        means = [
            sum(values[anchor].item() for anchor in members) / len(members)
            for values in (capacity, probability, correct)
        ]
        assert list(found.values()) == pytest.approx([*means, len(members)])
        error += abs(means[0] - means[1]) * len(members) / 82
    assert calibration_error(bins) == pytest.approx(error)


def test_estimates_that_are_right_on_average_have_no_calibration_error():
    probability = torch.linspace(0, 1, 200, dtype=torch.float64)
    correct = torch.zeros(200)
    assert calibration_error(reliability_bins(probability, probability, correct)) == pytest.approx(0)
    # One estimate for all anchors is a single point, whatever the order of the anchors.
    constant = torch.full_like(probability, 0.75)
    (found,) = reliability_bins(constant, probability, correct)
    assert found == pytest.approx({"predicted": 0.75, "observed": 0.5, "correct": 0, "anchors": 200})
    assert calibration_error([found]) == pytest.approx(0.25)


def test_a_capacity_that_nothing_can_be_compared_with_has_no_reliability():
    batch = collated(3)
    record = RoutingRecord(tokenizer("teacher"), [batch])
    decision = routed(batch)
    record.add(decision, torch.full((*decision.mask.shape, 2), torch.nan), batch)
    figures = record.figures()
    assert figures["reliability"] is None and figures["calibration_error"] is None
    assert figures["capacity"] > 0


def test_examples_spell_the_text_between_anchors_with_the_choice_at_each_end():
    for padding_side in ("left", "right"):
        batch = collated(5, padding_side=padding_side)
        figures, (decision,) = recorded([batch])
        # A window with one anchor alone has no text between anchors.
        windows = [row for row in sorted(passage_windows([batch])) if decision.mask[row].sum() > 1]
        assert len(windows) > 2
        for row, example in zip(windows, figures["examples"], strict=True):
            positions = batch["teacher_positions"][row][decision.mask[row]].tolist()
            number = int(decision.mask[:row].sum()) + 1
            assert len(example["tokens"]) == len(positions) - 1 > 0
            for start, end, token in zip(positions, positions[1:], example["tokens"], strict=False):
                assert token == {
                    "text": tokenizer("teacher").decode(batch["teacher_input_ids"][row, start + 1 : end + 1]),
                    "expert": decision.router.selected_experts[number, 0].item(),
                    "gate_expert": decision.highest.gate_experts[number, 0].item(),
                    "gap": decision.gap[number].item(),
                }
                number += 1


def test_examples_are_the_middle_of_long_windows(monkeypatch):
    monkeypatch.setattr(routing, "PASSAGE_PIECES", 5)
    batch = collated(1)
    figures, (decision,) = recorded([batch])
    (example,) = figures["examples"]
    count = int(decision.mask.sum())
    first = (count - 5) // 2
    gaps = [token["gap"] for token in example["tokens"]]
    assert gaps == decision.gap[first : first + 5].tolist() and 1 < first < count - 6


def test_examples_are_found_in_whichever_batch_their_window_is():
    batches = [collated(2), collated(5), collated(3, padding_side="left")]
    figures, decisions = recorded(batches)
    chosen, number, expected = passage_windows(batches), 0, []
    for decision in decisions:
        ends = decision.mask.sum(dim=1).cumsum(0).tolist()
        for start, end in zip([0, *ends], ends, strict=False):
            if number in chosen and end - start > 1:
                expected.append(decision.gap[start + 1 : end].tolist())
            number += 1
    assert [[token["gap"] for token in example["tokens"]] for example in figures["examples"]] == expected
    assert len(expected) > 2


def test_a_piece_is_the_whole_text_since_the_anchor_before():
    # With exchanged sides one student token is often several of the teacher's.
    batch = collated(5, sides=EXCHANGED)
    figures, _ = recorded([batch], side="student")
    ids = batch["teacher_input_ids"]
    texts = [tokenizer("student").decode(row) for row in ids]
    assert any(len(tokenizer("student").tokenize(t["text"])) > 1 for e in figures["examples"] for t in e["tokens"])
    for example in figures["examples"]:
        assert any("".join(token["text"] for token in example["tokens"]) in text for text in texts)


@settings(deadline=None, max_examples=60)
@given(counts=st.lists(st.lists(st.integers(2, 120), min_size=1, max_size=6), min_size=1, max_size=8))
def test_windows_for_examples_are_spread_evenly_over_the_long_ones(counts):
    batches = [
        {"anchor_mask": torch.arange(max(rows)).expand(len(rows), -1) < torch.tensor(rows).unsqueeze(-1)}
        for rows in counts
    ]
    lengths = [count for rows in counts for count in rows]
    chosen = sorted(passage_windows(batches))
    usable = [n for n, count in enumerate(lengths) if count > routing.PASSAGE_PIECES + 1] or list(range(len(lengths)))
    assert len(chosen) == min(len(usable), routing.NUM_PASSAGES) and set(chosen) <= set(usable)
    places = [usable.index(window) for window in chosen]
    steps = [after - before for before, after in zip(places, places[1:], strict=False)]
    assert not steps or max(steps) - min(steps) <= 1
