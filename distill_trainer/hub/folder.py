"""What of a run's folder is published, and whether it is whole."""

import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from distill_trainer.errors import ConfigurationError
from distill_trainer.parsing import SETTINGS_FILE

WEIGHT_FILES = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
CARD = "README.md"
# Patterns, relative to a run's folder, of all that is published. `*` also crosses `/`, as in all of huggingface_hub.
STUDENT_FILES = (
    *("config.json", "generation_config.json", *WEIGHT_FILES),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja", CARD, SETTINGS_FILE, "report/*"),
)


def check_student(folder: Path) -> None:
    """Raise a `ConfigurationError` unless the folder holds a whole student that loads on its own."""
    if not folder.is_dir():
        raise ConfigurationError(f"folder must be one that exists, got {folder}. Give the output folder of a run.")
    index = folder / "model.safetensors.index.json"
    text = index.read_text(encoding="utf-8", errors="replace") if index.is_file() else ""
    shards = set(re.findall(r"model-[^\"]+\.safetensors", text))
    needed = ("config.json", "tokenizer_config.json", *(sorted(shards) or WEIGHT_FILES[:1]))
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        adapter = (folder / "adapter_config.json").is_file()
        mend = "Merge its LoRA adapter with export_student first." if adapter else "Give the output folder of a run."
        raise ConfigurationError(f"folder must hold a student, got {folder} without {', '.join(missing)}. {mend}")
    for name in (*needed, CARD):
        path = folder / name
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.is_file():
                path.read_text(encoding="utf-8")
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfigurationError(f"{path} is damaged: {error}. Train again, or give another folder.") from error


def card_for(folder: Path, repo_id: str) -> bytes:
    """The folder's card, with the repository's name where the run wrote that of its folder, which may have moved."""
    card = (folder / CARD).read_text(encoding="utf-8")
    found = re.search(r'from_pretrained\("([^"/]+)"\)', card)
    if found is None:
        return card.encode()
    name = found[1]
    card = card.replace(f'from_pretrained("{name}")', f'from_pretrained("{repo_id}")')
    title = repo_id.split("/")[1]
    return re.sub(rf"^(# |- name: ){re.escape(name)}$", rf"\g<1>{title}", card, flags=re.MULTILINE).encode()
