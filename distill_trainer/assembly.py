"""The texts, the teacher and the trained model of a run, put together from its settings."""

from dataclasses import fields
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from distill_trainer.alignment import VocabularyProjection
from distill_trainer.arguments import DistillationArguments
from distill_trainer.documents import load_splits
from distill_trainer.errors import ConfigurationError
from distill_trainer.input_arguments import DataArguments
from distill_trainer.layer_plan import LayerPairs
from distill_trainer.loading import with_adapters
from distill_trainer.logit_loss import LogitSettings
from distill_trainer.modeling import DistillationModel
from distill_trainer.routing import Routing
from distill_trainer.taps import check_attention
from distill_trainer.teacher import Teacher

logger = logging.get_logger(__name__)


def load_texts(texts: DataArguments, seed: int) -> dict[str, Any]:
    """The documents of a run by split: `train`, `validation` and `test`; see `load_splits`."""
    return load_splits(
        texts.datasets,
        dataset_weights=texts.dataset_weights,
        text_column=texts.text_column,
        dataset_subset_size=texts.dataset_subset_size,
        validation_fraction=texts.validation_fraction,
        streaming=texts.streaming,
        seed=seed,
    )


def build_teacher(
    model: PreTrainedModel,
    student: PreTrainedModel,
    teacher_tokenizer: PreTrainedTokenizerBase,
    student_tokenizer: PreTrainedTokenizerBase,
    args: DistillationArguments,
) -> Teacher:
    """The frozen teacher on the run's device, after it has passed its check.

    Raises:
        UnsupportedModelError: If it cannot be read or re-routed.
        TokenizerError: If the tokenizers cannot be aligned.
        ConfigurationError: If `router_layers` does not fit its layers.
    """
    projection = VocabularyProjection.from_tokenizers(
        teacher_tokenizer,
        student_tokenizer,
        model.get_output_embeddings().weight.shape[0],
        student.get_output_embeddings().weight.shape[0],
    )
    # Before transformers 5.20 it goes by its older name.
    checkpointing = getattr(args, "activation_checkpointing", False) or args.gradient_checkpointing
    teacher = Teacher(
        model.to(args.device),
        projection.to(args.device),
        use_router=args.use_router,
        router_layers=args.router_layers,
        checkpointing=bool(checkpointing),
    )
    if teacher.replayed and args.expert_sampling:
        raise ConfigurationError(
            f"expert_sampling must be 0 where layers above the routed one run again, got {args.expert_sampling}: the "
            "last layer of the teacher has no experts."
        )
    teacher.verify()
    return teacher


def scheduled_top_k(teacher: Teacher | None, args: DistillationArguments) -> tuple[int, int]:
    """Experts per token at the start and at the end of training; 1 without a router."""
    if teacher is None or not teacher.num_experts:
        return 1, 1
    own, limit = teacher.gate_top_k, teacher.num_experts
    start, end = args.initial_top_k or own, args.final_top_k or own
    if max(start, end) > limit:
        logger.warning(f"top_k is cut to {limit}, the number of the teacher's experts.")
    if end < own:
        logger.warning(
            f"The teacher's gate chooses {own} experts, final_top_k ends at {end}: what the others know is lost. "
            "Leave initial_top_k and final_top_k out to keep it."
        )
    return min(start, limit), min(end, limit)


def build_model(student: PreTrainedModel, teacher: Teacher | None, args: DistillationArguments) -> DistillationModel:
    """The student with everything that trains beside it.

    Raises:
        ConfigurationError: If a setting names layers that do not exist, or that nothing compares.
        UnsupportedModelError: If the attention loss has a weight and a model's attention cannot be read.
    """
    pairs, routing, width = LayerPairs(), None, 0
    if teacher is not None:
        pairs = LayerPairs.plan(
            student.config.num_hidden_layers,
            teacher.model.config.num_hidden_layers,
            layer_map=args.layer_map,
            feature_layers=args.feature_layers,
            attention_layers=args.attention_layers,
        ).used_by(args.loss_weights())
        width = teacher.model.config.hidden_size
        _check_targets(teacher, pairs)
        for model in (student, teacher.model) if pairs.attention else ():
            check_attention(model)
        if teacher.num_experts:
            routing = Routing(
                teacher.gate_rows(),
                student.config.hidden_size,
                parts=args.router_parts,
                num_samples=args.expert_sampling,
            )
    if args.use_peft:
        student = with_adapters(
            student,
            r=args.lora_r,
            alpha=args.lora_alpha,
            dropout=args.lora_dropout,
            target_modules=args.lora_target_modules,
        )
    return DistillationModel(
        student,
        routing=routing,
        teacher_hidden_size=width,
        pairs=pairs,
        contrastive=args.contrastive_weight > 0,
        logits=LogitSettings(**{field.name: getattr(args, field.name) for field in fields(LogitSettings)}),
        loss_balancing=args.loss_balancing,
    )


def _check_targets(teacher: Teacher, pairs: LayerPairs) -> None:
    """Raise unless every layer that is re-routed as a target is one that a loss compares."""
    compared = {layer for _, layer in pairs.feature + pairs.layerwise}
    for layer in teacher.routed.targets:
        if layer not in compared:
            raise ConfigurationError(
                f"router_layers must list layers that the feature or layer-wise loss compares, got {layer}. "
                "See feature_layers and layer_map."
            )
