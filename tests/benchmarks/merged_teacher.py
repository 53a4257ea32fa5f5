"""Train a merged Mixture-of-Experts teacher whose experts differ more than the demo's, with the demo's tokenizer.

    python tests/benchmarks/merged_teacher.py [--output outputs/merged_teacher]

The base reads a third of the texts of the demo's teacher. Each expert is a copy of it that goes on with all texts of
one era, most of which the base has not seen: what one expert knows, the others do not, as in merges of fine-tuned
models. Two teachers are written, with the gates of the merging tools: OUTPUT/hidden, whose gate has the mean hidden
state of each expert's texts as its row, and OUTPUT/random.
"""

import argparse
import copy
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM, set_seed
from transformers.utils import logging

from distill_trainer.demo import (
    ASSETS,
    NUM_EXPERTS,
    dense_teacher,
    mean_expert_inputs,
    merge_experts,
    token_windows,
    train_language_model,
)
from distill_trainer.documents import load_sotu

ROOT = Path(__file__).parents[2]
BASE_EPOCHS, EXPERT_EPOCHS = 6, 3


def fine_tune(base: Qwen3ForCausalLM, windows: torch.Tensor, era: int) -> Qwen3ForCausalLM:
    """A copy of the base whose feed-forward networks have learned one era."""
    set_seed(era + 1)
    expert = copy.deepcopy(base).requires_grad_(False)
    for layer in expert.model.layers:
        layer.mlp.requires_grad_(True)
    train_language_model(expert, windows, epochs=EXPERT_EPOCHS, learning_rate=2e-3)
    return expert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/merged_teacher")
    options = parser.parse_args()
    logging.set_verbosity_warning()
    tokenizer, texts = AutoTokenizer.from_pretrained(ASSETS / "teacher"), load_sotu("teacher")
    eras = [
        token_windows(tokenizer, texts[era * len(texts) // NUM_EXPERTS : (era + 1) * len(texts) // NUM_EXPERTS])
        for era in range(NUM_EXPERTS)
    ]
    set_seed(0)
    base = dense_teacher(len(tokenizer))
    train_language_model(base, token_windows(tokenizer, texts[::3]), epochs=BASE_EPOCHS, learning_rate=3e-3)
    experts = [fine_tune(base, windows, era) for era, windows in enumerate(eras)]
    hidden = torch.stack([mean_expert_inputs(base, windows[::8]) for windows in eras], dim=1)
    set_seed(0)
    for gate, rows in (("hidden", hidden), ("random", torch.randn_like(hidden))):
        rows = rows / rows.norm(dim=-1, keepdim=True)
        merge_experts(base, experts, rows).half().save_pretrained(options.output / gate)
        tokenizer.save_pretrained(options.output / gate)


if __name__ == "__main__":
    main()
