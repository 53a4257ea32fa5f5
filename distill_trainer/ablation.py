"""Ablations: a student for each variant of the settings and each seed, on the same text, scored on the same bytes."""

import json
import math
import os
import signal
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging

from distill_trainer.ablation_file import CONFIG, Ablation, check_settings, made_with, run_folder, settings_of
from distill_trainer.arguments import DistillationArguments
from distill_trainer.assembly import load_texts
from distill_trainer.data import DistillationCollator, prepare_dataset
from distill_trainer.errors import ConfigurationError, DistillationError
from distill_trainer.evaluation.agreement import replace_at_anchors
from distill_trainer.evaluation.measure import evaluating, forward_logits, score_logits
from distill_trainer.evaluation.metrics.bits_per_byte.bits_per_byte import bits_per_byte
from distill_trainer.loading import load_causal_lm, load_tokenizer
from distill_trainer.parsing import parse_arguments
from distill_trainer.trainer import DistillationTrainer

logger = logging.get_logger(__name__)

# The teacher reads this part of the batches, spread evenly: it costs more than the student, and differs less.
TEACHER_STRIDE = 3
RESULT = "result.json"
FIGURES = ("bits_per_byte", "teacher", "aware", "seconds_per_step")


class StepClock(TrainerCallback):
    """Seconds from the end of the first step to the end of the last: without what the first step starts."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())

    def mean(self) -> float | None:
        """The mean time of a step, since not all steps do the same. None if there were fewer than two."""
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1) if len(self.ends) > 1 else None


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
                todo.append((name, result.parent, settings))
            elif read_result(result)["made_with"] != made_with(settings, ablation.flags):
                raise ConfigurationError(
                    f"{result} was made with other settings. Give another output_dir, or delete it."
                )
    for _, folder, settings in todo:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    threads = max((os.cpu_count() or 1) // ablation.jobs, 1)
    pool = ThreadPoolExecutor(ablation.jobs)
    runs = [
        pool.submit(_in_a_process, name, folder, settings, ablation.flags, threads) for name, folder, settings in todo
    ]
    try:
        for future in as_completed(runs):
            yield future.result()
    except (KeyboardInterrupt, GeneratorExit):  # an interrupt that came while the caller had the line closes this
        pool.shutdown(wait=False, cancel_futures=True)
        while not all(run.done() for run in runs):
            for process in active_children():
                process.terminate()
            time.sleep(0.1)
        raise
    finally:
        # After an error no further run starts; those that are running end, and are kept.
        pool.shutdown(cancel_futures=True)
    shown = table(ablation)
    (ablation.folder / "ablation.md").write_text(shown + "\n", encoding="utf-8")
    yield shown


def _in_a_process(name: str, folder: Path, settings: dict[str, Any], flags: list[str], threads: int) -> str:
    """One run in a fresh process: no run sees another's random numbers, threads or memory.

    The keyboard's interrupt reaches the process too, which leaves it to the main process to end it.
    """
    ignoring: dict[str, Any] = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
    run = f"variant {name}, seed {settings['seed']}"
    with ProcessPoolExecutor(1, get_context("spawn"), **ignoring) as process:
        try:
            return process.submit(run_variant, folder, settings, flags, threads).result()
        except DistillationError as error:
            raise ConfigurationError(f"{run}: {error}") from error
        except BrokenProcessPool as error:
            raise ConfigurationError(
                f"{run}: its process was killed, as it is when memory runs out. Lower jobs, and run the same command "
                "again."
            ) from error


def read_result(path: Path) -> dict[str, Any]:
    """What a run wrote.

    Raises:
        ConfigurationError: If the file is damaged.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return {name: result[name] for name in (*FIGURES, "made_with")}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{path} is damaged. Delete it, and run the same command again.") from error


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
    trainer.remove_callback(PrinterCallback)
    clock = StepClock()
    trainer.add_callback(clock)
    trainer.train()
    test, _ = prepare_dataset(splits["test"], *tokenizers, max_length=args.max_length)
    figures = {**score(trainer, list(test), args), "seconds_per_step": clock.mean()}
    # Last and whole, so that a run that was stopped is run again.
    scratch = folder / f"{RESULT}.{os.getpid()}.part"
    figures["made_with"] = made_with(settings, flags)
    scratch.write_text(json.dumps(figures, indent=2), encoding="utf-8")
    scratch.replace(folder / RESULT)
    return f"{folder.name:40} {figures['bits_per_byte']:.4f} bits per byte"


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
        found[name] = {s: read_result(path) for s, path in paths.items() if path.is_file()}
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
        seconds = [result["seconds_per_step"] for result in results.values()]
        cells = (
            name,
            str(len(values)),
            f"{statistics.mean(values):.4f}",
            f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-",
            f"{statistics.mean(paired):+.4f}" if paired else "-",
            f"{statistics.stdev(paired) / len(paired) ** 0.5:.4f}" if len(paired) > 1 else "-",
            "-" if None in teachers else f"{statistics.mean(teachers):.4f}",
            "-" if None in seconds else f"{statistics.median(seconds):.3f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
