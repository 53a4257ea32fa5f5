"""What every model writes behind the same beginnings of held-out text."""

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from distill_trainer.evaluation.measure import evaluating

NUM_PROMPTS, PROMPT_CHARACTERS, NEW_TOKENS = 3, 160, 48


def choose_prompts(texts: Sequence[str]) -> list[dict[str, str]]:
    """Beginnings for the models to go on from, out of the middle of evenly spaced texts; nothing else decides.

    Each starts and ends at a blank where there is one near, and holds about `PROMPT_CHARACTERS` characters.

    Args:
        texts: Held-out documents.

    Returns:
        Up to `NUM_PROMPTS` times a `prompt` and the `continuation` that the text itself has, about as long.
    """
    found = [text for text in texts if text.strip()]
    count = min(NUM_PROMPTS, len(found))
    chosen = [found[(2 * number + 1) * len(found) // (2 * count)] for number in range(count)]
    return [_prompt(text.strip()) for text in chosen]


def _prompt(text: str) -> dict[str, str]:
    start = _behind_blank(text, len(text) // 2 if len(text) > 2 * PROMPT_CHARACTERS else 0)
    end = _behind_blank(text, min(start + PROMPT_CHARACTERS, (start + len(text) + 1) // 2))
    # The blank itself belongs to what follows, as it does to tokens.
    prompt = text[start:end].rstrip()
    return {"prompt": prompt, "continuation": text[start + len(prompt) :][:PROMPT_CHARACTERS]}


def _behind_blank(text: str, position: int) -> int:
    """The place behind the next blank from `position` on; `position` itself at 0 or where no blank is near."""
    near = range(position, min(position + PROMPT_CHARACTERS // 4, len(text)))
    return next((index + 1 for index in near if text[index].isspace()), position) if position else 0


def write_on(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[dict[str, str]]
) -> list[str]:
    """What the model writes behind each prompt, choosing the likeliest token each time.

    Args:
        model: Any causal language model; it stays as it is.
        tokenizer: Its own.
        prompts: See `choose_prompts`.

    Returns:
        For each prompt up to `NEW_TOKENS` tokens as text, without special tokens.
    """
    room = getattr(model.config, "max_position_embeddings", None) or 2 * (PROMPT_CHARACTERS + NEW_TOKENS)
    new_tokens = min(NEW_TOKENS, room // 2)
    filler = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, pad_token_id=filler, eos_token_id=tokenizer.eos_token_id
    )
    written = []
    with evaluating(model):
        for prompt in prompts:
            ids = tokenizer(prompt["prompt"])["input_ids"][-(room - new_tokens) :]
            tokens = torch.tensor([ids], device=model.device)
            output = model.generate(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), generation_config=settings
            )
            written.append(
                tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            )
    return written
