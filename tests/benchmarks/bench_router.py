"""What re-routing the teacher costs for each choice of `router_layers`, against the plain forward pass of its trunk.

    python tests/benchmarks/bench_router.py [--layers 8] [--tokens 256] [--top_k 1 3] [--device cuda] [--repeats 5]

Layers in the reference teacher's shape (hidden 1024, 3 experts of 3072, top-1) with random weights; every token is an
anchor. The time is that of the plain pass, of the routers, the second run and the backward pass to the routers: all
that a training step does with the teacher below its head. Extra memory is what torch allocates at its peak beyond the
weights, against the plain pass. One process, so that the ratios hold where the seconds do not.
"""

import argparse
from types import SimpleNamespace

import torch
from measuring import measure
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

from distill_trainer.aligned import AnchorBatch
from distill_trainer.anchors import Anchors
from distill_trainer.logit_loss import Survey
from distill_trainer.routing import Routing
from distill_trainer.schedules import ScheduledValues
from distill_trainer.taps import TrunkOutput
from distill_trainer.teacher import Teacher

STUDENT_SIZE, VOCAB, EXPERTS = 576, 1024, 3


def reference_teacher(num_layers: int, device: str) -> Qwen3MoeForCausalLM:
    """Layers of the reference teacher behind a small vocabulary."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=1024,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        moe_intermediate_size=3072,
        num_experts=EXPERTS,
        num_experts_per_tok=1,
        vocab_size=VOCAB,
    )
    return Qwen3MoeForCausalLM(config).to(device)


def text_batch(batch_size: int, tokens: int, device: str) -> tuple[dict[str, torch.Tensor], Anchors]:
    """A batch whose every position is an anchor."""
    input_ids = torch.randint(1, VOCAB, (batch_size, tokens), device=device)
    mask = torch.ones_like(input_ids, dtype=torch.bool)
    positions = torch.arange(tokens, device=device).expand_as(input_ids)
    batch = {
        "input_ids": input_ids,
        "labels": input_ids,
        "student_positions": positions,
        "teacher_input_ids": input_ids,
        "teacher_attention_mask": mask.long(),
        "teacher_positions": positions,
        "anchor_mask": mask,
    }
    return batch, Anchors.of(batch)


class Step:
    """What a training step does with the trunk of a teacher, for one choice of layers."""

    def __init__(self, model, batch, anchors, *, layers: str, top_k: int, learns=True, checkpointing=False, samples=0):
        projection = SimpleNamespace()  # of the vocabularies, which nothing here needs
        self.teacher = Teacher(model, projection, router_layers=layers, checkpointing=checkpointing)
        torch.manual_seed(1)
        self.routing = Routing(self.teacher.gate_rows(), STUDENT_SIZE, num_samples=samples).to(model.device)
        self.batch, self.anchors = batch, anchors
        self.values = ScheduledValues(top_k=top_k, router_learns=learns)
        self.states = torch.randn(*batch["input_ids"].shape, STUDENT_SIZE, device=model.device)

    def plain(self):
        return self.teacher(self.batch, self.anchors)

    def __call__(self) -> None:
        output = self.plain()
        at = AnchorBatch.of(self.batch, TrunkOutput(self.states), output)
        ones = torch.ones(len(self.anchors), device=self.states.device)
        routed = self.routing(at, Survey(ones, ones / 2, -ones), self.teacher, self.values)
        if self.values.router_learns:
            # A gradient of ones stands for the head's.
            routed.hidden_states.sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="Layers of the teacher; the reference has 28.")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--top_k", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.layers < 1 or not all(1 <= top_k <= EXPERTS for top_k in options.top_k):
        parser.error(f"--layers must be 1 or above, and --top_k from 1 to {EXPERTS}.")
    logging.set_verbosity_error()
    model = reference_teacher(options.layers, options.device)
    case = text_batch(options.batch_size, options.tokens, options.device)
    half = f"last:{max(options.layers // 2, 1)}"
    choices = [
        ("last", {}),
        ("last:2", {}),
        (half, {}),
        ("all", {}),
        ("all", {"learns": False}),
        ("all", {"checkpointing": True}),
        ("last", {"samples": 4}),
    ]
    base_seconds, base_bytes = measure(
        Step(model, *case, layers="last", top_k=1).plain, options.device, options.repeats
    )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.device}")
    print(f"{options.layers} layers, {options.batch_size} x {options.tokens} tokens\n")
    print(f"{'router_layers':28}{'k':>3}{'seconds':>9}{'x plain':>9}{'peak MB':>9}")
    print(f"{'plain forward':28}{1:3d}{base_seconds:9.3f}{1:9.2f}{base_bytes / 1e6:9.0f}")
    for layers, changes in choices:
        for top_k in options.top_k:
            step = Step(model, *case, layers=layers, top_k=top_k, **changes)
            seconds, peak = measure(step, options.device, options.repeats)
            words = {"learns": "no gradient", "checkpointing": "checkpointing", "samples": "4 samples"}
            name = ", ".join([layers, *(words[key] for key in changes)])
            print(f"{name:28}{top_k:3d}{seconds:9.3f}{seconds / base_seconds:9.2f}{peak / 1e6:9.0f}", flush=True)


if __name__ == "__main__":
    main()
