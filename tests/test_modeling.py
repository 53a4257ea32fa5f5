import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from builders import (
    ALL,
    NO_LOSSES,
    SAME,
    STUDENT_ROWS,
    TEACHER_ROWS,
    collated,
    distillation_model,
    last_router,
    projection,
    run,
    scheduled,
    tiny_llama,
    tiny_moe,
    tiny_teacher,
    tokenizer,
    weights_of,
)
from transformers import MistralConfig, MistralForCausalLM

from distill_trainer.alignment import VocabularyProjection
from distill_trainer.anchors import IGNORE_INDEX, Anchors
from distill_trainer.losses.attention import MASS_FLOOR
from distill_trainer.losses.contrastive import MAX_ANCHORS
from distill_trainer.router import routing_objective
from distill_trainer.schedules import LOGIT_LOSSES, LOSS_NAMES
from distill_trainer.teacher import Teacher

# Terms whose value depends on who shares the micro-batch.
BATCH_LEVEL = {"contrastive", "balance", "anchor"}


def objective(result):
    """The router's whole objective, of a result without `kl` and `lm`."""
    weights = {"student_weight": 0.1, "anchor_weight": 0.1, "balance_weight": 0.01}
    return result["logit_loss"] + routing_objective(result["router"], **weights)


def weighed(result):
    """The sum of all losses, each with weight 1, and of the router's objective."""
    others = [value for name, value in result["losses"].items() if name not in LOGIT_LOSSES]
    return objective(result) + sum(others)


def values_of(result):
    return {name: value.detach() for name, value in (result["losses"] | result["router"]).items()}


def test_every_loss_and_every_part_of_the_routers_objective_comes_back_finite():
    teacher = tiny_teacher()
    result = run(distillation_model(teacher), teacher, collated())
    assert set(result["losses"]) == ALL
    assert set(result["router"]) == {"ce", "student_kl", "anchor_kl", "anchor", "balance", "capacity_bce"}
    assert result["logit_loss"].isfinite() and result["logit_loss"].requires_grad
    for group in (result["losses"], result["router"], result["metrics"]):
        assert all(value.isfinite() and value.ndim == 0 for value in group.values())
    assert not any(value.requires_grad for value in result["metrics"].values())
    loads = [value for name, value in result["metrics"].items() if name.startswith("expert_load_")]
    assert len(loads) == 4 and float(sum(loads)) == pytest.approx(1)


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_only_the_losses_asked_for_are_computed(name):
    teacher = tiny_teacher()
    assert set(run(distillation_model(teacher), teacher, collated(), frozenset({name}))["losses"]) == {name}


def test_layers_without_an_active_loss_are_not_tapped():
    model = distillation_model(tiny_teacher())
    assert model.tapped_layers(weights_of(frozenset({"kl", "lm", "contrastive"})), side=0) == {
        "layers": (),
        "attention_layers": (),
    }
    assert model.tapped_layers(weights_of(frozenset({"feature"})), side=1) == {"layers": (2,), "attention_layers": ()}
    tapped = model.tapped_layers(weights_of(frozenset({"layerwise", "attention"})), side=0)
    assert tapped == {"layers": (0, 1), "attention_layers": (1,)}


def test_the_routers_objective_moves_the_router_alone():
    teacher = tiny_teacher()
    model = distillation_model(teacher)
    objective(run(model, teacher, collated(), NO_LOSSES)).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {name for name, _ in model.named_parameters() if name.startswith("routing.")}
    assert all(p.grad is None for p in teacher.model.parameters())


@pytest.mark.parametrize("part", ["anchor", "balance"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_each_part_of_the_routing_objective_reaches_the_routers_query(part, top_k):
    teacher = tiny_teacher()
    model = distillation_model(teacher)
    run(model, teacher, collated(), values=scheduled(top_k=top_k))["router"][part].backward()
    assert last_router(model).query.weight.grad.abs().max() > 0


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_both_parts_that_need_logits_reach_the_routers_query(top_k):
    gradients = []
    for student_weight in (0.0, 1.0):
        teacher = tiny_teacher()
        model = distillation_model(teacher, router_student_weight=student_weight)
        run(model, teacher, collated(), NO_LOSSES, values=scheduled(top_k=top_k))["logit_loss"].backward()
        gradients.append(last_router(model).query.weight.grad)
    assert gradients[0].abs().max() > 0 and (gradients[1] - gradients[0]).abs().max() > 0


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_a_students_loss_moves_the_student_and_never_the_router(name):
    teacher = tiny_teacher()
    model = distillation_model(teacher)
    if name in LOGIT_LOSSES:
        # The gradients of the logit losses and of the router's share come together: without the share none is left.
        own = run(model, teacher, collated(), NO_LOSSES)["logit_loss"]
        (run(model, teacher, collated(), frozenset({name}))["logit_loss"] - own).backward()
    else:
        run(model, teacher, collated())["losses"][name].backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e-6 for p in last_router(model).parameters())
    assert any(p.grad is not None and p.grad.ne(0).any() for p in model.student.parameters())
    for projections in ("feature", "layerwise", "contrastive"):
        grads = [p.grad for p in getattr(model, f"{projections}_projections").parameters()]
        assert all((grad is not None and bool(grad.ne(0).any())) is (name == projections) for grad in grads)


def test_the_losses_match_their_definitions():
    teacher = tiny_teacher()
    model = distillation_model(teacher, gap_weighting=False)
    batch, values = collated(), scheduled(temperature=2.0, top_k=2)
    result = run(model, teacher, batch, values=values)
    anchors = Anchors.of(batch)
    with torch.no_grad():
        logits = model.student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
        routed = model.route_batch(batch, teacher, teacher(batch, anchors), values)
    at = logits[anchors.rows, anchors.student_positions]
    q = teacher.projection.log_probs(routed.logits).double()
    softened = (q / 2).softmax(-1)
    kl = 4 * (softened * (softened.log() - (at / 2).log_softmax(-1))).sum(-1).mean()
    labels = batch["labels"][:, 1:]
    lm = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
    upcoming = batch["teacher_input_ids"][anchors.rows, anchors.teacher_positions + 1]
    ce = F.cross_entropy(routed.logits.double(), upcoming)
    reachable = projection().reachable
    p = at[:, reachable].softmax(-1)
    student_kl = (p * (p.log() - q[:, reachable].softmax(-1).log())).sum(-1).mean()
    own = teacher.head(teacher(batch, anchors).hidden_states)
    gap = projection().log_probs(own).double()
    gap = (gap.exp() * (gap - at.log_softmax(-1))).sum(-1).clamp(min=0).mean()
    truth = at.softmax(-1).gather(-1, batch["labels"][anchors.rows, anchors.student_positions + 1, None]).squeeze(-1)
    capacity = routed.capacity.double()
    bce = -(truth * capacity.log() + (1 - truth) * (1 - capacity).log()).mean()
    gate = routed.highest.gate_logits.double().softmax(-1)
    anchor_kl = (gate * (gate.log() - routed.router_logits.double().log_softmax(-1))).sum(-1).mean()
    for found, expected in (
        (result["router"]["capacity_bce"], bce),
        (result["router"]["anchor_kl"], anchor_kl),
        (result["losses"]["kl"], kl),
        (result["losses"]["lm"], lm),
        (result["router"]["ce"], ce),
        (result["router"]["student_kl"], student_kl),
        (result["metrics"]["gap"], gap),
    ):
        torch.testing.assert_close(found.detach().double(), expected, atol=1e-4, rtol=1e-4)


def test_the_gap_difference_is_the_mean_lead_of_the_teacher_on_the_true_tokens():
    teacher = tiny_teacher()
    model = distillation_model(teacher)
    batch = collated()
    metrics = run(model, teacher, batch)["metrics"]
    anchors = Anchors.of(batch)
    with torch.no_grad():
        routed = model.route_batch(batch, teacher, teacher(batch, anchors), scheduled())
        logits = model.student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["labels"][anchors.rows, anchors.student_positions + 1]
    logprobs = teacher.projection.log_probs(routed.logits)
    student = F.cross_entropy(logits[anchors.rows, anchors.student_positions], targets, reduction="none")
    lead = (student - F.nll_loss(logprobs, targets, reduction="none"))[anchors.same_next]
    assert float(metrics["gap_count"]) == len(lead) > 0
    torch.testing.assert_close(metrics["gap_difference"], lead.sum(), atol=1e-3, rtol=1e-4)


def test_one_tokenizer_on_both_sides_gives_the_ordinary_kl_at_every_position():
    same = VocabularyProjection.from_tokenizers(tokenizer("student"), tokenizer("student"), STUDENT_ROWS, STUDENT_ROWS)
    model = tiny_llama(seed=9, initializer_range=0.2)
    teacher = Teacher(model, same, use_router=False)
    batch = collated(sides=SAME)
    distillation = distillation_model(teacher, gap_weighting=False)
    result = run(distillation, teacher, batch, frozenset({"kl"}), values=scheduled(temperature=3.0))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        p, q = ((m(**inputs).logits[:, :-1] / 3).double().log_softmax(-1) for m in (model, distillation.student))
    predicted = batch["labels"][:, 1:] != IGNORE_INDEX
    expected = 9 * (p.exp() * (p - q)).sum(-1)[predicted].mean()
    assert int(predicted.sum()) == len(Anchors.of(batch))
    torch.testing.assert_close(result["losses"]["kl"].double(), expected, atol=1e-5, rtol=1e-5)


def spans_by_brute_force(model, batch, side, layer):
    """The mean attention of each anchor to each span before it, `[row][anchor]`, one span at a time in float64."""
    prefix = "teacher_" if side == "teacher" else ""
    inputs = {name: batch[prefix + name] for name in ("input_ids", "attention_mask")}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model(**inputs, output_attentions=True).attentions[layer]
    model.set_attn_implementation("sdpa")
    spans = []
    for row, present in enumerate(batch["anchor_mask"]):
        ends = batch[f"{side}_positions"][row, present].tolist()
        starts = [0, *(end + 1 for end in ends[:-1])]
        mean = attention[row].double().mean(dim=0)
        spans.append(
            [[mean[end, a : b + 1].sum() for a, b in zip(starts, ends, strict=True) if a <= end] for end in ends]
        )
    return spans


def attention_kl_by_brute_force(student, teacher, batch, layer):
    """Mean over the anchors of the KL between the spans of both models; a span beyond a window has the least mass."""
    ours, theirs = (
        spans_by_brute_force(model, batch, side, layer) for model, side in ((student, "student"), (teacher, "teacher"))
    )
    terms = []
    for row, anchor in Anchors.of(batch).mask.nonzero().tolist():
        s, t = (torch.stack(spans[row][anchor]).clamp(min=MASS_FLOOR) for spans in (ours, theirs))
        terms.append((t * (t.log() - s.log())).sum())
    return torch.stack(terms).mean()


def with_window(model, size):
    """The same weights in a model that sees only the last `size` tokens."""
    config = MistralConfig(**(model.config.to_diff_dict() | {"model_type": "mistral", "sliding_window": size}))
    windowed = MistralForCausalLM(config)
    windowed.load_state_dict(model.state_dict())
    return windowed


@pytest.mark.parametrize("windows", [(None, None), (3, None), (None, 3)])
@pytest.mark.parametrize("sides", [("student", "teacher"), ("teacher", "student")])
def test_the_attention_loss_is_the_kl_over_spans_of_text_that_two_tokenizers_cut(sides, windows):
    rows = {"student": STUDENT_ROWS, "teacher": TEACHER_ROWS}
    student = tiny_llama(initializer_range=0.2, vocab_size=rows[sides[0]])
    big = tiny_llama(seed=3, initializer_range=0.3, vocab_size=rows[sides[1]], num_key_value_heads=1)
    student, big = (
        model if size is None else with_window(model, size)
        for model, size in zip((student, big), windows, strict=True)
    )
    mapping = VocabularyProjection.from_tokenizers(
        tokenizer(sides[1]), tokenizer(sides[0]), rows[sides[1]], rows[sides[0]]
    )
    teacher = Teacher(big, mapping, use_router=False)
    batch = collated(sides=sides)
    assert not torch.equal(batch["student_positions"], batch["teacher_positions"])
    found = run(distillation_model(teacher, student), teacher, batch, frozenset({"attention"}))["losses"]["attention"]
    expected = attention_kl_by_brute_force(student, big, batch, layer=1)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-4)
    assert found > 0.01


def test_the_attention_loss_of_a_model_with_itself_is_zero():
    same = VocabularyProjection.from_tokenizers(tokenizer("student"), tokenizer("student"), STUDENT_ROWS, STUDENT_ROWS)
    model = tiny_llama(initializer_range=0.2)
    teacher = Teacher(copy.deepcopy(model), same, use_router=False)
    result = run(distillation_model(teacher, model), teacher, collated(sides=SAME), frozenset({"attention"}))
    assert result["losses"]["attention"] == 0


@pytest.mark.parametrize("name", ["feature", "attention"])
def test_a_loss_of_several_layers_is_the_mean_of_theirs(name):
    teacher, batch, alone = tiny_teacher(), collated(), []
    model = distillation_model(teacher, layers=[0, 2])
    found = run(model, teacher, batch, frozenset({name}))["losses"][name].detach()
    pairs, projections = getattr(model.pairs, name), model.feature_projections
    for pair, projection_of_it in zip(pairs, projections, strict=True):
        model.pairs = replace(model.pairs, **{name: (pair,)})
        model.feature_projections = torch.nn.ModuleList([projection_of_it])
        alone.append(run(model, teacher, batch, frozenset({name}))["losses"][name].detach())
    assert len(alone) == 2 and alone[0] != pytest.approx(float(alone[1]), rel=0.01)
    torch.testing.assert_close(found, torch.stack(alone).mean())


@pytest.mark.parametrize("use_router", [True, False])
def test_padding_on_either_side_gives_the_same_losses(use_router):
    teacher = tiny_teacher() if use_router else Teacher(tiny_moe(), projection(), use_router=False)
    model = distillation_model(teacher)
    left, right = (run(model, teacher, collated(5, padding_side=side)) for side in ("left", "right"))
    assert collated(5, padding_side="left")["attention_mask"][:, 0].eq(0).any()
    for name, value in values_of(right).items():
        torch.testing.assert_close(values_of(left)[name], value, atol=1e-4, rtol=1e-4)
    for name, value in right["metrics"].items():
        torch.testing.assert_close(left["metrics"][name], value, atol=1e-3, rtol=1e-4)


def with_empty_rows(batch, real_tokens):
    """The batch with one more row that has this many real tokens and no anchors."""
    result = {}
    for name, value in batch.items():
        row = torch.zeros_like(value[:1])
        if name == "labels":
            row.fill_(IGNORE_INDEX)
        if name.endswith("attention_mask"):
            row[:, :real_tokens] = 1
        result[name] = torch.cat([value, row])
    return result


@pytest.mark.parametrize("real_tokens", [0, 1])
def test_rows_without_anything_to_learn_do_no_harm(real_tokens):
    teacher = tiny_teacher()
    model = distillation_model(teacher)
    gradients = []
    for batch in (collated(), with_empty_rows(collated(), real_tokens)):
        model.zero_grad()
        result = run(model, teacher, batch)
        weighed(result).backward()
        gradients.append((values_of(result), {n: p.grad.clone() for n, p in model.named_parameters()}))
    for plain, other in zip(*gradients, strict=True):
        for name, value in plain.items():
            torch.testing.assert_close(other[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("real_tokens", [0, 1])
def test_a_batch_without_anything_to_learn_gives_zero_and_still_backpropagates(real_tokens):
    teacher = tiny_teacher()
    model = distillation_model(teacher)
    batch = {name: value[-1:] for name, value in with_empty_rows(collated(), real_tokens).items()}
    result = run(model, teacher, batch)
    weighed(result).backward()
    assert all(value == 0 for value in values_of(result).values())
    assert all(value.isfinite() for value in result["metrics"].values())
    assert all(p.grad is None or p.grad.eq(0).all() for p in model.parameters())


def part_of(batch, rows, **counts):
    return {name: value[rows] for name, value in batch.items()} | counts


def test_micro_batches_add_up_to_the_whole_batch_in_losses_and_gradients():
    teacher = tiny_teacher()
    model = distillation_model(teacher, gap_weighting=False)
    batch = collated(6)
    items, anchors = int((batch["labels"] != IGNORE_INDEX).sum()), len(Anchors.of(batch))

    def step(parts):
        model.zero_grad()
        totals = {}
        for rows in parts:
            counts = {"num_items_in_batch": items, "num_anchors_in_batch": anchors}
            result = run(model, teacher, part_of(batch, rows, **counts))
            terms = {n: v for n, v in (result["losses"] | result["router"]).items() if n not in BATCH_LEVEL}
            (result["logit_loss"] + sum(value for value in terms.values() if value.requires_grad)).backward()
            totals = {name: totals.get(name, 0) + float(value.detach()) for name, value in terms.items()}
        return totals, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    whole, gradients = step([slice(0, 6)])
    for parts in ([slice(0, 2), slice(2, 6)], [slice(i, i + 1) for i in range(6)]):
        totals, split = step(parts)
        assert totals == pytest.approx(whole, rel=1e-4, abs=1e-6)
        for name, value in gradients.items():
            torch.testing.assert_close(split[name], value, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("compared", [MAX_ANCHORS, 7])
def test_batch_level_terms_count_by_their_micro_batchs_share_of_the_anchors(monkeypatch, compared):
    monkeypatch.setattr("distill_trainer.modeling.anchors_per_rank", lambda: compared)
    teacher = tiny_teacher()
    model = distillation_model(teacher)
    batch = collated()
    whole = values_of(run(model, teacher, batch))
    share = values_of(run(model, teacher, batch, num_anchors_in_batch=4 * len(Anchors.of(batch))))
    for name in BATCH_LEVEL:
        assert float(share[name]) == pytest.approx(float(whole[name]) / 4, rel=1e-5)


def test_gap_weighting_weighs_the_kl_and_nothing_else():
    teacher = tiny_teacher()
    with_weights, without = (
        distillation_model(teacher, tiny_llama(initializer_range=0.2), gap_weighting=on) for on in (True, False)
    )
    first, second = (values_of(run(model, teacher, collated())) for model in (with_weights, without))
    assert float(first["kl"]) != pytest.approx(float(second["kl"]), rel=1e-5)
    assert all(torch.equal(first[name], second[name]) for name in first if name != "kl")


@pytest.mark.parametrize("direction", ["forward", "reverse", "js"])
def test_the_direction_of_the_kl_is_passed_on(direction):
    teacher = tiny_teacher()
    values = values_of(run(distillation_model(teacher, kl_direction=direction), teacher, collated()))
    others = values_of(run(distillation_model(teacher), teacher, collated()))
    assert (float(values["kl"]) == pytest.approx(float(others["kl"]))) is (direction == "forward")


def test_more_unlocked_layers_change_the_layerwise_loss():
    teacher = tiny_teacher()
    model = distillation_model(teacher)
    first, all_of_them = (
        run(model, teacher, collated(), values=scheduled(unlocked_fraction=fraction)) for fraction in (0.0, 1.0)
    )
    first["losses"]["layerwise"].backward()
    assert model.layerwise_projections[1].weight.grad is None
    assert first["losses"]["layerwise"] != all_of_them["losses"]["layerwise"]


@pytest.mark.parametrize("use_router", [True, False])
def test_the_last_layers_states_are_the_rerouted_ones(use_router):
    teacher = tiny_teacher() if use_router else Teacher(tiny_moe(), projection(), use_router=False)
    model = distillation_model(teacher)
    batch = collated()
    output = teacher(batch, Anchors.of(batch))
    routed = model.route_batch(batch, teacher, output, scheduled(top_k=1))
    assert torch.equal(routed.residual, output.residual) is not use_router
    assert (routed.router is None) is not use_router
    assert teacher.projection.log_probs(routed.logits).exp().sum(-1).detach().sub(1).abs().max() < 1e-4


def test_rows_without_teacher_give_each_rows_summed_cross_entropy():
    batch = collated()
    model = distillation_model(tiny_teacher())
    rows = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")})["row_nats"]
    for row in range(4):
        real = batch["attention_mask"][row].bool()
        ids = batch["input_ids"][row, real][None]
        logits = model.student(input_ids=ids).logits[0, :-1]
        torch.testing.assert_close(
            rows[row], F.cross_entropy(logits, ids[0, 1:], reduction="sum"), atol=1e-4, rtol=1e-5
        )


def test_recomputed_activations_change_nothing():
    teacher = tiny_teacher()
    gradients = []
    for checkpointing in (False, True):
        model = distillation_model(teacher).train()
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.student.is_activation_checkpointing
        result = run(model, teacher, collated())
        sum(result["losses"].values()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_and_half_precision_teachers_stay_near_float32(dtype):
    teacher = tiny_teacher()
    model = distillation_model(teacher, gap_weighting=False)
    expected = values_of(run(model, teacher, collated()))
    low = Teacher(tiny_moe().to(dtype), projection())
    batch = collated()
    output = low(batch, Anchors.of(batch), **model.tapped_layers(weights_of(ALL), side=1))
    with torch.autocast("cpu", torch.bfloat16):
        found = model(**batch, weights=weights_of(ALL), teacher=low, teacher_output=output, values=scheduled())
    for name, value in values_of(found).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name], atol=0.1, rtol=0.1)


def test_the_extra_state_is_all_but_the_students():
    model = distillation_model(tiny_teacher())
    extras = model.extra_state_dict()
    assert {name.split(".")[0] for name in extras} == {
        "routing",
        "gap",
        "feature_projections",
        "layerwise_projections",
        "contrastive_projections",
    }
    assert len(extras) + len(model.student.state_dict()) == len(model.state_dict())


def test_the_teacher_is_no_part_of_the_module():
    teacher = tiny_teacher()
    model = distillation_model(teacher)
    run(model, teacher, collated())
    weights = {id(p) for p in teacher.model.parameters()}
    assert not weights & {id(p) for p in model.parameters()}
    before = copy.deepcopy(teacher.model.state_dict())
    model.to(torch.bfloat16)
    assert all(torch.equal(before[name], value) for name, value in teacher.model.state_dict().items())


def test_entropy_and_capacity_are_reported_in_their_ranges():
    teacher = tiny_teacher()
    metrics = run(distillation_model(teacher), teacher, collated())["metrics"]
    assert 0 < metrics["capacity"] < 1 and 0 <= metrics["changed_fraction"] <= 1
    assert 0 < metrics["router_entropy"] <= math.log(4) + 1e-5
