"""A model that is there whole or not at all; what the benchmarks beside this file share."""

import tempfile
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG = "config.json"


def save_whole(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save a model with its tokenizer beside `folder` and move the files in, the one that stands for all last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        tokenizer.save_pretrained(scratch)
        model.save_pretrained(scratch)
        for path in sorted(Path(scratch).iterdir(), key=lambda path: path.name == CONFIG):
            path.replace(folder / path.name)
