"""Settings of a run: three dataclasses that check their values, parsed from one file and command-line flags."""

import copy
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from transformers import TrainingArguments

from distill_trainer.balance import METHODS
from distill_trainer.errors import ConfigurationError
from distill_trainer.evaluation_arguments import EvaluationArguments
from distill_trainer.router import ROUTER_PARTS
from distill_trainer.schedules import DATA_CURRICULA, LOSS_NAMES, phase, phase_weights
from distill_trainer.validation import check_choice, check_flags, check_number, check_writable, is_number


@dataclass
class DistillationArguments(EvaluationArguments, TrainingArguments):
    """Training arguments of `DistillationTrainer`. The help text of each field is its documentation."""

    # Weights of the losses
    kl_weight: float = field(
        default=0.70,
        metadata={"help": "Weight of the KL from the teacher, 0 or above. 0 skips it.", "aliases": ["--alpha_kd"]},
    )
    feature_weight: float = field(
        default=0.0, metadata={"help": "Weight of matching the last hidden states, 0 or above. 0 skips it."}
    )
    attention_weight: float = field(
        default=0.0, metadata={"help": "Weight of matching attention rows, 0 or above. 0 skips it."}
    )
    layerwise_weight: float = field(
        default=0.0, metadata={"help": "Weight of matching the layers of layer_map, 0 or above. 0 skips it."}
    )
    contrastive_weight: float = field(
        default=0.05,
        metadata={
            "help": "Weight of the contrastive loss over hidden states (InfoNCE at temperature 0.07, at most 255 "
            "negatives from all ranks), 0 or above. 0 skips it."
        },
    )
    lm_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the next-token loss on the text, 0 or above. None: 1 - the KL weight of the step."
        },
    )
    gap_schedule: bool = field(
        default=True,
        metadata={
            "help": "Scale kl_weight down as the student's gap to the teacher closes in the first pass over the data."
        },
    )
    loss_balancing: str = field(
        default="none",
        metadata={
            "help": "none; ema: divide each loss by its running mean, so that a weight is a share; gradient-norm: by "
            "the running norm of its gradient. KL and LM count as one."
        },
    )
    phase_boundaries: list[float] = field(
        default_factory=lambda: [0.0, 0.0],
        metadata={
            "help": "Shares of the steps, 0 to 1, at which the attention and feature losses join KL and LM, and at "
            "which all join. 0 0: all train from the start, the layer-wise loss from the bottom up."
        },
    )

    # Logit distillation
    temperature: float = field(
        default=4.0, metadata={"help": "Softmax temperature of the KL at the start, above 0. Larger is softer."}
    )
    final_temperature: float = field(
        default=1.0, metadata={"help": "Softmax temperature of the KL at the end, above 0."}
    )
    kl_method: str = field(
        default="projected",
        metadata={"help": "How the two vocabularies are compared: projected, topk, uld, hybrid or alm."},
    )
    kl_top_k: int = field(
        default=64, metadata={"help": "Student tokens that kl_method topk tells apart, 1 or above; the rest is one."}
    )
    span_correction: bool = field(
        default=True,
        metadata={"help": "projected, topk: give a student token of several teacher tokens their joint probability."},
    )
    logit_chunk_mb: float | None = field(
        default=None,
        metadata={"help": "Megabytes of logits at once, above 0. None: a seventh of all logits, 200 to 500."},
    )
    kl_direction: str = field(
        default="forward",
        metadata={"help": "forward is KL(teacher || student), reverse KL(student || teacher), js Jensen-Shannon."},
    )
    gap_weighting: bool = field(
        default=False,
        metadata={
            "help": "Weigh the anchors of the KL by how far the student is from the teacher there: it learns more of "
            "what it lacks, and less in the mean."
        },
    )

    # Router over the teacher's experts
    use_router: bool = field(
        default=True,
        metadata={"help": "Mix the experts of a MoE teacher by the student-aware router, not by its gate."},
    )
    router_layers: str | list[str] = field(
        default_factory=lambda: "last",
        metadata={
            "help": "Layers with experts that the router changes: last, last:N, all (the layers above the lowest run "
            "twice), or a list of layers from 0 that serve the feature and layer-wise losses only, beside the last."
        },
    )
    router_parts: list[str] = field(
        default_factory=lambda: list(ROUTER_PARTS),
        metadata={
            "help": "What moves the router from the gate: importance (both models' states), capacity, gap, or none."
        },
    )
    expert_sampling: int = field(
        default=0,
        metadata={"help": "Draw so many sets of experts per anchor and average what the teacher says. 0: none."},
    )
    router_interval: int = field(
        default=4, metadata={"help": "The router learns in every so many steps, 1 or above; it always routes."}
    )
    router_until: float = field(
        default=1.0, metadata={"help": "Share of the steps in which the router learns, above 0 up to 1."}
    )
    initial_top_k: int | None = field(default=None, metadata={"help": "Experts per token at first. None: the gate's."})
    final_top_k: int | None = field(
        default=None, metadata={"help": "Experts per token at the end; at most all are used. None: the gate's."}
    )
    router_temperature: float = field(
        default=1.0, metadata={"help": "Softmax temperature of the router at the start."}
    )
    final_router_temperature: float = field(
        default=1.0, metadata={"help": "Softmax temperature of the router at the end."}
    )
    router_learning_rate: float = field(
        default=1e-4,
        metadata={"help": "Learning rate of router and projections, 0 or above.", "aliases": ["--router_lr"]},
    )
    router_student_weight: float = field(
        default=0.1, metadata={"help": "Router objective: weight of KL(student || student-aware teacher), 0 or above."}
    )
    router_anchor_weight: float = field(
        default=0.1,
        metadata={"help": "Router objective: what leaving the teacher's own gate costs at most (nats), 0 or above."},
    )
    router_balance_weight: float = field(
        default=0.01, metadata={"help": "Router objective: weight of the load balancing, 0 or above."}
    )

    # Layers
    feature_layers: list[int] | None = field(
        default=None, metadata={"help": "Teacher layers, from 0, of the feature loss. None: the last."}
    )
    attention_layers: list[int] | None = field(
        default=None, metadata={"help": "Teacher layers, from 0, of the attention loss. None: the last."}
    )
    # The parser keeps the default of a `str | list[str]` field only when it comes from a factory.
    layer_map: str | list[str] = field(
        default_factory=lambda: "uniform",
        metadata={"help": "Layers of the layer-wise loss: uniform, or pairs student:teacher from 0, as in 2:5 3:8."},
    )

    # Run
    max_length: int = field(default=512, metadata={"help": "Student tokens in a window, 2 or above."})
    data_curriculum: str = field(
        default="none",
        metadata={
            "help": "Windows that come first in the first pass over the data: none (any), length (short ones) or "
            "teacher_loss (those that the teacher finds easy; it reads all once beforehand)."
        },
    )
    max_nonfinite_steps: int = field(
        default=3, metadata={"help": "Stop after this many steps in a row with a NaN or infinite loss, 1 or above."}
    )

    # LoRA
    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters of the student, not its weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters, 1 or above."})
    lora_alpha: int = field(
        default=32, metadata={"help": "The adapters are scaled by lora_alpha / lora_r; 1 or above."}
    )
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapters, from 0 to below 1."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the layers that get adapters. None: all linear layers but the lm_head."},
    )

    # Fields of `TrainingArguments` with another default or name
    per_device_train_batch_size: int = field(
        default=4, metadata={"help": "Windows per device and micro-batch, 1 or above.", "aliases": ["--batch_size"]}
    )
    gradient_accumulation_steps: int = field(
        default=8, metadata={"help": "Micro-batches per optimizer step, 1 or above."}
    )
    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate of the student, 0 or above."})
    num_train_epochs: float = field(
        default=3.0, metadata={"help": "Passes over the text, above 0.", "aliases": ["--num_epochs", "--epochs"]}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Optimizer steps between logs; below 1 a share of all steps."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Log the last finite loss in place of a NaN or infinite one."}
    )
    dataloader_num_workers: int = field(
        default=0,
        metadata={"help": "Processes that prepare batches, 0 or above. 0: none.", "aliases": ["--num_workers"]},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: the teacher's columns are no inputs of the student."}
    )
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "Columns of a batch that hold labels."}
    )
    metric_for_best_model: str | None = field(
        default="eval_bits_per_byte", metadata={"help": "What load_best_model_at_end and early stopping compare."}
    )
    greater_is_better: bool | None = field(
        default=False, metadata={"help": "Whether a higher metric_for_best_model is better. Fewer bits are."}
    )
    report_to: str | list[str] = field(
        default_factory=lambda: "none",
        metadata={"help": "Where metrics go: none, all, or names as wandb tensorboard."},
    )
    project: str = field(
        default="huggingface",
        metadata={"help": "Project of the run in Weights & Biases or Trackio.", "aliases": ["--project_name"]},
    )
    hub_strategy: str = field(
        default="end",
        metadata={"help": "When push_to_hub uploads: end, or every_save for each checkpoint's student as well."},
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "Checkpoint folder that the run continues from.", "aliases": ["--resume"]}
    )

    def __post_init__(self) -> None:
        check_flags(self)
        super().__post_init__()
        if self.layer_map == ["uniform"]:
            self.layer_map = "uniform"
        self._check_weights()
        self.check_numbers()
        self._check_layers()
        self._check_router()
        self._check_logits()
        check_choice("data_curriculum", self.data_curriculum, DATA_CURRICULA)
        if self.data_curriculum != "none" and self.train_sampling_strategy != "random":
            strategy = self.train_sampling_strategy
            raise ConfigurationError(f"train_sampling_strategy must be random with data_curriculum, got {strategy}.")
        self.check_evaluation(max_length=self.max_length)
        self.check_best(
            load_best=self.load_best_model_at_end,
            metric=self.metric_for_best_model,
            greater_is_better=self.greater_is_better,
            eval_strategy=str(self.eval_strategy.value),
        )
        if self.remove_unused_columns:
            raise ConfigurationError(
                "remove_unused_columns must be false, got true. The teacher's columns are needed."
            )
        if self.fp16 and self.device.type == "cpu":
            raise ConfigurationError(
                "fp16 must be false without a GPU, got true. Leave it out, or set bf16 and use_cpu."
            )
        assert self.output_dir is not None  # TrainingArguments has set it
        check_writable(Path(self.output_dir))

    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss of `LOSS_NAMES` before any schedule; `lm` is `1 - kl_weight` where it is not set."""
        weights = {name: getattr(self, f"{name}_weight") for name in LOSS_NAMES}
        return weights if self.lm_weight is not None else {**weights, "lm": 1 - self.kl_weight}

    def has_teacher_losses(self) -> bool:
        """Whether any loss but `lm` has a weight, so that a teacher is needed."""
        return any(weight > 0 for name, weight in self.loss_weights().items() if name != "lm")

    def lm_only(self, output_dir: str) -> "DistillationArguments":
        """The same training on the text alone, for the baseline: same batches, steps and learning rate, no teacher."""
        twin = copy.copy(self)
        for name in LOSS_NAMES:
            setattr(twin, f"{name}_weight", 0.0)
        twin.lm_weight, twin.loss_balancing, twin.output_dir = 1.0, "none", output_dir
        twin.push_to_hub, twin.report_to, twin.run_baseline = False, [], False
        return twin

    def _check_weights(self) -> None:
        for name in (f"{name}_weight" for name in LOSS_NAMES):
            if name != "lm_weight" or self.lm_weight is not None:
                check_number(name, getattr(self, name), least=0)
        if self.lm_weight is None and self.kl_weight > 1:
            raise ConfigurationError(
                f"kl_weight must be at most 1 while lm_weight is 1 - kl_weight, got {self.kl_weight}. Set lm_weight."
            )
        check_choice("loss_balancing", self.loss_balancing, METHODS)
        if not any(self.loss_weights().values()):
            names = ", ".join(f"{name}_weight" for name in LOSS_NAMES)
            raise ConfigurationError(f"{names} must not all be 0, got 0 for each. Nothing would train.")

    def check_numbers(self) -> None:
        for name in ("temperature", "final_temperature", "router_temperature", "final_router_temperature"):
            check_number(name, getattr(self, name), above=0)
        weights = "router_student_weight", "router_anchor_weight", "router_balance_weight"
        for name in (*weights, "learning_rate", "router_learning_rate"):
            check_number(name, getattr(self, name), least=0)
        for name in ("dataloader_num_workers", "seed", "expert_sampling"):
            check_number(name, getattr(self, name), least=0, whole=True)
        sizes = "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"
        top_k = [name for name in ("initial_top_k", "final_top_k") if getattr(self, name) is not None]
        for name in (*sizes, *top_k, "router_interval", "kl_top_k", "max_nonfinite_steps", "lora_r", "lora_alpha"):
            check_number(name, getattr(self, name), least=1, whole=True)
        check_number("max_length", self.max_length, least=2, whole=True)
        check_number("num_train_epochs", self.num_train_epochs, above=0)
        if not is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ConfigurationError(f"lora_dropout must be from 0 to below 1, got {self.lora_dropout}.")
        bounds = self.phase_boundaries
        two = isinstance(bounds, list | tuple) and len(bounds) == 2 and all(map(is_number, bounds))
        if not two or not 0 <= bounds[0] <= bounds[1] <= 1:
            raise ConfigurationError(f"phase_boundaries must be two rising values from 0 to 1, got {bounds}.")
        losses = self.loss_weights()
        if not any(phase_weights(losses, phase(0.0, bounds)).values()):
            names = ", ".join(name for name, weight in losses.items() if weight)
            raise ConfigurationError(
                f"phase_boundaries must let a loss train from the start, got {bounds} with {names} alone. Set 0 0."
            )
        at_the_end = phase_weights(losses, phase(math.nextafter(1.0, 0.0), bounds))
        if never := [name for name, weight in losses.items() if weight and not at_the_end[name]]:
            raise ConfigurationError(
                f"phase_boundaries must be below 1 for {' and '.join(never)} to train at all, got {bounds}."
            )

    def _check_router(self) -> None:
        layers = self.router_layers
        if isinstance(layers, list) or str(layers).isdigit():
            self.router_layers = layers = [str(layer) for layer in (layers if isinstance(layers, list) else [layers])]
        if isinstance(layers, list) and len(layers) == 1 and not layers[0].isdigit():
            layers = self.router_layers = layers[0]
        named = isinstance(layers, list) and layers and all(re.fullmatch(r"\d+", layer) for layer in layers)
        named = named and len(set(map(int, layers))) == len(layers)
        if not named and not (isinstance(layers, str) and re.fullmatch(r"last|all|last:[1-9]\d*", layers)):
            raise ConfigurationError(
                f"router_layers must be last, last:N, all, or different layer numbers as in 1 3, got {layers}."
            )
        self.router_parts = [] if self.router_parts == ["none"] else self.router_parts
        if not isinstance(self.router_parts, list):
            raise ConfigurationError(f"router_parts must be a list of names, got {self.router_parts}.")
        for part in self.router_parts:
            if part == "none" or self.router_parts.count(part) > 1:
                raise ConfigurationError(
                    f"router_parts must be different names, or none alone, got {' '.join(self.router_parts)}."
                )
            check_choice("router_parts", part, (*ROUTER_PARTS, "none"))
        if self.expert_sampling and not self.use_router:
            raise ConfigurationError(
                f"expert_sampling must be 0 without use_router, got {self.expert_sampling}. To sample by the gate "
                "alone, set router_parts to none."
            )
        if self.expert_sampling and layers != "last":
            raise ConfigurationError(
                f"expert_sampling must be 0 unless router_layers is last, got {self.expert_sampling}. Several choices "
                "in several layers would run these layers once for each."
            )
        check_number("router_until", self.router_until, above=0)
        if self.router_until > 1:
            raise ConfigurationError(f"router_until must be above 0 and up to 1, got {self.router_until}.")

    def _check_logits(self) -> None:
        check_choice("kl_method", self.kl_method, ("projected", "topk", "uld", "hybrid", "alm"))
        check_choice("kl_direction", self.kl_direction, ("forward", "reverse", "js"))
        if self.kl_method == "uld" and self.kl_direction != "forward":
            raise ConfigurationError(
                f"kl_direction must be forward with kl_method uld, got {self.kl_direction}: it has no direction."
            )
        if self.logit_chunk_mb is not None:
            check_number("logit_chunk_mb", self.logit_chunk_mb, above=0)

    def _check_layers(self) -> None:
        for name in ("feature_layers", "attention_layers"):
            layers = getattr(self, name)
            if layers is not None and not (
                isinstance(layers, list | tuple)
                and all(is_number(layer, whole=True) and layer >= 0 for layer in layers)
                and 0 < len(layers) == len(set(layers))
            ):
                raise ConfigurationError(f"{name} must be different layer numbers, 0 or above, got {layers}.")
        if self.layer_map != "uniform":
            pairs = self.layer_map if isinstance(self.layer_map, list) else []
            found = [re.fullmatch(r"(\d+):(\d+)", str(pair)) for pair in pairs]
            if not all(found) or not 0 < len(found) == len({tuple(map(int, pair.groups())) for pair in found if pair}):
                raise ConfigurationError(
                    f"layer_map must be uniform or different pairs as 2:5 3:8, got {self.layer_map}."
                )
