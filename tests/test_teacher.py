import contextlib
import copy
import functools

import pytest
import torch
from builders import (
    FAMILIES,
    SHAPE,
    collated,
    every_position,
    projection,
    random_ids,
    tiny_llama,
    tiny_moe,
    tiny_teacher,
)
from test_moe import tiny_jetmoe
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM, PhimoeConfig, PhimoeForCausalLM

from distill_trainer.anchors import IGNORE_INDEX, Anchors
from distill_trainer.errors import UnsupportedModelError
from distill_trainer.mixing import reroute_experts
from distill_trainer.router import StudentAwareRouter, sample_experts, select_experts
from distill_trainer.teacher import Teacher

ANCHOR_FIELDS = ("rows", "student_positions", "teacher_positions", "same_next")
every_family = pytest.mark.parametrize("family", FAMILIES)


def everywhere(teacher):
    """What a teacher says at every position, and the logits and last residual of the untouched model."""
    input_ids = random_ids()
    batch, anchors = every_position(input_ids)
    output = teacher(batch, anchors)
    with torch.no_grad():
        logits = teacher.model(input_ids=input_ids, use_cache=False).logits.flatten(0, 1)
    return output, logits


def rerouted(teacher, output, selected_experts, routing_weights):
    """Residual and logits of the re-routed teacher."""
    result = teacher.reroute(output, lambda layer, own: (selected_experts, routing_weights))
    return result.residual, teacher.head(result.hidden_states)


def last_call(output):
    """What the last layer's experts did."""
    return output.experts[output.last_layer]


def own_choice(output):
    """The gate's own choice, with weights that sum to 1 as the router's do."""
    weights = last_call(output).routing_weights
    return last_call(output).selected_experts, weights / weights.sum(dim=-1, keepdim=True)


def gates_choice(layer, own):
    """What a router chooses that has learned nothing yet, with the gate's own number of experts."""
    weights, chosen = select_experts(own.gate_logits, own.selected_experts.shape[-1], 1.0)
    return chosen, weights


@every_family
@pytest.mark.parametrize("router_layers", ["last", "last:2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_untrained_router_gives_the_untouched_teacher_bit_for_bit(family, router_layers, dtype):
    teacher = Teacher(tiny_moe(family).to(dtype), projection(), router_layers=router_layers)
    output, expected = everywhere(teacher)
    assert torch.equal(teacher.head(output.hidden_states), expected)
    with torch.no_grad():
        rerouted_teacher = teacher.reroute(output, gates_choice)
    assert torch.equal(rerouted_teacher.residual, output.residual)
    assert torch.equal(teacher.head(rerouted_teacher.hidden_states), expected)


@every_family
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_rerouting_equals_a_model_whose_last_gate_chose_so(family, top_k):
    teacher = tiny_teacher(family)
    output, _ = everywhere(teacher)
    generator = torch.Generator().manual_seed(top_k)
    raw, chosen = torch.rand(len(output.anchors), 4, generator=generator).topk(top_k)
    weights = raw / raw.sum(dim=-1, keepdim=True)
    scale = last_call(output).routing_weights.sum(dim=-1, keepdim=True)
    hook = teacher.blocks[teacher.last_layer].experts.register_forward_pre_hook(
        lambda module, inputs: (inputs[0], chosen, weights * scale)
    )
    with torch.no_grad():
        expected = teacher.model(input_ids=random_ids(), use_cache=False).logits.flatten(0, 1)
    hook.remove()
    torch.testing.assert_close(rerouted(teacher, output, chosen, weights)[1], expected, atol=1e-4, rtol=1e-4)


@every_family
def test_gradients_reach_the_routing_weights_and_not_the_teacher(family):
    teacher = tiny_teacher(family)
    output, _ = everywhere(teacher)
    chosen, weights = own_choice(output)
    weights = weights.clone().requires_grad_()
    residual, logits = rerouted(teacher, output, chosen, weights)
    (residual.square().sum() + logits.log_softmax(-1)[:, 7].sum()).backward()
    assert weights.grad.ne(0).all()
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())
    assert not output.hidden_states.requires_grad and not teacher.model.training


def other_experts(layer, own):
    """Some choice of three experts that depends on the layer and on what is asked there."""
    scores = own.hidden_states.detach()[:, :4].float() + layer
    weights, chosen = scores.sin().softmax(-1).topk(3)
    return chosen, weights / weights.sum(dim=-1, keepdim=True)


@every_family
@pytest.mark.parametrize("router_layers", ["last", "last:2"])
def test_rerouted_layers_equal_a_model_whose_gates_chose_so(family, router_layers):
    teacher = Teacher(tiny_moe(family), projection(), router_layers=router_layers)
    batch = collated(4)
    output = teacher(batch, Anchors.of(batch), layers=(1,))
    with contextlib.ExitStack() as stack:
        for layer in teacher.routed.depth:
            choose = functools.partial(other_experts, layer)
            stack.enter_context(reroute_experts(teacher.blocks[layer], output.tokens, choose))
        whole = teacher.model(
            input_ids=batch["teacher_input_ids"],
            attention_mask=batch["teacher_attention_mask"],
            use_cache=False,
            output_hidden_states=True,
        )
    found = teacher.reroute(output, other_experts)
    at = (output.anchors.rows, output.anchors.teacher_positions)
    torch.testing.assert_close(teacher.head(found.hidden_states), whole.logits[at], atol=1e-4, rtol=1e-4)
    if router_layers == "last:2":
        torch.testing.assert_close(found.layers[1], whole.hidden_states[2][at], atol=1e-4, rtol=1e-4)
    else:
        assert found.layers == {}


def test_tokens_that_are_no_anchors_keep_their_gates_choice():
    model = tiny_moe()
    teacher = Teacher(model, projection(), router_layers="all")
    batch, anchors = every_position(random_ids())
    # Of each row only one token is an anchor, and it is the last: nothing before it may change, and it must.
    last = anchors.teacher_positions == anchors.teacher_positions.max()
    few = Anchors(anchors.mask, *(getattr(anchors, name)[last] for name in ANCHOR_FIELDS))
    output = teacher(batch, few)
    watched = []
    hook = model.model.layers[-1].register_forward_hook(lambda module, inputs, result: watched.append(result))
    with torch.no_grad():
        model(input_ids=random_ids(), use_cache=False)
        teacher.reroute(output, other_experts)
    hook.remove()
    plain, changed = (result[0] if isinstance(result, tuple) else result for result in watched)
    torch.testing.assert_close(plain[:, :-1], changed[:, :-1], atol=1e-5, rtol=1e-5)
    assert (plain[:, -1] - changed[:, -1]).abs().amax(dim=-1).min() > 0.1


@every_family
def test_gradients_reach_the_weights_of_every_rerouted_layer(family):
    teacher = Teacher(tiny_moe(family), projection(), router_layers="last:2")
    output, _ = everywhere(teacher)
    weights = {}

    def choose(layer, own):
        chosen, start = gates_choice(layer, own)
        weights[layer] = start.detach().clone().requires_grad_()
        return chosen, weights[layer]

    result = teacher.reroute(output, choose)
    teacher.head(result.hidden_states).log_softmax(-1)[:, 7].sum().backward()
    assert set(weights) == {1, 2} and all(weight.grad.ne(0).any() for weight in weights.values())
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "gpt_oss"])
@pytest.mark.parametrize("top_k", [2, 3])
def test_the_gradient_of_a_lower_layer_is_the_finite_difference(family, top_k):
    """Through the experts and through the gate of the layer above, whose router has learned nothing yet."""
    teacher = Teacher(tiny_moe(family), projection(), router_layers="last:2")
    batch, anchors = every_position(random_ids(length=5))
    output = teacher(batch, anchors)
    width = teacher.model.config.hidden_size
    router = StudentAwareRouter(teacher.gate_rows()[2], width)
    nothing = torch.zeros(len(anchors), width)

    def belief(shift):
        def choose(layer, own):
            if layer == 2:
                gap = entropy = nothing[:, 0]
                result = router(own.hidden_states, nothing, entropy, gap, own.gate_logits, top_k, 1.0)
                return result.selected_experts, result.routing_weights
            probabilities = torch.softmax(own.router_logits.float() + shift * torch.arange(4.0), dim=-1)
            return torch.arange(4).expand_as(probabilities), probabilities

        hidden_states = teacher.reroute(output, choose).hidden_states
        return teacher.head(hidden_states).log_softmax(-1)[:, 7].mean()

    shift = torch.zeros((), requires_grad=True)
    belief(shift).backward()
    step = 1e-2
    with torch.no_grad():
        expected = (belief(torch.tensor(step)) - belief(torch.tensor(-step))) / (2 * step)
    assert abs(expected) > 0.01
    torch.testing.assert_close(shift.grad, expected, rtol=2e-2, atol=1e-3)


def test_checkpointing_gives_the_same_gradients():
    gradients, runs = [], []
    for checkpointing in (False, True):
        teacher = Teacher(tiny_moe(), projection(), router_layers="all", checkpointing=checkpointing)
        output, _ = everywhere(teacher)
        scale = torch.ones(3, requires_grad=True)

        runs.append(0)

        def choose(layer, own, scale=scale):
            runs[-1] += 1
            chosen, weights = other_experts(layer, own)
            return chosen, weights * scale[layer]

        teacher.head(teacher.reroute(output, choose).hidden_states).log_softmax(-1)[:, 7].sum().backward()
        gradients.append(scale.grad)
    # In the backward pass the layers run, and choose, once more.
    assert runs == [3, 6] and gradients[0].ne(0).all()
    torch.testing.assert_close(*gradients)


def test_a_layer_that_is_only_a_target_changes_nothing_above_it():
    teacher = Teacher(tiny_moe(), projection(), router_layers=["1"])
    output, _ = everywhere(teacher)
    assert teacher.routed.targets == (1,) and set(output.experts) == {2}
    batch, anchors = every_position(random_ids())
    output = teacher(batch, anchors, layers=(1,))
    result = teacher.reroute(output, other_experts)
    alone = tiny_teacher()
    expected = alone.reroute(alone(batch, anchors), other_experts)
    assert torch.equal(result.hidden_states, expected.hidden_states)
    deep = Teacher(tiny_moe(), projection(), router_layers="last:2")
    torch.testing.assert_close(result.layers[1], deep.reroute(deep(batch, anchors), other_experts).layers[1])


@every_family
def test_several_choices_at_an_anchor_are_each_what_the_teacher_says_then(family):
    teacher = tiny_teacher(family)
    output, _ = everywhere(teacher)
    torch.manual_seed(0)
    weights, chosen = sample_experts(last_call(output).gate_logits, 2, 1.0, 3)
    several = teacher.reroute(output, lambda layer, own: (chosen, weights))
    for sample in range(3):
        one = teacher.reroute(output, lambda layer, own, i=sample: (chosen[:, i], weights[:, i]))
        torch.testing.assert_close(several.hidden_states[:, sample], one.hidden_states, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(several.residual[:, sample], one.residual, atol=1e-5, rtol=1e-5)


def test_a_mixture_whose_last_layer_is_dense_is_routed_in_its_last_layer_with_experts():
    teacher = Teacher(tiny_moe(mlp_only_layers=[2]), projection())
    teacher.verify()
    assert teacher.routed.depth == (1,) and teacher.num_experts == 4
    output, expected = everywhere(teacher)
    with torch.no_grad():
        assert torch.equal(teacher.head(teacher.reroute(output, gates_choice).hidden_states), expected)


@every_family
@pytest.mark.parametrize("router_layers", ["last", "last:2"])
def test_a_sound_teacher_passes_its_check(family, router_layers):
    Teacher(tiny_moe(family), projection(), router_layers=router_layers).verify()
    Teacher(tiny_moe(family).bfloat16(), projection(), router_layers=router_layers).verify()


def test_a_dense_teacher_passes_its_check():
    Teacher(tiny_llama(vocab_size=4100), projection()).verify()


def test_a_head_that_does_more_than_known_is_an_error():
    teacher = Teacher(tiny_llama(vocab_size=4100), projection())
    forward = teacher.model.forward

    def louder(**inputs):
        outputs = forward(**inputs)
        outputs.logits = outputs.logits * 2
        return outputs

    teacher.model.forward = louder
    with pytest.raises(UnsupportedModelError, match="head of the teacher LlamaForCausalLM"):
        teacher.verify()


def test_experts_that_are_not_simply_added_are_an_error():
    teacher = tiny_teacher()

    def norm(module, inputs, output):
        return output / output.norm(dim=-1, keepdim=True)

    # A norm behind the block: the mixture cannot be put in the place of the experts' output.
    teacher.blocks[teacher.last_layer].register_forward_hook(norm)
    with pytest.raises(UnsupportedModelError, match="re-routing .* Set router_layers to last:2 or all"):
        teacher.verify()
    # Where the layers run again, the norm runs as well.
    Teacher(teacher.model, teacher.projection, router_layers="last:2").verify()


def test_logits_that_overflow_name_the_setting_to_change():
    model = tiny_moe().half()
    with torch.no_grad():
        model.lm_head.weight.mul_(6e4)
    with pytest.raises(UnsupportedModelError, match="overflow in torch.float16. Set teacher_dtype"):
        Teacher(model, projection()).verify()


def test_a_gate_that_its_scores_do_not_explain_is_refused():
    """Phimoe's weighs each expert by a softmax over some of the scores: the router would not start from it."""
    config = PhimoeConfig(**SHAPE, intermediate_size=32, num_local_experts=4)
    torch.manual_seed(0)
    model = PhimoeForCausalLM(config)
    for layers in ("last", "all"):
        with pytest.raises(UnsupportedModelError, match="The gate of the teacher PhimoeForCausalLM .* use_router to"):
            Teacher(model, projection(), router_layers=layers).verify()
    Teacher(model, projection(), use_router=False).verify()


def test_a_bias_beside_the_gates_weight_is_no_second_weight():
    sizes = {"intermediate_size": 64, "moe_intermediate_size": 32, "moe_num_experts": 4, "moe_k": 2, "head_dim": 16}
    torch.manual_seed(0)
    model = Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**SHAPE, **sizes, moe_layer_start_index=0))
    for layers in ("last", "all"):
        teacher = Teacher(model, projection(), router_layers=layers)
        teacher.verify()
        assert all(rows.shape == (4, SHAPE["hidden_size"]) for rows in teacher.gate_rows().values())


def test_experts_that_cannot_be_found_are_an_error_only_with_the_router():
    model = tiny_jetmoe()
    with pytest.raises(UnsupportedModelError, match="cannot be found") as error:
        Teacher(model, projection())
    assert "\n" not in str(error.value)
    assert Teacher(model, projection(), use_router=False).num_experts == 0


def test_a_dense_teacher_works_without_a_router():
    teacher = Teacher(tiny_llama(vocab_size=4100), projection())
    output, expected = everywhere(teacher)
    assert teacher.num_experts == 0 and output.experts == {}
    assert torch.equal(teacher.head(output.hidden_states), expected)


def test_a_mixture_without_the_router_keeps_its_own_gate():
    teacher = Teacher(tiny_moe(), projection(), use_router=False)
    output, expected = everywhere(teacher)
    assert teacher.num_experts == 0 and torch.equal(teacher.head(output.hidden_states), expected)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_padded_batch_reads_as_its_rows_alone(padding_side):
    teacher = tiny_teacher()
    batch = collated(4, padding_side=padding_side)
    output = teacher(batch, Anchors.of(batch), layers=(0,), attention_layers=(1,))
    for row in range(4):
        real = batch["teacher_attention_mask"][row].bool()
        with torch.no_grad():
            alone = teacher.model(
                input_ids=batch["teacher_input_ids"][row, real][None], use_cache=False, output_hidden_states=True
            )
        own = output.anchors.rows == row
        shift = int(real.int().argmax())
        positions = output.anchors.teacher_positions[own] - shift
        torch.testing.assert_close(
            teacher.head(output.hidden_states)[own], alone.logits[0, positions], atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(output.layers[0][own], alone.hidden_states[1][0, positions], atol=1e-4, rtol=1e-4)


def test_attention_at_anchors_is_a_distribution_over_the_spans_before():
    teacher = tiny_teacher()
    batch = collated(4)
    spans = teacher(batch, Anchors.of(batch), attention_layers=(2,)).attentions[2]
    present = batch["anchor_mask"]
    assert spans.shape == (4, 1, present.shape[1], present.shape[1])
    real = spans.transpose(1, 2)[present]
    torch.testing.assert_close(real.sum(dim=-1), torch.ones(real.shape[:-1]))
    assert spans.triu(1).eq(0).transpose(1, 2)[present].all()


def test_anchors_have_a_next_token_and_hold_the_batch_in_row_order():
    batch = collated(4)
    anchors = Anchors.of(batch)
    expected = [
        (row, int(student), int(teacher))
        for row in range(4)
        for student, teacher, present in zip(
            batch["student_positions"][row], batch["teacher_positions"][row], batch["anchor_mask"][row], strict=True
        )
        if present and student + 1 < batch["attention_mask"][row].sum()
    ]
    found = zip(
        *(x.tolist() for x in (anchors.rows, anchors.student_positions, anchors.teacher_positions)), strict=True
    )
    assert list(found) == expected and len(anchors) == len(expected) == int(anchors.mask.sum())
    # The last token of each text has nothing to predict.
    assert len(anchors) < int(batch["anchor_mask"].sum())


def test_same_next_marks_the_anchors_after_which_both_sides_have_one_token():
    batch = {
        "labels": torch.tensor([[IGNORE_INDEX, 1, 2, 3, 4, 5]]),
        "student_positions": torch.tensor([[0, 1, 2, 4, 5, 0]]),
        "teacher_positions": torch.tensor([[1, 2, 4, 5, 6, 0]]),
        "anchor_mask": torch.tensor([[True] * 5 + [False]]),
    }
    anchors = Anchors.of(batch)
    assert anchors.student_positions.tolist() == [0, 1, 2, 4]
    assert anchors.same_next.tolist() == [True, False, False, True]


def test_a_copy_of_the_teacher_shares_no_weights_with_a_module():
    teacher = tiny_teacher()
    holder = torch.nn.Linear(1, 1)
    holder.teacher = teacher
    assert len(list(holder.parameters())) == 2 and "teacher" not in copy.copy(holder).state_dict()
