import pytest
import torch
from builders import tiny_gpt2, tiny_llama, tiny_moe, tokenizer
from transformers import OPTConfig, OPTForCausalLM

from distill_trainer.errors import ConfigurationError, TokenizerError, UnsupportedModelError
from distill_trainer.loading import (
    check_positions,
    learned_positions,
    load_causal_lm,
    load_tokenizer,
    resolve,
    with_adapters,
)


@pytest.fixture
def folder(tmp_path):
    tiny_llama().half().save_pretrained(tmp_path)
    tokenizer("student").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("auto", torch.float16),
        (torch.float32, torch.float32),
    ],
)
def test_a_model_comes_in_the_type_asked_for(folder, dtype, expected):
    assert load_causal_lm(str(folder), dtype=dtype).dtype == expected


def test_new_weights_keep_the_configuration_only(folder):
    torch.manual_seed(1)
    stored, drawn = (load_causal_lm(str(folder), initialize=value) for value in (False, True))
    assert drawn.config.hidden_size == stored.config.hidden_size
    assert not torch.equal(drawn.lm_head.weight, stored.lm_head.weight)
    # Drawn in the type asked for, not in the type of the stored weights and then widened.
    assert drawn.dtype == torch.float32
    assert not torch.equal(drawn.lm_head.weight, drawn.lm_head.weight.half().float())
    assert load_causal_lm(str(folder), initialize=True, dtype="auto").dtype == torch.float16


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_damaged_model_is_an_error_in_one_line(folder, file):
    path = folder / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UnsupportedModelError, match="No model could be loaded from the folder") as error:
        load_causal_lm(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere"])
def test_a_missing_folder_is_an_error_that_says_so(name):
    with pytest.raises(UnsupportedModelError, match="there is no such folder"):
        load_causal_lm(name)
    with pytest.raises(TokenizerError, match="there is no such folder"):
        load_tokenizer(name)


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match="No tokenizer could be loaded from the folder"):
        load_tokenizer(str(tmp_path))


def test_a_models_name_finds_its_tokenizer(folder):
    model, found = resolve(str(folder), None, "processing_class")
    assert model.config.vocab_size == 2048 and found.get_vocab() == tokenizer("student").get_vocab()
    again, same = resolve(model, None, "processing_class")
    assert again is model and same.get_vocab() == found.get_vocab()


def test_a_model_without_a_name_needs_its_tokenizer():
    with pytest.raises(ConfigurationError, match="processing_class must be given"):
        resolve(tiny_llama(), None, "processing_class")
    assert resolve(tiny_llama(), tokenizer("student"), "processing_class")[1] is tokenizer("student")


def test_adapters_leave_the_students_own_weights_frozen():
    student = with_adapters(tiny_llama(), r=4, alpha=8, dropout=0.0, target_modules=None)
    trainable = [name for name, p in student.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)


def test_adapters_for_layers_that_do_not_exist_are_an_error():
    with pytest.raises(ConfigurationError, match="lora_target_modules must name layers of the student") as error:
        with_adapters(tiny_llama(), r=4, alpha=8, dropout=0.0, target_modules=["nothing"])
    assert "\n" not in str(error.value)


def test_only_a_table_of_positions_limits_the_length_of_a_window():
    shape = {
        "hidden_size": 16,
        "ffn_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    }
    opt = OPTForCausalLM(OPTConfig(**shape, vocab_size=50, max_position_embeddings=20))
    assert [learned_positions(model) for model in (tiny_gpt2(), opt)] == [64, 20]
    # Rotary positions go on. A vocabulary as large as the table would be is none.
    assert learned_positions(tiny_llama()) is learned_positions(tiny_moe()) is None
    assert learned_positions(tiny_llama(max_position_embeddings=2048)) is None
    opt(input_ids=torch.ones(1, 20, dtype=torch.long))
    check_positions(opt, 20)
    with pytest.raises(ConfigurationError) as error:
        check_positions(opt, 21)
    assert (
        str(error.value)
        == "max_length must be at most 20, the learned positions of the student OPTForCausalLM, got 21."
    )
