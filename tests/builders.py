"""Small models, tokenizers, texts and batches, made from configurations and from what the package ships."""

import copy
import functools
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from distill_trainer.alignment import VocabularyProjection
from distill_trainer.anchors import Anchors
from distill_trainer.arguments import DistillationArguments
from distill_trainer.data import DistillationCollator, prepare_dataset
from distill_trainer.layer_plan import LayerPairs
from distill_trainer.logit_loss import LogitSettings
from distill_trainer.modeling import DistillationModel
from distill_trainer.routing import Routing
from distill_trainer.schedules import LOSS_NAMES, ScheduledValues
from distill_trainer.teacher import Teacher
from distill_trainer.trainer import DistillationTrainer

ASSETS = Path(__file__).parents[1] / "distill_trainer" / "demo_assets"
# Rows of the heads: the teacher's is padded past its tokenizer's 4096 tokens.
STUDENT_ROWS, TEACHER_ROWS = 2048, 4100
MAX_LENGTH = 16
TEXTS = [
    "The Congress of the United States shall provide for the common defence and the general welfare of the people.",
    "In the year 1862 the war had cost 1,000,000 dollars a day, and no end was near.",
    "A short one, at last.",
    "Peace with all nations has been our wish; commerce with them our interest; honesty towards them our duty.",
    "It is with great satisfaction that I report the condition of the Treasury, which has never been better than now.",
]
SHAPE = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": TEACHER_ROWS,
    # Weights this large make beliefs that differ from token to token.
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
    "num_experts_per_tok": 2,
}
LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
}
FAMILIES = {
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {
            "head_dim": 16,
            "intermediate_size": 64,
            "moe_intermediate_size": 32,
            "num_experts": 4,
            "norm_topk_prob": True,
        },
    ),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"intermediate_size": 32, "num_local_experts": 4}),
    "qwen2_moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        {
            "intermediate_size": 64,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "num_experts": 4,
            "norm_topk_prob": False,
        },
    ),
    "olmoe": (
        OlmoeForCausalLM,
        OlmoeConfig,
        {"intermediate_size": 32, "num_experts": 4, "norm_topk_prob": False},
    ),
    "deepseek_v2": (
        DeepseekV2ForCausalLM,
        DeepseekV2Config,
        LATENT_ATTENTION | {"n_group": None, "topk_group": None, "topk_method": "greedy"},
    ),
    # Chooses by sigmoids plus a bias, among the experts of the better groups; weighs by the sigmoids alone.
    "deepseek_v3": (DeepseekV3ForCausalLM, DeepseekV3Config, LATENT_ATTENTION | {"n_group": 2, "topk_group": 1}),
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig,
        {
            "head_dim": 16,
            "intermediate_size": 32,
            "num_local_experts": 4,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "granitemoe": (
        GraniteMoeForCausalLM,
        GraniteMoeConfig,
        {
            "intermediate_size": 32,
            "num_local_experts": 4,
            "residual_multiplier": 0.7,
            "logits_scaling": 3.0,
            "embedding_multiplier": 2.0,
            "attention_multiplier": 0.3,
        },
    ),
}


@functools.cache
def tokenizer(side: str, padding_side: str = "right") -> PreTrainedTokenizerBase:
    """The tokenizer of the `student` or the `teacher`."""
    loaded = AutoTokenizer.from_pretrained(ASSETS / side)
    loaded.padding_side = padding_side
    return loaded


def tiny_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    """A dense model with the student's vocabulary."""
    torch.manual_seed(seed)
    shape = SHAPE | {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": STUDENT_ROWS}
    shape.pop("num_experts_per_tok")
    return LlamaForCausalLM(LlamaConfig(**(shape | {"initializer_range": 0.05} | changes)))


def tiny_gpt2(side: str = "student", positions: int = 64) -> GPT2LMHeadModel:
    """A dense model whose positions are learned, with the vocabulary of one side."""
    torch.manual_seed(2)
    rows = {"student": STUDENT_ROWS, "teacher": TEACHER_ROWS}[side]
    shape = {"vocab_size": rows, "n_positions": positions, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()


def tiny_moe(family: str = "qwen3_moe", seed: int = 1, **changes) -> PreTrainedModel:
    """A mixture of 4 experts, 2 per token, with the teacher's vocabulary."""
    model_class, config_class, own = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**(SHAPE | own | changes))).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        # Biases that start at zero would hide what they do.
        if name.endswith(("correction_bias", "router.bias", "proj_bias")):
            torch.nn.init.normal_(tensor, std=0.1)
    return model


@functools.cache
def projection(teacher_rows: int = TEACHER_ROWS) -> VocabularyProjection:
    """From the teacher's vocabulary to the student's."""
    return VocabularyProjection.from_tokenizers(tokenizer("teacher"), tokenizer("student"), teacher_rows, STUDENT_ROWS)


def tiny_teacher(family: str = "qwen3_moe", **changes) -> Teacher:
    """A `Teacher` over `tiny_moe`."""
    return Teacher(tiny_moe(family, **changes), copy.deepcopy(projection()))


@functools.cache
def windows(student_side: str = "student", teacher_side: str = "teacher") -> Dataset:
    """Prepared windows of `TEXTS`, of different lengths. With exchanged sides, student tokens span teacher tokens."""
    sides = tokenizer(student_side), tokenizer(teacher_side)
    return prepare_dataset(Dataset.from_dict({"text": TEXTS}), *sides, max_length=MAX_LENGTH)[0]


def collated(
    rows: int = 4, *, padding_side: str = "right", sides: tuple[str, str] = ("student", "teacher")
) -> dict[str, torch.Tensor]:
    """A batch of the first windows."""
    collator = DistillationCollator(*(tokenizer(side, padding_side) for side in sides))
    return collator(list(windows(*sides).select(range(rows))))


SAME = ("student", "student")
EXCHANGED = ("teacher", "student")


def every_position(input_ids: torch.Tensor) -> tuple[dict[str, torch.Tensor], Anchors]:
    """A batch and anchors in which all of the teacher's positions are anchors."""
    mask = torch.ones_like(input_ids, dtype=torch.bool)
    positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    batch = {
        "input_ids": input_ids,
        "student_positions": positions,
        "teacher_input_ids": input_ids,
        "teacher_attention_mask": mask.long(),
        "teacher_positions": positions,
        "anchor_mask": mask,
    }
    flat = positions.reshape(-1)
    return batch, Anchors(mask, mask.nonzero()[:, 0], flat, flat, mask.reshape(-1))


ALL = frozenset(LOSS_NAMES)
NO_LOSSES: frozenset[str] = frozenset()


def distillation_model(teacher, student=None, seed=5, layers=None, **changes):
    """A small student with a router that is away from the teacher's gate; `changes` are of `LogitSettings`.

    `layers` are those of the teacher that the feature and the attention loss compare; None is the last.
    """
    student = student or tiny_llama()
    config = teacher.model.config
    pairs = LayerPairs.plan(
        student.config.num_hidden_layers,
        config.num_hidden_layers,
        layer_map="uniform",
        feature_layers=layers,
        attention_layers=layers,
    )
    torch.manual_seed(seed)
    routing = Routing(teacher.gate_rows(), student.config.hidden_size) if teacher.num_experts else None
    model = DistillationModel(
        student,
        routing=routing,
        teacher_hidden_size=config.hidden_size,
        pairs=pairs,
        contrastive=True,
        logits=LogitSettings(**changes),
    )
    if routing is not None:
        # Away from the teacher's own gate, so that re-routing changes something.
        for router in routing.routers.values():
            torch.nn.init.normal_(router.query.weight, std=0.3)
    return model


def last_router(model):
    """The router of the highest re-routed layer."""
    return list(model.routing.routers.values())[-1]


def weights_of(losses):
    """Weight 1 for some losses, 0 for the others."""
    return {name: float(name in losses) for name in LOSS_NAMES}


def run(model, teacher, batch, losses=ALL, **changes):
    """What the model makes of a batch, with weight 1 for some losses or with `weights`."""
    values = changes.pop("values", None) or scheduled()
    weights = changes.pop("weights", None) or weights_of(losses)
    anchors = Anchors.of(batch)
    output = teacher(batch, anchors, **model.tapped_layers(weights, side=1))
    return model(**batch, weights=weights, teacher=teacher, teacher_output=output, values=values, **changes)


def random_ids(seed: int = 0, batch_size: int = 2, length: int = 9, vocab_size: int = 2000) -> torch.Tensor:
    """Token ids, `(batch_size, length)`."""
    return torch.randint(1, vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def scheduled(**changes) -> ScheduledValues:
    """Values of some step in the middle of a run."""
    return ScheduledValues(**({"temperature": 2.0, "top_k": 2} | changes))


def arguments(output_dir, **changes) -> DistillationArguments:
    """Settings of a run of a few steps with all losses from the start."""
    defaults = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "router_learning_rate": 2e-2,
        "router_interval": 1,
        "feature_weight": 0.1,
        "attention_weight": 0.1,
        "layerwise_weight": 0.05,
        "initial_top_k": 1,
        "final_top_k": 2,
        "max_length": MAX_LENGTH,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }
    return DistillationArguments(**(defaults | changes))


def tiny_trainer(
    output_dir, *, student=None, teacher="qwen3_moe", callbacks=None, rows=10, **changes
) -> DistillationTrainer:
    """A trainer over the first windows, again and again; `teacher` is a family, a model or None."""
    texts = windows()
    return DistillationTrainer(
        tiny_llama() if student is None else student,
        tiny_moe(teacher) if isinstance(teacher, str) else teacher,
        arguments(output_dir, **changes),
        train_dataset=texts.select(row % len(texts) for row in range(rows)),
        eval_dataset=windows().select(range(5)),
        processing_class=tokenizer("student"),
        teacher_processing_class=tokenizer("teacher"),
        callbacks=callbacks,
    )


def logged(trainer: DistillationTrainer, name: str) -> list[float]:
    """The values of one metric in the order in which they were logged."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
