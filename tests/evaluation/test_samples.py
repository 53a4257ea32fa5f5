import pytest
import torch
from builders import STUDENT_ROWS, TEXTS, tiny_llama, tiny_moe, tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from distill_trainer.documents import load_sotu
from distill_trainer.evaluation.samples import NEW_TOKENS, NUM_PROMPTS, PROMPT_CHARACTERS, choose_prompts, write_on


def greedy(model, own, prompt, count):
    """The likeliest token each time, read anew from the start each time."""
    ids = own(prompt)["input_ids"]
    length = len(ids)
    for _ in range(count):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == own.eos_token_id:
            break
        ids.append(token)
    return own.decode(ids[length:], skip_special_tokens=True)


@pytest.mark.parametrize(("side", "make"), [("student", tiny_llama), ("teacher", tiny_moe)])
def test_a_model_writes_its_likeliest_tokens_behind_the_prompt(side, make):
    model = make(initializer_range=0.3).train()
    prompts = [{"prompt": text[:30]} for text in TEXTS[:2]]
    written = write_on(model, tokenizer(side), prompts)
    assert model.training
    model.eval()
    assert written == [greedy(model, tokenizer(side), p["prompt"], NEW_TOKENS) for p in prompts]
    assert all(written) and written[0] != written[1]


def test_settings_that_a_model_ships_with_do_not_make_it_draw():
    model = tiny_llama(initializer_range=0.3)
    plain = write_on(model, tokenizer("student"), [{"prompt": "The"}])
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    assert write_on(model, tokenizer("student"), [{"prompt": "The"}]) == plain


def test_a_model_with_few_learned_positions_reads_the_end_of_the_prompt():
    shape = {"n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": STUDENT_ROWS}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    assert isinstance(write_on(model, tokenizer("student"), [{"prompt": " many words" * 30}])[0], str)


def test_prompts_are_whole_words_from_the_middle_of_evenly_spaced_texts():
    texts = [text[:5000] for text in load_sotu("unseen")[:9]]
    prompts = choose_prompts(texts)
    assert len(prompts) == NUM_PROMPTS
    for prompt, text in zip(prompts, (texts[1], texts[4], texts[7]), strict=True):
        whole = prompt["prompt"] + prompt["continuation"]
        start = text.strip().index(whole)
        assert abs(start - 2500) < 100 and text.strip()[start - 1].isspace()
        assert prompt["continuation"][0].isspace() and not prompt["prompt"][-1].isspace()
        assert 0.9 * PROMPT_CHARACTERS < len(prompt["prompt"]) < 1.3 * PROMPT_CHARACTERS


@pytest.mark.parametrize(
    "text",
    ["a", "a b", "日本語" * 200, "x" * 1000, " \n" * 300 + "end", "👩‍🚀" * 100, "One two three four. Five six seven."],
)
def test_any_text_gives_a_prompt_that_is_part_of_it(text):
    (prompt,) = choose_prompts(["", "  ", text])
    assert prompt["prompt"] and prompt["prompt"] + prompt["continuation"] in text
    assert len(prompt["prompt"]) < 1.5 * PROMPT_CHARACTERS


def test_no_text_gives_no_prompt():
    assert choose_prompts([]) == choose_prompts([" "]) == []
