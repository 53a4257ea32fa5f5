"""Models and tokenizers by name or path, with errors that a user can mend."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from distill_trainer.errors import ConfigurationError, TokenizerError, UnsupportedModelError


def load_causal_lm(
    name: str, *, dtype: str | torch.dtype = "float32", initialize: bool = False, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model from the Hub or a local folder.

    Args:
        name: Hub id or path.
        dtype: Type of the weights: a torch type, its name, or `auto` for the type that they are stored in.
        initialize: True keeps the configuration only and draws new weights.
        trust_remote_code: Allow code from the model's repository to run.

    Raises:
        UnsupportedModelError: If no causal language model can be loaded from there.
    """
    try:
        if initialize:
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            stored = {} if dtype == "auto" else {"dtype": dtype}
            return AutoModelForCausalLM.from_config(config, **stored, trust_remote_code=trust_remote_code)
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise UnsupportedModelError(_advice("model", name, error)) from error


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model from the Hub or a local folder.

    Raises:
        TokenizerError: If no tokenizer can be loaded from there.
    """
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise TokenizerError(_advice("tokenizer", name, error)) from error


def resolve(
    model: PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase | None, tokenizer_field: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, each loaded if only its name is known.

    Args:
        model: A model, or its name or path.
        tokenizer: Its tokenizer, or None to load it from the model's name.
        tokenizer_field: What the caller calls the tokenizer, for the message.

    Raises:
        ConfigurationError: If the tokenizer is not given and the model has no name.
    """
    name = model if isinstance(model, str) else model.name_or_path
    if tokenizer is None and not name:
        raise ConfigurationError(f"{tokenizer_field} must be given, because its model has no name to load it from.")
    return (
        load_causal_lm(model) if isinstance(model, str) else model,
        load_tokenizer(name) if tokenizer is None else tokenizer,
    )


def learned_positions(model: PreTrainedModel) -> int | None:
    """Tokens that a model's table of learned positions has room for, such as GPT-2's; None without such a table.

    Positions that are computed, as rotary ones, go on beyond `max_position_embeddings`, only with less precision.
    """
    limit, words = getattr(model.config, "max_position_embeddings", None), model.get_input_embeddings()
    tables = (part for part in model.modules() if isinstance(part, nn.Embedding) and part is not words)
    # Some families, as OPT, put two rows before the first position.
    rows = {table.num_embeddings - getattr(table, "offset", 0) for table in tables}
    return limit if limit in rows else None


def check_positions(model: PreTrainedModel, max_length: int) -> None:
    """Raise a `ConfigurationError` unless a student has positions for windows of `max_length` tokens."""
    positions = learned_positions(model)
    if positions is not None and max_length > positions:
        raise ConfigurationError(
            f"max_length must be at most {positions}, the learned positions of the student {type(model).__name__}, "
            f"got {max_length}."
        )


def with_adapters(
    student: PreTrainedModel, *, r: int, alpha: int, dropout: float, target_modules: list[str] | None
) -> nn.Module:
    """The student under LoRA adapters (https://huggingface.co/papers/2106.09685), its own weights frozen.

    Args:
        student: Changed in place: its linear layers get adapters.
        r: Rank of the adapters.
        alpha: Their scale, divided by `r`.
        dropout: Dropout before them.
        target_modules: Names of the layers that get one. None is what peft knows of the architecture.

    Raises:
        ConfigurationError: If no such layers exist.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM", r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules
    )
    try:
        return get_peft_model(student, config)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigurationError(f"lora_target_modules must name layers of the student: {reason}") from error


def _advice(kind: str, name: str, error: Exception) -> str:
    """One line that says what could not be loaded, why, and what to do."""
    reason = " ".join(str(error).split())[:200]
    if Path(name).is_dir():
        return f"No {kind} could be loaded from the folder {name}: {reason}"
    if name.count("/") > 1 or name.startswith((".", "/")):
        return f"No {kind} could be loaded from {name}: there is no such folder. Check the path."
    return f"No {kind} could be loaded from {name}, neither as a folder nor from the Hub: {reason} Check the name."
