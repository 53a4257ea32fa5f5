"""Merge experts of different domains into a Mixture-of-Experts teacher, with the demo's tokenizer.

    python tests/benchmarks/merged_teacher.py [--output outputs/merged_teacher]

The demo's teacher merges experts of one domain, which hardly differ. Here the mean of its experts, a dense model of
addresses, is one expert, and the others are copies of it that went on with the standard library's documentation and
with its source code. Two teachers are written, with the gates of the merging tools: OUTPUT/hidden, whose gate has the
mean hidden state of each expert's texts as its row, and OUTPUT/random.
"""

import argparse
import ast
import copy
import sysconfig
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
    set_seed,
)
from transformers.utils import logging

from distill_trainer.demo import (
    ASSETS,
    dense_teacher,
    mean_expert_inputs,
    merge_experts,
    token_windows,
    train_language_model,
)
from distill_trainer.documents import load_sotu

ROOT = Path(__file__).parents[2]
EPOCHS, LEARNING_RATE = 3, 2e-3
# Characters of each domain, about as many as one of the demo's experts has read.
DOMAIN_SIZE = 2_000_000
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def library_texts() -> tuple[list[str], list[str]]:
    """Documentation strings and source code of the standard library, a text for each module."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documentation, source = [], []
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests"} & set(path.relative_to(root).parts):
            continue
        code = path.read_text(encoding="utf-8", errors="replace")
        found = [ast.get_docstring(node) for node in ast.walk(ast.parse(code)) if isinstance(node, DOCUMENTED)]
        documentation.append("\n\n".join(filter(None, found)))
        source.append(code)
    return cut(documentation), cut(source[::3])


def cut(texts: list[str]) -> list[str]:
    """The first texts, `DOMAIN_SIZE` characters together."""
    kept, size = [], 0
    for text in filter(None, texts):
        kept.append(text[: DOMAIN_SIZE - size])
        size += len(kept[-1])
    return list(filter(None, kept))


@torch.no_grad()
def mean_expert(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """The dense model whose feed-forward networks are the means of the teacher's experts."""
    dense = dense_teacher(len(tokenizer))
    dense.load_state_dict(teacher.state_dict(), strict=False)
    for layer, merged in zip(dense.model.layers, teacher.model.layers, strict=True):
        gate, up = merged.mlp.experts.gate_up_proj.mean(dim=0).chunk(2)
        layer.mlp.gate_proj.weight.copy_(gate)
        layer.mlp.up_proj.weight.copy_(up)
        layer.mlp.down_proj.weight.copy_(merged.mlp.experts.down_proj.mean(dim=0))
    return dense.eval()


def fine_tuned(base: Qwen3ForCausalLM, windows: torch.Tensor) -> Qwen3ForCausalLM:
    """A copy whose feed-forward networks have gone on with other texts."""
    set_seed(0)
    expert = copy.deepcopy(base).requires_grad_(False)
    for layer in expert.model.layers:
        layer.mlp.requires_grad_(True)
    train_language_model(expert, windows, epochs=EPOCHS, learning_rate=LEARNING_RATE)
    return expert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/merged_teacher")
    options = parser.parse_args()
    logging.set_verbosity_warning()
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(ASSETS / "teacher", dtype=torch.float32)
    base = mean_expert(teacher, tokenizer)
    domains = [token_windows(tokenizer, texts) for texts in (load_sotu("teacher"), *library_texts())]
    experts = [base, *(fine_tuned(base, windows) for windows in domains[1:])]
    hidden = torch.stack([mean_expert_inputs(base, windows[::8]) for windows in domains], dim=1)
    set_seed(0)
    for gate, rows in (("hidden", hidden), ("random", torch.randn_like(hidden))):
        rows = rows / rows.norm(dim=-1, keepdim=True)
        merge_experts(base, experts, rows).half().save_pretrained(options.output / gate)
        tokenizer.save_pretrained(options.output / gate)


if __name__ == "__main__":
    main()
