import pytest
import torch
from builders import SHAPE, random_ids, tiny_llama, tiny_moe
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from distill_trainer.errors import UnsupportedModelError
from distill_trainer.losses.attention import attention_rows
from distill_trainer.taps import (
    ATTENTION_WITH_TAP,
    attention_module,
    check_attention,
    decoder_layers,
    final_norm,
    output_head,
    run_trunk,
)

DENSE = {name: value for name, value in SHAPE.items() if name != "num_experts_per_tok"} | {"intermediate_size": 64}


def gemma2():
    config = Gemma2Config(
        **DENSE, head_dim=12, final_logit_softcapping=3.0, attn_logit_softcapping=None, sliding_window=3
    )
    return Gemma2ForCausalLM(config).eval()


def gemma():
    """One key head, and embeddings that the trunk multiplies."""
    return GemmaForCausalLM(GemmaConfig(**(DENSE | {"num_key_value_heads": 1}), head_dim=12)).eval()


def mistral():
    """A window in every layer."""
    return MistralForCausalLM(MistralConfig(**DENSE, sliding_window=2)).eval()


def qwen3():
    """Queries and keys behind a norm."""
    return Qwen3ForCausalLM(Qwen3Config(**DENSE, head_dim=12)).eval()


def gpt2():
    """Learned absolute positions, where a position off by the padding shows; modules of other names."""
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=2048, n_positions=16, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


def granite():
    return GraniteForCausalLM(GraniteConfig(**DENSE, logits_scaling=8.0, attention_multiplier=0.1)).eval()


MODELS = {
    "llama": lambda: tiny_llama().eval(),
    "qwen3": qwen3,
    "qwen3_moe": tiny_moe,
    "gpt2": gpt2,
    "gemma": gemma,
    "gemma2": gemma2,
    "mistral": mistral,
    "granite": granite,
}
every_model = pytest.mark.parametrize("name", MODELS)


def padded(side, length=9, real=(9, 5)):
    """Ids, mask, and where the real tokens of each row are."""
    ids = random_ids(length=length)
    mask = torch.zeros_like(ids)
    for row, count in enumerate(real):
        mask[row, length - count :] = 1 if side == "left" else mask[row, length - count :]
        if side == "right":
            mask[row, :count] = 1
    return ids, mask


@every_model
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_from_tapped_queries_and_keys_are_the_eager_attentions(name, side):
    torch.manual_seed(0)
    model = MODELS[name]()
    ids, mask = padded(side)
    layers = tuple(range(model.config.num_hidden_layers))
    with torch.no_grad():
        taps = run_trunk(model, ids, mask, attention_layers=layers).attentions
        model.set_attn_implementation("eager")
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        expected = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, output_attentions=True, use_cache=False
        ).attentions
    every = torch.arange(ids.shape[1]).expand_as(ids)
    for layer in layers:
        tap = taps[layer]
        rows = attention_rows(tap.query, tap.key, every, mask.bool(), tap.scaling, visible=tap.visible)
        real = mask.bool()[:, None, :, None].expand_as(rows)
        torch.testing.assert_close(rows[real], expected[layer][real], atol=3e-6, rtol=0)


@every_model
@pytest.mark.parametrize("side", ["left", "right"])
def test_residuals_are_the_models_own_hidden_states(name, side):
    torch.manual_seed(0)
    model = MODELS[name]()
    ids, mask = padded(side)
    count = model.config.num_hidden_layers
    with torch.no_grad():
        output = run_trunk(model, ids, mask, layers=tuple(range(count)))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        expected = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True, use_cache=False
        )
        normed = final_norm(model)(output.layers[count - 1])
    real = mask.bool()
    # Of the last layer, transformers gives the state behind the final norm only.
    for layer in range(count - 1):
        torch.testing.assert_close(output.layers[layer][real], expected.hidden_states[layer + 1][real])
    torch.testing.assert_close(normed[real], expected.hidden_states[count][real])
    torch.testing.assert_close(output.last_hidden_state[real], expected.hidden_states[count][real])


@pytest.mark.parametrize(("name", "with_window"), [("gemma2", [0, 2]), ("mistral", [0, 1, 2]), ("qwen3", [])])
def test_a_window_hides_keys_in_the_layers_that_have_one(name, with_window):
    taps = run_trunk(MODELS[name](), *padded("right"), attention_layers=(0, 1, 2)).attentions
    assert [layer for layer, tap in taps.items() if not tap.visible[0, 0, 8, 0]] == with_window


@every_model
def test_tapping_asks_for_no_hidden_states_and_no_attention_maps(name):
    model = MODELS[name]()
    asked = []

    def watch(module, args, kwargs):
        asked.append((model.config._attn_implementation, {key for key, value in kwargs.items() if value is True}))

    model.base_model.register_forward_pre_hook(watch, with_kwargs=True)
    run_trunk(model, *padded("right"), layers=(0,), attention_layers=(1,))
    assert asked == [(ATTENTION_WITH_TAP, set())]


def test_only_the_chosen_layers_are_kept():
    output = run_trunk(tiny_moe(), *padded("right"), layers=(1,), attention_layers=(0, 2))
    assert set(output.layers) == {1} and set(output.attentions) == {0, 2}


@every_model
def test_left_padded_text_reads_as_unpadded_text(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    ids, mask = padded("left")
    with torch.no_grad():
        batch = run_trunk(model, ids, mask).last_hidden_state[1, -5:]
        alone = run_trunk(model, ids[1:, -5:], mask[1:, -5:]).last_hidden_state[0]
    torch.testing.assert_close(batch, alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_tapping_leaves_the_model_as_it_was(implementation):
    model = tiny_llama()
    model.set_attn_implementation(implementation)
    before = model(input_ids=random_ids()).logits
    run_trunk(model, *padded("right"), layers=(0,), attention_layers=(1,))
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(input_ids=random_ids()).logits, before)
    assert not any(module._forward_hooks or hasattr(module, "attention_tap") for module in model.modules())


def test_a_failing_model_is_restored_too():
    model = tiny_llama()
    with pytest.raises(IndexError):
        run_trunk(model, torch.full((1, 3), 10**6), torch.ones(1, 3), layers=(0,), attention_layers=(0,))
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks or hasattr(module, "attention_tap") for module in model.modules())


def test_tapped_queries_carry_gradients():
    model = tiny_llama()
    taps = run_trunk(model, *padded("right"), attention_layers=(1,)).attentions[1]
    (taps.query.sum() + taps.key.sum()).backward()
    assert decoder_layers(model)[1].self_attn.q_proj.weight.grad.ne(0).any()
    assert decoder_layers(model)[1].self_attn.v_proj.weight.grad is None


@every_model
def test_the_head_gives_the_models_own_logits(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    ids = random_ids()
    with torch.no_grad():
        hidden = run_trunk(model, ids, torch.ones_like(ids)).last_hidden_state
        torch.testing.assert_close(output_head(model)(hidden), model(input_ids=ids, use_cache=False).logits)


def test_an_unknown_attention_is_an_error():
    with pytest.raises(UnsupportedModelError, match="attention_weight"):
        attention_module(torch.nn.Linear(2, 2))


def test_gpt2_layers_and_norm_are_found():
    model = gpt2()
    assert decoder_layers(model) is model.transformer.h and final_norm(model) is model.transformer.ln_f


@pytest.mark.parametrize("soft_cap", [None, 0.05])
def test_attention_that_is_more_than_scaled_dot_products_is_told(soft_cap):
    config = Gemma2Config(**DENSE, head_dim=12, attn_logit_softcapping=soft_cap, sliding_window=64)
    model = Gemma2ForCausalLM(config).train()
    if soft_cap is None:
        check_attention(model)
    else:
        with pytest.raises(UnsupportedModelError, match="attention of Gemma2ForCausalLM .* Set attention_weight to 0"):
            check_attention(model)
    assert model.training


def test_a_model_that_cannot_do_without_its_own_mask_is_told():
    model = MptForCausalLM(MptConfig(d_model=16, n_heads=2, n_layers=2, max_seq_len=16, vocab_size=64)).train()
    with pytest.raises(UnsupportedModelError, match="attention of MptForCausalLM .* Set attention_weight to 0"):
        check_attention(model)
    assert model.training


@pytest.mark.parametrize("layer", [0, -1])
def test_a_bias_in_place_of_a_mask_is_told(layer):
    model = tiny_llama()

    def bias(module, args, kwargs):
        length = kwargs["hidden_states"].shape[1]
        return args, kwargs | {"attention_mask": torch.zeros(1, 1, length, length)}

    model.model.layers[layer].self_attn.register_forward_pre_hook(bias, with_kwargs=True)
    with pytest.raises(UnsupportedModelError, match="attention of LlamaForCausalLM .* Set attention_weight to 0"):
        check_attention(model)
