"""Held-out figures of student and teacher, on the same bytes of text."""

from distill_trainer.evaluation.compare import evaluate_models

__all__ = ["evaluate_models"]
