import copy

import pytest
import torch
from builders import (
    FAMILIES,
    collated,
    every_position,
    projection,
    random_ids,
    tiny_llama,
    tiny_moe,
    tiny_teacher,
)
from test_moe import tiny_jetmoe

from distill_trainer.anchors import IGNORE_INDEX, Anchors
from distill_trainer.errors import UnsupportedModelError
from distill_trainer.teacher import Teacher

every_family = pytest.mark.parametrize("family", FAMILIES)
# Families whose gates give weights that sum to 1.
RENORMALISED = ("qwen3_moe", "mixtral")


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
    residual, hidden_states = teacher.reroute(output, selected_experts, routing_weights)
    return residual, teacher.head(hidden_states)


def own_choice(output):
    """The gate's own choice, with weights that sum to 1 as the router's do."""
    weights = output.experts.routing_weights
    return output.experts.selected_experts, weights / weights.sum(dim=-1, keepdim=True)


@every_family
def test_the_gates_own_choice_gives_the_untouched_teacher(family):
    teacher = tiny_teacher(family)
    output, expected = everywhere(teacher)
    assert torch.equal(teacher.head(output.hidden_states), expected)
    if family in RENORMALISED:
        residual, logits = rerouted(teacher, output, output.experts.selected_experts, output.experts.routing_weights)
        assert torch.equal(residual, output.residual) and torch.equal(logits, expected)
    residual, logits = rerouted(teacher, output, *own_choice(output))
    torch.testing.assert_close(residual, output.residual, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("family", RENORMALISED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gates_own_choice_gives_the_untouched_teacher_in_half_precision(family, dtype):
    teacher = Teacher(tiny_moe(family).to(dtype), projection())
    output, expected = everywhere(teacher)
    residual, logits = rerouted(
        teacher, output, output.experts.selected_experts, output.experts.routing_weights.float()
    )
    assert torch.equal(residual, output.residual) and torch.equal(logits, expected)


@every_family
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_rerouting_equals_a_model_whose_last_gate_chose_so(family, top_k):
    teacher = tiny_teacher(family)
    output, _ = everywhere(teacher)
    generator = torch.Generator().manual_seed(top_k)
    raw, chosen = torch.rand(len(output.anchors), 4, generator=generator).topk(top_k)
    weights = raw / raw.sum(dim=-1, keepdim=True)
    scale = output.experts.routing_weights.sum(dim=-1, keepdim=True)
    hook = teacher.block.experts.register_forward_pre_hook(lambda module, inputs: (inputs[0], chosen, weights * scale))
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


@every_family
def test_a_sound_teacher_passes_its_check(family):
    tiny_teacher(family).verify()
    Teacher(tiny_moe(family).bfloat16(), projection()).verify()


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
    # A norm behind the block: the mixture cannot be put in the place of the experts' output.
    teacher.block.register_forward_hook(lambda module, inputs, output: output / output.norm())
    with pytest.raises(UnsupportedModelError, match="re-routing of the teacher Qwen3MoeForCausalLM"):
        teacher.verify()


def test_logits_that_overflow_name_the_setting_to_change():
    model = tiny_moe().half()
    with torch.no_grad():
        model.lm_head.weight.mul_(6e4)
    with pytest.raises(UnsupportedModelError, match="overflow in torch.float16. Set teacher_dtype"):
        Teacher(model, projection()).verify()


def test_experts_that_cannot_be_found_are_an_error_only_with_the_router():
    model = tiny_jetmoe()
    with pytest.raises(UnsupportedModelError, match="cannot be found") as error:
        Teacher(model, projection())
    assert "\n" not in str(error.value)
    assert Teacher(model, projection(), use_router=False).num_experts == 0


def test_a_last_layer_without_experts_is_an_error():
    model = tiny_moe(mlp_only_layers=[2])
    with pytest.raises(UnsupportedModelError, match="last layer of the teacher Qwen3MoeForCausalLM has no experts"):
        Teacher(model, projection())


def test_a_dense_teacher_works_without_a_router():
    teacher = Teacher(tiny_llama(vocab_size=4100), projection())
    output, expected = everywhere(teacher)
    assert teacher.num_experts == 0 and output.experts is None
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
