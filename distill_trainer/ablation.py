"""Ablations: a student for each variant of the settings and each seed, on the same text, scored on the same bytes."""

import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import set_seed
from transformers.utils import logging

from distill_trainer.arguments import DistillationArguments, parse_arguments
from distill_trainer.assembly import load_texts
from distill_trainer.data import DistillationCollator, prepare_dataset
from distill_trainer.errors import ConfigurationError
from distill_trainer.evaluation.agreement import replace_at_anchors
from distill_trainer.evaluation.measure import evaluating, forward_logits, score_logits
from distill_trainer.evaluation.metrics.bits_per_byte.bits_per_byte import bits_per_byte
from distill_trainer.loading import load_causal_lm, load_tokenizer
from distill_trainer.trainer import DistillationTrainer

logger = logging.get_logger(__name__)

# The teacher reads this part of the batches, spread evenly: it costs more than the student, and differs less.
TEACHER_STRIDE = 3
RESULT, CONFIG = "result.json", "config.yaml"
# What every run of an ablation sets: it trains, and is scored here.
FIXED = {
    "run_baseline": "false",
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": "true",
}


@dataclass
class Ablation:
    """What an ablation's file says.

    Attributes:
        variants: Settings of each variant by its name, on top of `settings`.
        settings: Settings of all variants.
        reference: The variant that the others are compared with.
        seeds: A seed draws other documents and batches.
        jobs: Runs at a time, each in a process of its own with its share of the cores.
        flags: Flags of the command line, which win over all of these.
        folder: Where the results go.
    """

    variants: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    reference: str
    seeds: list[int]
    jobs: int = 1
    flags: list[str] = field(default_factory=list)
    folder: Path = Path("outputs/ablation")


def read_ablation(argv: Sequence[str] | None = None) -> Ablation | None:
    """The ablation that the first argument names: a YAML file with `variants`. None for anything else.

    Raises:
        ConfigurationError: If the file has `variants` and cannot be used.
    """
    first, *flags = list(sys.argv[1:] if argv is None else argv) or [""]
    path = Path(first)
    if path.suffix not in (".yaml", ".yml") or not path.is_file() or {"-h", "--help"} & set(flags):
        return None
    try:
        # Plain text as for all config files: their parser knows the types.
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return None  # the parser of the settings says what is wrong
    if not isinstance(content, dict) or "variants" not in content:
        return None
    variants, seeds = content.pop("variants"), content.pop("seeds", ["0"])
    jobs, reference = content.pop("jobs", "1"), content.pop("reference", "")
    if not isinstance(variants, dict) or not variants or not all(isinstance(v, dict) for v in variants.values()):
        raise ConfigurationError(f"{path}: variants must be a mapping of names to mappings of settings.")
    if reference not in variants:
        raise ConfigurationError(f"{path}: reference must be one of the variants, got {reference or 'none'}.")
    if not isinstance(seeds, list) or not seeds or not all(str(seed).isdigit() for seed in seeds):
        raise ConfigurationError(f"{path}: seeds must be a list of whole numbers, 0 or above, got {seeds}.")
    if not str(jobs).isdigit() or int(jobs) < 1:
        raise ConfigurationError(f"{path}: jobs must be 1 or above, got {jobs}.")
    folder = Path(content.pop("output_dir", Ablation.folder))
    if "--output_dir" in flags:
        at = flags.index("--output_dir")
        if at + 1 == len(flags):
            raise ConfigurationError("--output_dir must name a folder.")
        folder = Path(flags[at + 1])
        del flags[at : at + 2]
    return Ablation(variants, content, reference, [int(seed) for seed in seeds], int(jobs), flags, folder)


def run_ablation(ablation: Ablation) -> Iterator[str]:
    """Train and score what is not there yet: a line for each run, then the table of all, which is also written.

    A result that is there with the same settings is kept, so a stopped ablation goes on where it was.

    Raises:
        ConfigurationError: If a setting is wrong, or a result was made with other settings. Nothing runs then.
    """
    todo = []
    for seed in ablation.seeds:
        for name in ablation.variants:
            settings = settings_of(ablation, name, seed)
            result = run_folder(ablation, name, seed) / RESULT
            if not result.is_file():
                check_settings(name, settings, ablation.flags)
                todo.append((result.parent, settings))
            elif json.loads(result.read_text(encoding="utf-8"))["made_with"] != made_with(settings, ablation.flags):
                raise ConfigurationError(
                    f"{result} was made with other settings. Give another output_dir, or delete it."
                )
    for folder, settings in todo:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    threads = max((os.cpu_count() or 1) // ablation.jobs, 1)
    # A fresh process for each run: no run sees another's random numbers, threads or memory.
    pool = ProcessPoolExecutor(ablation.jobs, get_context("spawn"), max_tasks_per_child=1)
    try:
        for future in as_completed([pool.submit(run_variant, *item, ablation.flags, threads) for item in todo]):
            yield future.result()
    finally:
        # After an error or an interrupt no further run starts.
        pool.shutdown(wait=False, cancel_futures=True)
    shown = table(ablation)
    (ablation.folder / "ablation.md").write_text(shown + "\n", encoding="utf-8")
    yield shown


def run_folder(ablation: Ablation, name: str, seed: int) -> Path:
    """Where the result of one variant and seed goes."""
    plain = "".join(character if character.isalnum() else "_" for character in name)
    return ablation.folder / f"{plain}-{seed}"


def settings_of(ablation: Ablation, name: str, seed: int) -> dict[str, Any]:
    """The settings of one run, as text."""
    own = {"seed": str(seed), "output_dir": str(run_folder(ablation, name, seed))}
    return {**ablation.settings, **ablation.variants[name], **FIXED, **own}


def check_settings(name: str, settings: dict[str, Any], flags: list[str]) -> None:
    """Parse the settings of a variant as its run will.

    Raises:
        ConfigurationError: If one is wrong.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        try:
            parse_arguments([str(path), *flags])
        except ConfigurationError as error:
            raise ConfigurationError(f"variant {name}: {str(error).removeprefix(f'{path}: ')}") from error


def made_with(settings: dict[str, Any], flags: list[str]) -> dict[str, Any]:
    """What decides whether a result may be kept."""
    return {"settings": settings, "flags": flags}


def run_variant(folder: Path, settings: dict[str, Any], flags: list[str], threads: int) -> str:
    """Train and score one student, write the result, and say in one line what came out."""
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    names, texts, args = parse_arguments([str(folder / CONFIG), *flags])
    set_seed(args.seed)
    sides = (names.student_model_name_or_path, names.teacher_model_name_or_path)
    trust: dict[str, Any] = {"trust_remote_code": names.trust_remote_code}
    tokenizers = [load_tokenizer(name, **trust) for name in sides]
    splits = load_texts(texts, args.seed)
    student = load_causal_lm(sides[0], initialize=names.student_init == "random", **trust)
    teacher = load_causal_lm(sides[1], dtype=names.teacher_dtype, **trust) if args.has_teacher_losses() else None
    trainer = DistillationTrainer(
        student,
        teacher,
        args,
        train_dataset=splits["train"],
        processing_class=tokenizers[0],
        teacher_processing_class=tokenizers[1],
    )
    start = time.perf_counter()
    trainer.train()
    seconds = (time.perf_counter() - start) / trainer.state.max_steps
    test, _ = prepare_dataset(splits["test"], *tokenizers, max_length=args.max_length)
    figures = {**score(trainer, list(test), args), "seconds_per_step": seconds}
    # Last and whole, so that a run that was stopped is run again.
    scratch = folder / f"{RESULT}.part"
    figures["made_with"] = made_with(settings, flags)
    scratch.write_text(json.dumps(figures, indent=2), encoding="utf-8")
    scratch.replace(folder / RESULT)
    return f"{folder.name:40} {figures['bits_per_byte']:.4f} bits per byte, {seconds:.3f} s per step"


def score(trainer: DistillationTrainer, windows: list[dict[str, Any]], args: DistillationArguments) -> dict[str, Any]:
    """Bits per byte of the student, and on every third batch of the teacher and of the student-aware teacher.

    None stands for a teacher that is not there.
    """
    collator = DistillationCollator(trainer.student_tokenizer, trainer.teacher_tokenizer)
    size = args.per_device_eval_batch_size
    batches = [collator(windows[start : start + size]) for start in range(0, len(windows), size)]
    student = trainer.distillation_model.causal_lm
    with evaluating(student):
        own = [score_logits(forward_logits(student, batch), batch) for batch in batches]
    figures: dict[str, Any] = {"bits_per_byte": _bits_per_byte(own), "teacher": None, "aware": None}
    if trainer.teacher is None:
        return figures
    plain, aware = [], []
    with evaluating(student, trainer.teacher.model):
        for batch in batches[::TEACHER_STRIDE]:
            logits = forward_logits(trainer.teacher.model, batch, "teacher")
            plain.append(score_logits(logits, batch, "teacher"))
            if trainer.teacher.num_experts:
                routed = trainer.route(batch)
                replace_at_anchors(logits, routed.logits, batch, routed.mask)
                aware.append(score_logits(logits, batch, "teacher"))
    return figures | {"teacher": _bits_per_byte(plain), "aware": _bits_per_byte(aware) if aware else None}


def _bits_per_byte(scores: list[dict[str, float]]) -> float:
    return bits_per_byte(math.fsum(item["nll"] for item in scores), sum(int(item["bytes"]) for item in scores))


def table(ablation: Ablation) -> str:
    """All results that are there as a Markdown table: means over seeds, and differences to the reference, paired."""
    found: dict[str, dict[int, dict]] = {}
    for name in ablation.variants:
        paths = {seed: run_folder(ablation, name, seed) / RESULT for seed in ablation.seeds}
        found[name] = {s: json.loads(path.read_text(encoding="utf-8")) for s, path in paths.items() if path.is_file()}
    lines = [
        f"| variant | seeds | bits per byte | sd | - {ablation.reference} | se | its teacher | s per step |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, results in found.items():
        if not results:
            continue
        values = [result["bits_per_byte"] for result in results.values()]
        against = found[ablation.reference]
        paired = [r["bits_per_byte"] - against[s]["bits_per_byte"] for s, r in results.items() if s in against]
        teachers: list[Any] = [result["aware"] or result["teacher"] for result in results.values()]
        cells = (
            name,
            str(len(values)),
            f"{statistics.mean(values):.4f}",
            f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-",
            f"{statistics.mean(paired):+.4f}" if paired else "-",
            f"{statistics.stdev(paired) / len(paired) ** 0.5:.4f}" if len(paired) > 1 else "-",
            "-" if None in teachers else f"{statistics.mean(teachers):.4f}",
            f"{statistics.median(result['seconds_per_step'] for result in results.values()):.3f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
