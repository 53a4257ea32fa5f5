import pytest
import torch
from builders import FAMILIES, random_ids, tiny_llama, tiny_moe
from transformers import JetMoeConfig, JetMoeForCausalLM

from distill_trainer.errors import UnsupportedModelError
from distill_trainer.mixing import mix_experts
from distill_trainer.moe import (
    ExpertCall,
    expert_blocks,
    expert_layers,
    gate_of,
    gate_rows,
    is_mixture,
    record_experts,
)
from distill_trainer.router import select_experts

every_family = pytest.mark.parametrize("family", FAMILIES)


def tiny_jetmoe():
    config = JetMoeConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_key_value_heads=2,
        kv_channels=8,
        intermediate_size=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=32,
    )
    return JetMoeForCausalLM(config)


def recorded(model, block, input_ids):
    """What the experts of a block did, and what the block itself returned."""
    outputs = []
    hook = block.experts.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad(), record_experts(block) as calls:
        model(input_ids=input_ids, use_cache=False)
    hook.remove()
    return calls[0], outputs[0]


@every_family
def test_every_layer_of_a_mixture_has_a_block(family):
    model = tiny_moe(family)
    blocks = expert_blocks(model)
    # Those of DeepSeek start with dense layers.
    layers = [1, 2] if family.startswith("deepseek") else [0, 1, 2]
    assert list(expert_layers(model)) == layers and list(expert_layers(model).values()) == blocks
    assert all(block.experts.num_experts == 4 for block in blocks)


@every_family
def test_the_gates_own_choice_repeats_the_experts_bit_for_bit(family):
    model = tiny_moe(family)
    for block in expert_blocks(model):
        call, output = recorded(model, block, random_ids())
        mixture = mix_experts(block, call.hidden_states, call.selected_experts, call.routing_weights)
        assert torch.equal(mixture, output) and torch.equal(call.output, output)


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_experts_are_repeated_bit_for_bit_under_autocast_too(family, dtype):
    model = tiny_moe(family).to(dtype)
    block = expert_blocks(model)[-1]
    call, output = recorded(model, block, random_ids())
    with torch.autocast("cpu", torch.bfloat16):
        mixture = mix_experts(block, call.hidden_states, call.selected_experts, call.routing_weights)
    assert mixture.dtype == dtype and torch.equal(mixture, output)


@every_family
def test_recording_leaves_no_trace(family):
    model = tiny_moe(family)
    before = model(input_ids=random_ids()).logits
    block = expert_blocks(model)[-1]
    with record_experts(block):
        during = model(input_ids=random_ids()).logits
    assert torch.equal(before, during)
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_are_gone_after_an_error():
    model = tiny_moe()
    with pytest.raises(KeyError), record_experts(expert_blocks(model)[-1]):
        raise KeyError
    assert not any(module._forward_hooks for module in model.modules())


@every_family
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_any_number_of_experts_mixes_as_the_weighted_sum_of_single_experts(family, top_k):
    model = tiny_moe(family).requires_grad_(False)
    block = expert_blocks(model)[-1]
    call, _ = recorded(model, block, random_ids())
    tokens = len(call.hidden_states)
    generator = torch.Generator().manual_seed(top_k)
    weights = torch.rand(tokens, top_k, generator=generator)
    chosen = torch.rand(tokens, 4, generator=generator).topk(top_k).indices
    single = torch.stack(
        [mix_experts(block, call.hidden_states, torch.full((tokens, 1), e), torch.ones(tokens, 1)) for e in range(4)]
    )
    expected = sum(
        weights[:, k, None].double() * single[chosen[:, k], torch.arange(tokens)].double() for k in range(top_k)
    )
    mixture = mix_experts(block, call.hidden_states, chosen, weights)
    torch.testing.assert_close(mixture.double(), expected, atol=1e-5, rtol=1e-5)


@every_family
def test_gradients_reach_the_routing_weights_and_not_the_experts(family):
    model = tiny_moe(family).requires_grad_(False)
    block = expert_blocks(model)[-1]
    call, _ = recorded(model, block, random_ids())
    weights = call.routing_weights.float().requires_grad_()
    mix_experts(block, call.hidden_states, call.selected_experts, weights).square().sum().backward()
    assert weights.grad.ne(0).all()
    assert all(parameter.grad is None for parameter in model.parameters())


@every_family
def test_gate_rows_are_the_weights_behind_the_recorded_scores(family):
    model = tiny_moe(family)
    block = expert_blocks(model)[-1]
    call, _ = recorded(model, block, random_ids())
    assert gate_rows(block).shape == (4, 48) and not gate_rows(block).requires_grad
    bias = getattr(gate_of(block), "bias", None)
    expected = torch.nn.functional.linear(call.hidden_states, gate_rows(block), bias)
    torch.testing.assert_close(call.router_logits, expected, atol=1e-5, rtol=1e-5)


@every_family
def test_gate_logits_give_the_gates_choice_and_the_ratios_of_its_weights(family):
    model = tiny_moe(family)
    block = expert_blocks(model)[-1]
    call, _ = recorded(model, block, random_ids())
    weights, chosen = select_experts(call.gate_logits, call.selected_experts.shape[-1], 1.0)
    none = torch.zeros(len(chosen), 4)
    own = call.routing_weights / call.routing_weights.sum(dim=-1, keepdim=True)
    found, expected = none.scatter(-1, chosen, weights), none.scatter(-1, call.selected_experts, own)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    if family != "deepseek_v3":
        assert torch.equal(call.gate_logits, call.router_logits)
    else:
        # Groups and the bias bar experts that their sigmoids alone would have chosen.
        assert not torch.equal(call.router_logits.topk(2).indices.sort().values, chosen.sort().values)


def test_gate_logits_keep_the_order_of_the_experts_that_were_not_chosen():
    scores = torch.tensor([[3.0, 1.0, 2.0, -1.0, 0.5]])
    call = ExpertCall(torch.zeros(1, 2), scores, torch.tensor([[2, 1]]), torch.tensor([[0.7311, 0.2689]]))
    order = call.gate_logits.argsort(descending=True)[0].tolist()
    assert order[:3] == [2, 1, 0] and order[3:] == [4, 3]
    assert call.gate_logits[0, [2, 1, 4, 3]].tolist() == scores[0, [2, 1, 4, 3]].tolist()


def test_a_recorded_call_can_be_read_at_some_tokens():
    model = tiny_moe()
    call, _ = recorded(model, expert_blocks(model)[-1], random_ids())
    tokens = torch.tensor([5, 2])
    part = call.at(tokens)
    for name in ("hidden_states", "router_logits", "selected_experts", "routing_weights", "output"):
        assert torch.equal(getattr(part, name), getattr(call, name)[tokens])


def test_a_dense_model_has_no_blocks_and_is_no_mixture():
    assert expert_blocks(tiny_llama()) == [] and not is_mixture(tiny_llama())


@every_family
def test_a_mixture_is_known_by_its_configuration(family):
    assert is_mixture(tiny_moe(family))


def test_a_mixture_whose_experts_cannot_be_found_is_an_error_in_one_line():
    model = tiny_jetmoe()
    assert is_mixture(model)
    with pytest.raises(UnsupportedModelError, match="experts of the teacher JetMoeForCausalLM") as error:
        expert_blocks(model)
    assert "\n" not in str(error.value) and "use_router" in str(error.value)


def test_a_gate_without_a_row_per_expert_is_an_error():
    block = expert_blocks(tiny_moe())[-1]
    block.gate = torch.nn.Linear(48, 3, bias=False)
    with pytest.raises(UnsupportedModelError, match="row per expert"):
        gate_rows(block)
