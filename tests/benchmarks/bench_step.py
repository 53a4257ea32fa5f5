"""Time of a whole distillation step over its floor, part by part, at the reference pair's shapes.

    python tests/benchmarks/bench_step.py [--device cuda] [--batch_size 4 --tokens 512] [--repeats 5] [--tiny]

A step is what `DistillationTrainer` does with a batch: the teacher reads it, the router mixes its experts, five losses
and LM compare it with the student, and the backward pass fills all gradients. Its floor is the least that any teacher
costs: the plain forward pass of the teacher's trunk, without a head, and forward and backward pass of the student with
the plain LM loss, on the same batch. The optimizer, the same on both sides, is left out.

The budget is 1.15 times the floor. One pass of the teacher's head alone takes more than that leaves, and a comparison
of beliefs needs one; with a router two, for the beliefs with its own gate and with the mixture, and where the router
learns a third, for their gradient. So the step is also set against the floor and these three passes: what is left is
what this package adds.

Random weights and ids in the reference shapes (Qwen3-MoE of 28 layers, hidden 1024, 3 experts of 3072, top-1,
vocabulary 151,936; Llama of 30 layers, hidden 576, vocabulary 49,152); 24 of 25 tokens are anchors, as in prose. On a
GPU the teacher is held in fp16 and the student computes in fp16 by autocast, on a CPU both in float32. Every number is
the median of some repeats behind a warm-up, all in one process and taken in turns, so that the ratios hold where the
seconds do not. Peak memory is what torch allocates at once beyond the weights and gradients.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from measuring import peak_extra, seconds
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

from distill_trainer.alignment import VocabularyProjection
from distill_trainer.anchors import Anchors
from distill_trainer.arguments import DistillationArguments
from distill_trainer.layer_plan import LayerPairs
from distill_trainer.logit_loss import LogitSettings
from distill_trainer.modeling import DistillationModel
from distill_trainer.router import routing_objective
from distill_trainer.routing import Routing
from distill_trainer.schedules import LOGIT_LOSSES, ScheduledValues
from distill_trainer.taps import run_trunk
from distill_trainer.teacher import Teacher

WEIGHTS = {"kl": 0.7, "feature": 0.1, "attention": 0.1, "layerwise": 0.05, "contrastive": 0.05, "lm": 0.3}
# One token in so many ends inside of the other model's token.
NO_ANCHOR_EVERY = 25
# Of the teacher's head in a step in which the router learns.
HEAD_PASSES = 3
BUDGET = 1.15
TRUNKS = ("  teacher's trunk", "  the same with taps", "  student's trunk", "  the same, its taps")
WITH_MEMORY = ("floor", "whole step", *TRUNKS)


@dataclass(frozen=True)
class Shapes:
    """Sizes of both models."""

    teacher_layers: int = 28
    teacher_size: int = 1024
    teacher_heads: tuple[int, int, int] = (16, 8, 128)
    expert_size: int = 3072
    teacher_vocab: int = 151_936
    student_layers: int = 30
    student_size: int = 576
    student_heads: tuple[int, int, int] = (9, 3, 64)
    student_inner: int = 1536
    student_vocab: int = 49_152


TINY = Shapes(3, 32, (4, 2, 8), 48, 600, 2, 24, (3, 1, 8), 48, 300)


def heads(shape: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("num_attention_heads", "num_key_value_heads", "head_dim"), shape, strict=True))


def build_models(shapes: Shapes, device: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Student and teacher with random weights; the student in float32, the teacher in fp16 on a GPU."""
    torch.manual_seed(0)
    with torch.device(device):
        student = LlamaForCausalLM(
            LlamaConfig(
                **heads(shapes.student_heads),
                hidden_size=shapes.student_size,
                num_hidden_layers=shapes.student_layers,
                intermediate_size=shapes.student_inner,
                vocab_size=shapes.student_vocab,
                tie_word_embeddings=True,
            )
        )
        config = Qwen3MoeConfig(
            **heads(shapes.teacher_heads),
            hidden_size=shapes.teacher_size,
            num_hidden_layers=shapes.teacher_layers,
            intermediate_size=shapes.expert_size,
            moe_intermediate_size=shapes.expert_size,
            num_experts=3,
            num_experts_per_tok=1,
            norm_topk_prob=True,
            vocab_size=shapes.teacher_vocab,
            tie_word_embeddings=True,
        )
        config.dtype = torch.float16 if device == "cuda" else torch.float32
        teacher = Qwen3MoeForCausalLM._from_config(config)
    return student.train(), teacher.to(config.dtype).eval()


def text_batch(shapes: Shapes, batch_size: int, tokens: int, device: str) -> dict[str, Tensor]:
    """Two tokenizations of one length that meet at all but a few tokens."""
    student_ids = torch.randint(1, shapes.student_vocab, (batch_size, tokens), device=device)
    teacher_ids = torch.randint(1, shapes.teacher_vocab, (batch_size, tokens), device=device)
    positions = torch.arange(tokens, device=device)
    positions = positions[positions % NO_ANCHOR_EVERY != NO_ANCHOR_EVERY - 1].expand(batch_size, -1).contiguous()
    return {
        "input_ids": student_ids,
        "attention_mask": torch.ones_like(student_ids),
        "labels": student_ids,
        "teacher_input_ids": teacher_ids,
        "teacher_attention_mask": torch.ones_like(teacher_ids),
        "student_positions": positions,
        "teacher_positions": positions,
        "anchor_mask": torch.ones_like(positions, dtype=torch.bool),
    }


class Step:
    """Both models and a batch, and what a step or a part of it does with them."""

    def __init__(self, shapes: Shapes, batch_size: int, tokens: int, device: str, logit_chunk_mb: float | None = None):
        self.device = device
        self.student, self.teacher_model = build_models(shapes, device)
        self.batch = text_batch(shapes, batch_size, tokens, device)
        # Every student token is reached by about as many of the teacher's as any other.
        self.projection = VocabularyProjection(
            torch.arange(shapes.teacher_vocab) % shapes.student_vocab, shapes.student_vocab
        ).to(device)
        pairs = LayerPairs.plan(
            shapes.student_layers,
            shapes.teacher_layers,
            layer_map="uniform",
            feature_layers=None,
            attention_layers=None,
        )
        self.teachers = {on: Teacher(self.teacher_model, self.projection, use_router=on) for on in (True, False)}
        self.models = {}
        for on, teacher in self.teachers.items():
            routing = Routing(teacher.gate_rows(), shapes.student_size) if on else None
            self.models[on] = DistillationModel(
                self.student,
                routing=routing,
                teacher_hidden_size=shapes.teacher_size,
                pairs=pairs,
                contrastive=True,
                logits=LogitSettings(logit_chunk_mb=logit_chunk_mb),
            ).to(device)

    def precision(self) -> AbstractContextManager:
        """Of the student, as the Trainer sets it."""
        return torch.autocast("cuda", torch.float16) if self.device == "cuda" else nullcontext()

    def teacher_trunk(self, **tapped) -> None:
        """The floor of the teacher: its trunk, read once."""
        with torch.no_grad():
            run_trunk(
                self.teacher_model, self.batch["teacher_input_ids"], self.batch["teacher_attention_mask"], **tapped
            )

    def text_alone(self) -> None:
        """The floor of the student: forward and backward pass with the plain LM loss."""
        with self.precision():
            loss = self.student(**{n: self.batch[n] for n in ("input_ids", "attention_mask", "labels")}).loss
        loss.backward()

    def floor(self) -> None:
        self.teacher_trunk()
        self.text_alone()

    def tapped_trunk(self) -> None:
        """The teacher's trunk with the taps of a whole step."""
        self.teacher_trunk(**self.models[True].tapped_layers(WEIGHTS, side=1))

    def student_trunk(self, **tapped) -> None:
        """Forward and backward pass of the student without its head."""
        with self.precision():
            output = run_trunk(self.student, self.batch["input_ids"], self.batch["attention_mask"], **tapped)
            loss = output.last_hidden_state.float().mean()
        loss.backward()

    def tapped_student(self) -> None:
        """The student's trunk with the taps of a whole step."""
        self.student_trunk(**self.models[True].tapped_layers(WEIGHTS, side=0))

    def read(self, weights: dict[str, float], use_router: bool):
        """The teacher with all that it keeps of the batch."""
        teacher, anchors = self.teachers[use_router], Anchors.of(self.batch)
        return teacher, teacher(self.batch, anchors, **self.models[use_router].tapped_layers(weights, side=1))

    def __call__(self, without: tuple[str, ...] = (), router_learns: bool = True) -> None:
        """A whole step, but for the losses, or the `router`, in `without`."""
        weights = WEIGHTS | dict.fromkeys((name for name in without if name != "router"), 0.0)
        use_router = "router" not in without
        model = self.models[use_router]
        teacher, output = self.read(weights, use_router)
        values = ScheduledValues(top_k=1, router_learns=router_learns)
        with self.precision():
            found = model(**self.batch, weights=weights, teacher=teacher, teacher_output=output, values=values)
        others = [weights[name] * value for name, value in found["losses"].items() if name not in LOGIT_LOSSES]
        loss = found["logit_loss"] + sum(others)
        if found["router"]:
            loss = loss + routing_objective(
                found["router"], student_weight=0.1, anchor_weight=0.1, balance_weight=0.01
            )
        loss.backward()

    def teacher_head(self) -> None:
        """The teacher's head at the anchors, once: the least that a comparison over its vocabulary costs."""
        with torch.no_grad():
            states = torch.zeros(
                int(self.batch["anchor_mask"].sum()),
                self.teacher_model.config.hidden_size,
                device=self.device,
                dtype=self.teacher_model.dtype,
            )
            for rows in states.split(64):
                self.teacher_model.lm_head(rows)


def rows(step: Step) -> Iterator[tuple[str, Callable[[], None]]]:
    """What is measured, by name. The first is the floor, the second the whole step."""
    yield "floor", step.floor
    yield "whole step", step
    trunks = (step.teacher_trunk, step.tapped_trunk, step.student_trunk, step.tapped_student)
    yield from zip(TRUNKS, trunks, strict=True)
    yield "  student, text alone", step.text_alone
    yield "  teacher's head, once", step.teacher_head
    for name in (*WEIGHTS, "router"):
        yield f"step without {name}", lambda name=name: step((name,))
    yield "step, router at rest", lambda: step(router_learns=False)
    yield "step, default losses", lambda: step(("feature", "attention", "layerwise"))
    yield "step, KL and LM alone", lambda: step(("feature", "attention", "layerwise", "contrastive", "router"))


def operators(step: Step) -> str:
    """Where the time of one whole step goes, by operator."""
    on_gpu = step.device == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as profiled:
        step()
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return profiled.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=40)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch_size", type=int, help="Rows; 1 on a CPU and 4 on a GPU by default.")
    parser.add_argument("--tokens", type=int, help="Tokens in a row; 256 on a CPU and 512 on a GPU by default.")
    parser.add_argument("--repeats", type=int, help="Of each call; 3 on a CPU and 10 on a GPU by default.")
    parser.add_argument("--logit_chunk_mb", type=float, help="The setting of this name.")
    parser.add_argument("--tiny", action="store_true", help="Models of a few thousand weights, to see that it runs.")
    parser.add_argument("--operators", action="store_true", help="Also list the operators of a whole step by time.")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be cpu where torch finds no GPU, got cuda.")
    for name, least, on_cpu, on_gpu in (("batch_size", 1, 1, 4), ("tokens", 2, 256, 512), ("repeats", 1, 3, 10)):
        if getattr(options, name) is None:
            setattr(options, name, on_gpu if options.device == "cuda" else on_cpu)
        if getattr(options, name) < least:
            parser.error(f"--{name} must be {least} or above, got {getattr(options, name)}.")
    if options.logit_chunk_mb is not None and not 0 < options.logit_chunk_mb < float("inf"):
        parser.error(f"--logit_chunk_mb must be above 0, got {options.logit_chunk_mb}.")
    return options


def main() -> None:
    options = read_options()
    logging.set_verbosity_error()
    batch_size, tokens, repeats = options.batch_size, options.tokens, options.repeats
    on_gpu = options.device == "cuda"
    step = Step(TINY if options.tiny else Shapes(), batch_size, tokens, options.device, options.logit_chunk_mb)
    calls = dict(rows(step))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.device}")
    print(f"{batch_size} x {tokens} tokens, {int(step.batch['anchor_mask'].sum())} anchors, {repeats} repeats\n")
    step()  # makes the gradients, so that no call counts them, and warms up
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + on_gpu):
        for name, call in calls.items():
            times[name].append(seconds(call, options.device))
        if turn == 0 and on_gpu:
            # Kernels are chosen and loaded in the first calls.
            times = {name: [] for name in calls}
    medians = {name: statistics.median(values) for name, values in times.items()}
    whole = medians["whole step"]
    print(f"{'':24}{'seconds':>9}{'x floor':>9}{'of step':>9}{'peak MB':>9}")
    for name, call in calls.items():
        share = f"{(whole - medians[name]) / whole:9.1%}" if "without" in name else f"{'':9}"
        # Memory costs one more call each: only of the two that matter, and of what the taps add.
        peak = f"{peak_extra(call, options.device) / 1e6:9.0f}" if name in WITH_MEMORY else ""
        print(f"{name:24}{medians[name]:9.3f}{medians[name] / medians['floor']:9.2f}{share}{peak}", flush=True)
    least = medians["floor"] + HEAD_PASSES * medians["  teacher's head, once"]
    interval = DistillationArguments.router_interval
    mean = (whole + (interval - 1) * medians["step, router at rest"]) / interval
    print(f"\nwhole step over its floor: {whole / medians['floor']:.2f}, budget {BUDGET}")
    print(f"mean of steps, where the router learns in every {interval}th: {mean / medians['floor']:.2f}")
    print(f"whole step over the floor and {HEAD_PASSES} passes of the teacher's head: {whole / least:.2f}")
    if options.operators:
        print(operators(step))


if __name__ == "__main__":
    main()
