"""Student-aware distillation of a Mixture-of-Experts language model into a small dense one."""

from distill_trainer.alignment import VocabularyProjection, anchor_pairs
from distill_trainer.arguments import DistillationArguments
from distill_trainer.callbacks import LossWeightScheduleCallback, TemperatureScheduleCallback, TopKScheduleCallback
from distill_trainer.data import DistillationCollator
from distill_trainer.errors import DistillationError
from distill_trainer.evaluation import evaluate_models
from distill_trainer.export import export_student
from distill_trainer.input_arguments import DataArguments, ModelArguments
from distill_trainer.losses import attention_loss, contrastive_loss, feature_loss, kl_divergence_loss, layerwise_loss
from distill_trainer.modeling import DistillationModel
from distill_trainer.router import StudentAwareRouter
from distill_trainer.trainer import DistillationTrainer

__all__ = [
    "DataArguments",
    "DistillationArguments",
    "DistillationCollator",
    "DistillationError",
    "DistillationModel",
    "DistillationTrainer",
    "LossWeightScheduleCallback",
    "ModelArguments",
    "StudentAwareRouter",
    "TemperatureScheduleCallback",
    "TopKScheduleCallback",
    "VocabularyProjection",
    "anchor_pairs",
    "attention_loss",
    "contrastive_loss",
    "evaluate_models",
    "export_student",
    "feature_loss",
    "kl_divergence_loss",
    "layerwise_loss",
]
