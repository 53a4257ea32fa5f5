"""Distil a Mixture-of-Experts teacher into a student: `python run_distillation.py CONFIG.yaml [--field value ...]`."""

import copy
import errno
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from distill_trainer import DataArguments, DistillationArguments, DistillationTrainer, ModelArguments, evaluate_models
from distill_trainer.ablation import run_ablation
from distill_trainer.ablation_file import read_ablation
from distill_trainer.assembly import load_texts
from distill_trainer.baseline import run_baseline, steps_of
from distill_trainer.callbacks import check_reporters
from distill_trainer.card import write_model_card
from distill_trainer.checkpoint import check_checkpoint
from distill_trainer.errors import DistillationError
from distill_trainer.evaluation.benchmarks import Benchmarks, load_benchmarks
from distill_trainer.hub import CARD
from distill_trainer.loading import load_causal_lm, load_tokenizer
from distill_trainer.parsing import SETTINGS_FILE, parse_arguments, settings_text, training_settings
from distill_trainer.report import headline_table, write_report


def run(names: ModelArguments, texts: DataArguments, args: DistillationArguments, settings: dict[str, Any]) -> None:
    """Load, train, train the baseline, evaluate, report and push. `settings` are those that were given."""
    started = time.monotonic()
    check_reporters(args.report_to)
    if args.resume_from_checkpoint:
        check_checkpoint(Path(args.resume_from_checkpoint))
    benchmarks = load_benchmarks(args.lm_eval_tasks, args.lm_eval_include_path, args.lm_eval_limit)
    set_seed(args.seed)
    trust: dict[str, Any] = {"trust_remote_code": names.trust_remote_code}
    tokenizers = {
        "processing_class": load_tokenizer(names.student_model_name_or_path, **trust),
        "teacher_processing_class": load_tokenizer(names.teacher_model_name_or_path, **trust),
    }
    splits = load_texts(texts, args.seed)
    student = load_causal_lm(names.student_model_name_or_path, initialize=names.student_init == "random", **trust)
    teacher = load_causal_lm(names.teacher_model_name_or_path, dtype=names.teacher_dtype, **trust)
    student_before = copy.deepcopy(student)
    trainer = DistillationTrainer(
        student, teacher, args, train_dataset=splits["train"], eval_dataset=splits["validation"], **tokenizers
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.is_world_process_zero():
        discard_results(args.output_dir)
    trainer.save_model(_internal_call=True)
    baseline = run_baseline(trainer, student_before) if args.run_baseline else None
    if trainer.is_world_process_zero():
        report: dict[str, Any] = {}
        if not args.skip_eval:
            test = list(splits["test"]["text"])
            report = evaluate(trainer, names, texts, student_before, baseline, test, benchmarks, started)
            report["environment"] |= {"processes": args.world_size, "settings": settings}
            page = write_report(
                report,
                trainer.state.log_history,
                args.output_dir,
                baseline_log_history=baseline.state.log_history if baseline else None,
                phases=args.phase_boundaries,
            )
            print(f"\n{headline_table(report)}\n\nReport: {page}")
        Path(args.output_dir, SETTINGS_FILE).write_text(settings_text(settings), encoding="utf-8")
        write_model_card(
            args.output_dir,
            report,
            student_name=names.student_model_name_or_path,
            teacher_name=names.teacher_model_name_or_path,
            datasets=texts.datasets,
        )
    if args.push_to_hub and (url := trainer.push_to_hub()):
        print(f"Pushed to {url}")


def discard_results(folder: str | Path) -> None:
    """Remove what an earlier run into `folder` says of its student: it must not stand beside another one."""
    for name in (CARD, SETTINGS_FILE):
        Path(folder, name).unlink(missing_ok=True)
    shutil.rmtree(Path(folder, "report"), ignore_errors=True)


def evaluate(
    trainer: DistillationTrainer,
    names: ModelArguments,
    texts: DataArguments,
    student_before: torch.nn.Module,
    baseline: DistillationTrainer | None,
    test: list[str],
    benchmarks: Benchmarks | None,
    started: float,
) -> dict:
    """The report's figures on documents that neither training nor model selection has seen."""
    args = trainer.args
    trained = trainer.data_statistics.get("train") or {}
    return evaluate_models(
        student=args.output_dir,
        teacher=trainer.teacher.model if trainer.teacher else names.teacher_model_name_or_path,
        student_tokenizer=trainer.student_tokenizer,
        teacher_tokenizer=trainer.teacher_tokenizer,
        texts=test,
        max_length=args.max_length,
        stride=args.eval_stride,
        batch_size=args.per_device_eval_batch_size,
        student_before=student_before,
        baseline=baseline.args.output_dir if baseline else None,
        route=trainer.route if trainer.teacher and trainer.teacher.num_experts else None,
        benchmarks=benchmarks,
        statistics={"datasets": texts.datasets, "steps": steps_of(trainer, baseline)}
        | {name: trained.get(name) for name in ("anchor_fraction", "dropped")}
        | {f"train_{name}": trained.get(name) for name in ("documents", "bytes")},
        names={"student": args.output_dir, "teacher": names.teacher_model_name_or_path},
        seconds=time.monotonic() - started,
    )


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, 130 if interrupted, or 2 with one line on standard error for what the user can mend."""
    code = 2
    try:
        if ablation := read_ablation(arguments):
            for line in run_ablation(ablation):
                print(line, flush=True)
        else:
            run(*parse_arguments(arguments), training_settings(arguments))
        return 0
    except DistillationError as error:
        message = str(error)
    except torch.OutOfMemoryError:
        message = "The GPU is out of memory. Lower per_device_train_batch_size or max_length."
    except KeyboardInterrupt:
        code, message = 130, "interrupted. An ablation goes on with the same command, a run with --resume CHECKPOINT."
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = f"The disk is full: {error}. Free some space, or set save_total_limit."
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
