"""The baseline of a run: the same student on the same batches, without a teacher."""

import copy
import os
from typing import Any

import torch
from transformers.trainer_utils import get_last_checkpoint

from distill_trainer.trainer import DistillationTrainer


def run_baseline(trainer: DistillationTrainer, student_before: torch.nn.Module) -> DistillationTrainer:
    """The trainer that has fine-tuned a second copy of the student without a teacher, in the run's folder `baseline`.

    Early stopping, where it is set, looks at the baseline's own evaluations.

    Args:
        trainer: Of the distillation.
        student_before: The student as it was before training. It is not changed.
    """
    folder = os.path.join(trainer.args.output_dir, "baseline")
    baseline = DistillationTrainer(
        copy.deepcopy(student_before),
        None,
        trainer.args.lm_only(folder),
        train_dataset=trainer.train_dataset,
        eval_dataset=trainer.eval_dataset,
        processing_class=trainer.student_tokenizer,
        teacher_processing_class=trainer.teacher_tokenizer,
    )
    resumed = trainer.args.resume_from_checkpoint and os.path.isdir(folder)
    baseline.train(resume_from_checkpoint=get_last_checkpoint(folder) if resumed else None)
    baseline.save_model(_internal_call=True)
    return baseline


def steps_of(trainer: DistillationTrainer, baseline: DistillationTrainer | None) -> dict[str, Any]:
    """The report's `steps`: how many were planned, after which each training ended, and which one is scored."""
    return {"planned": trainer.state.max_steps, "student": _steps(trainer), "baseline": baseline and _steps(baseline)}


def _steps(trainer: DistillationTrainer) -> dict[str, int]:
    state = trainer.state
    best = state.best_global_step if trainer.args.load_best_model_at_end else None
    return {"ended": state.global_step, "scored": best or state.global_step}
