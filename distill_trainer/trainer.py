"""`DistillationTrainer`: a Hugging Face `Trainer` whose loss teaches a student from a Mixture-of-Experts teacher."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from distill_trainer.anchors import IGNORE_INDEX, Anchors
from distill_trainer.arguments import DistillationArguments
from distill_trainer.assembly import build_model, build_teacher, scheduled_top_k
from distill_trainer.callbacks import training_schedules
from distill_trainer.checkpoint import load_modules, save_arguments, save_modules
from distill_trainer.curriculum import TEACHER_LOSS, CurriculumSampler, check_curriculum, with_teacher_losses
from distill_trainer.data import DistillationCollator, empty_stream_told, prepare_dataset
from distill_trainer.early_stopping import ResumableEarlyStoppingCallback
from distill_trainer.errors import ConfigurationError, DistillationError
from distill_trainer.hub import check_access, push_student
from distill_trainer.loading import check_positions, learned_positions, resolve
from distill_trainer.modeling import STUDENT_PREFIX, DistillationModel, RoutedBatch
from distill_trainer.router import routing_objective
from distill_trainer.schedules import LOGIT_LOSSES, ScheduledValues, effective_logit_weights
from distill_trainer.scoring import bits_per_byte_metrics, scored_labels
from distill_trainer.step_record import StepCallback, StepRecord
from distill_trainer.teacher import Teacher

logger = logging.get_logger(__name__)


class DistillationTrainer(Trainer):
    """Train a student on text while a frozen teacher of any tokenizer teaches it.

    Args:
        model: The student, a model or a name or path. Trained in place; `trainer.student` is it.
        teacher_model: The teacher, likewise. None trains on the text alone, for which only `lm_weight` may be above 0.
        args: All settings.
        train_dataset: Documents with a `text` column, or the columns of `prepare_dataset`.
        eval_dataset: Likewise; scored in bits per byte.
        processing_class: The student's tokenizer. None loads it from the student's name.
        teacher_processing_class: The teacher's tokenizer. None loads it from the teacher's name.
        **kwargs: Passed to `Trainer`, such as `callbacks`.

    Raises:
        ConfigurationError: If a setting does not fit the models.
        UnsupportedModelError: If a model cannot be loaded or read.
        TokenizerError: If the tokenizers cannot be aligned.
    """

    # compute_loss divides by the items of the whole batch itself, so training_step must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | str,
        teacher_model: PreTrainedModel | str | None,
        args: DistillationArguments,
        *,
        train_dataset=None,
        eval_dataset=None,
        processing_class: PreTrainedTokenizerBase | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ):
        if args.n_gpu > 1:
            raise ConfigurationError("One process cannot drive several GPUs. Start with `accelerate launch`.")
        if args.device.type == "cpu":
            args.dataloader_pin_memory = False
        student, processing_class = resolve(model, processing_class, "processing_class")
        if teacher_model is None:
            # Text alone: the windows are still cut by a teacher's tokenizer, if one is given.
            teacher_processing_class = teacher_processing_class or processing_class
        else:
            teacher_model, teacher_processing_class = resolve(
                teacher_model, teacher_processing_class, "teacher_processing_class"
            )
        self.values = ScheduledValues(temperature=args.temperature, router_temperature=args.router_temperature)
        self.student_tokenizer, self.teacher_tokenizer = processing_class, teacher_processing_class
        self.data_statistics: dict[str, dict] = {}
        self.teacher: Teacher | None = None
        if args.has_teacher_losses():
            if teacher_model is None:
                raise ConfigurationError("teacher_model must be given unless lm_weight is the only weight above 0.")
            self.teacher = build_teacher(teacher_model, student, teacher_processing_class, processing_class, args)
        check_curriculum(args.data_curriculum, train_dataset, self.teacher, gap_schedule=args.gap_schedule)
        train_dataset = self._prepared(train_dataset, "train", args, student)
        eval_dataset = self._prepared(eval_dataset, "eval", args, student)
        super().__init__(
            model=build_model(student, self.teacher, args),
            args=args,
            data_collator=DistillationCollator(processing_class, teacher_processing_class),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=bits_per_byte_metrics,
            **kwargs,
        )
        if args.loss_balancing == "gradient-norm" and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ConfigurationError("loss_balancing must be none or ema with FSDP or DeepSpeed, got gradient-norm.")
        if args.data_curriculum == TEACHER_LOSS and self.teacher is not None and train_dataset is not None:
            sides = (train_dataset, self.teacher, self.data_collator, self.accelerator)
            self.train_dataset = with_teacher_losses(*sides, batch_size=args.per_device_eval_batch_size)
        self.record = StepRecord(self.accelerator)
        self._add_schedules()

    @property
    def distillation_model(self) -> DistillationModel:
        """All that trains, without a distributed wrapper."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def student(self) -> nn.Module:
        """The bare student; a `PeftModel` with `use_peft`."""
        return self.distillation_model.student

    # Setting up

    def _prepared(self, dataset, name: str, args: DistillationArguments, student: PreTrainedModel):
        """The dataset with token and anchor columns, made from its text if it has only that."""
        if dataset is None or "input_ids" in (dataset.column_names or next(iter(dataset), ())):
            return dataset
        check_positions(student, args.max_length)
        dataset, self.data_statistics[name] = prepare_dataset(
            dataset,
            self.student_tokenizer,
            self.teacher_tokenizer,
            max_length=args.max_length,
            teacher_positions=learned_positions(self.teacher.model) if self.teacher else None,
            num_proc=args.dataloader_num_workers or None,
        )
        return dataset

    def _add_schedules(self) -> None:
        args = self.args
        start, end = scheduled_top_k(self.teacher, args)
        self.values.top_k = start
        schedules = training_schedules(
            self.values,
            top_k=(start, end),
            temperature=(args.temperature, args.final_temperature),
            router_temperature=(args.router_temperature, args.final_router_temperature),
            weights=args.loss_weights(),
            phase_boundaries=args.phase_boundaries,
            router_interval=args.router_interval,
            router_until=args.router_until,
        )
        running = self.distillation_model.gap, self.distillation_model.balance
        steps = StepCallback(self.record, *running, max_nonfinite_steps=args.max_nonfinite_steps)
        for callback in (*schedules, steps):
            self.add_callback(callback)
        if args.early_stopping_patience is not None:
            patience = args.early_stopping_patience, args.early_stopping_threshold
            self.add_callback(ResumableEarlyStoppingCallback(*patience))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """`optim` with one learning rate for the student and one for the rest, and no decay on norms and biases."""
        if getattr(self, "optimizer", None) is None:
            optimizer_cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            parameters = [(n, p) for n, p in (model or self.model).named_parameters() if p.requires_grad]
            groups = []
            for is_student, learning_rate in (
                (True, self.args.learning_rate),
                (False, self.args.router_learning_rate),
            ):
                for decays in (True, False):
                    chosen = [
                        p for n, p in parameters if (STUDENT_PREFIX in n) is is_student and (p.ndim > 1) is decays
                    ]
                    if chosen:
                        decay = self.args.weight_decay if decays else 0.0
                        groups.append({"params": chosen, "lr": learning_rate, "weight_decay": decay})
            self.optimizer = optimizer_cls(groups, **kwargs)
        return self.optimizer

    # Training

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Weighted sum of the losses of one micro-batch, a share of the mean over the accumulated batch."""
        args, weights, teacher_output = self.args, self.effective_weights(), None
        if self.teacher is not None:
            # Under no_grad: what the text looks like to the teacher with its own gate.
            tapped = self.distillation_model.tapped_layers(weights, side=1)
            teacher_output = self.teacher(inputs, Anchors.of(inputs), **tapped)
        # The student reads the text, the router mixes the teacher's experts for it, and the losses compare the two.
        outputs = model(
            **inputs,
            weights=weights,
            teacher=self.teacher,
            teacher_output=teacher_output,
            values=self.values,
            gradient_scale=self._gradient_scale(weights),
            num_items_in_batch=self._per_process(num_items_in_batch),
        )
        # KL and LM come weighted: one pass over the vocabulary forms their gradients together.
        others = [weights[name] * value for name, value in outputs["losses"].items() if name not in LOGIT_LOSSES]
        loss = outputs["logit_loss"] + sum(others)
        if outputs["router"]:
            loss = loss + routing_objective(
                outputs["router"],
                student_weight=args.router_student_weight,
                anchor_weight=args.router_anchor_weight,
                balance_weight=args.router_balance_weight,
                # On text of later passes the student would show what it remembers, not what it can.
                capacity_weight=float((self.state.epoch or 0) < 1),
            )
        if self.is_in_train:
            self.record.add(outputs)
        return (loss, outputs) if return_outputs else loss

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | None:
        """Clip the student's gradient, and apart from it that of router and projections; gives the student's norm.

        Together a large gradient of the router would shorten the student's step, which the router may not touch.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)  # they know their own shards only as a whole
        sides: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in model.named_parameters():
            sides[STUDENT_PREFIX in name].append(parameter)
        norm = self.accelerator.clip_grad_norm_(sides[True], self.args.max_grad_norm)
        # The accelerator has undone the scaling of fp16 for all of them, which it may do once only.
        torch.nn.utils.clip_grad_norm_(sides[False], self.args.max_grad_norm)
        return norm

    def effective_weights(self) -> dict[str, float]:
        """Weight of each loss now: of the current phase, KL and LM by the knowledge gap, and `loss_balancing`."""
        weights = dict(self.values.loss_weights or self.args.loss_weights())
        gap_ratio = self.distillation_model.gap.ratio() if self.args.gap_schedule else 1.0
        weights["kl"], weights["lm"] = effective_logit_weights(weights["kl"], self.args.lm_weight, gap_ratio)
        balance = self.distillation_model.balance
        return weights if balance is None else balance.balanced(weights)

    def _get_train_sampler(self, train_dataset=None):
        args = self.args
        if args.data_curriculum == "none":
            return super()._get_train_sampler(train_dataset)
        difficulties = torch.tensor(self.train_dataset.with_format(None)[args.data_curriculum][:])
        windows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        return CurriculumSampler(difficulties, lambda: self.state, windows_per_step=windows_per_step, seed=seed)

    def _gradient_scale(self, weights: dict[str, float]) -> float | None:
        """Factor at which to measure the losses' gradients in this step, that of fp16; None where they are not."""
        balance, scaler = self.distillation_model.balance, self.accelerator.scaler
        if balance is None or not self.is_in_train or not balance.is_due(self.state.global_step, weights):
            return None
        return 1.0 if scaler is None else scaler.get_scale()

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step; each is told how many anchors all of them have together."""
        with empty_stream_told():
            batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.teacher is not None and batch_samples:
            count = sum(len(Anchors.of(batch)) for batch in batch_samples)
            total = self.accelerator.reduce(torch.tensor(float(count), device=device), "sum").clamp(min=1)
            for batch in batch_samples:
                batch["num_anchors_in_batch"] = self._per_process(total)
        return batch_samples, num_items_in_batch

    def _per_process(self, count: Tensor | int | None) -> Tensor | float | None:
        """A count over all ranks as each rank divides by it, because DDP averages gradients over ranks."""
        return None if count is None else count / self.accelerator.num_processes

    # Watching

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report the Trainer's values with the means of ours since the last report and the scheduled values."""
        if "loss" in logs:
            logs = logs | {f"distill/{name}": value for name, value in self.record.means().items()}
            logs |= {f"distill/weight_{name}": weight for name, weight in self.effective_weights().items()}
            if self.teacher is not None:
                logs["distill/temperature"] = self.values.temperature
                logs["distill/gap_ratio"] = self.distillation_model.gap.ratio()
            if self.teacher is not None and self.teacher.num_experts:
                logs["distill/top_k"] = self.values.top_k
                logs["distill/router_temperature"] = self.values.router_temperature
        super().log(logs, start_time)

    # Evaluation

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss of the student alone on each window between its first and last anchor; independent of all schedules.

        Returns:
            None, `(batch_size, 3)` with nats, tokens and bytes of each window, and a filler for the labels.
        """
        inputs = self._prepare_inputs(inputs)
        labels = scored_labels(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            nats = model(**tokens, labels=labels)["row_nats"]
        counts = (labels != IGNORE_INDEX).sum(dim=1)
        rows = torch.stack([nats.double(), counts.double(), inputs["scored_bytes"].double()], dim=1)
        return None, rows, torch.zeros(len(rows), device=rows.device)

    @torch.no_grad()
    def route(self, batch: dict[str, Tensor]) -> RoutedBatch:
        """What the router chooses for a collated batch, and what the student-aware teacher then says."""
        inputs = self._prepare_inputs(dict(batch))
        output = self.teacher(inputs, Anchors.of(inputs), layers=self.teacher.routed.targets)
        return self.distillation_model.eval().route_batch(inputs, self.teacher, output, self.values)

    # Saving and loading

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            model, order = self.distillation_model, self.args.data_curriculum
            save_modules(folder, model, self.processing_class, state_dict, data_curriculum=order)
            save_arguments(folder, self.args)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        unwrapped = self.accelerator.unwrap_model(model or self.model)
        load_modules(Path(resume_from_checkpoint), unwrapped, data_curriculum=self.args.data_curriculum)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    # The Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Settle the repository's name, and fail now rather than after training if it cannot be written to."""
        self.hub_model_id = self.args.hub_model_id or Path(self.args.output_dir).resolve().name
        if self.is_world_process_zero():
            self.hub_model_id = check_access(self.hub_model_id, **self._hub_access(token))

    def push_to_hub(self, commit_message: str | None = None, token: str | None = None, **kwargs: Any) -> str | None:
        """Upload the bare student with its tokenizer, card and report to `hub_model_id`; the URL on the first process.

        Args:
            commit_message: First line of the commit.
            token: Token with write access. None takes `hub_token`.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        return self._push(self.args.output_dir, commit_message or "Upload the distilled student", token)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # A checkpoint of adapters holds no student that loads on its own.
        if self.args.hub_strategy != HubStrategy.END and not self.args.use_peft:
            try:
                self._push(checkpoint_folder, f"Training in progress, step {self.state.global_step}")
            except DistillationError as error:
                # The training is worth more than this upload, and its end pushes again.
                logger.warning(f"The training goes on, but step {self.state.global_step} was not pushed. {error}")

    def _push(self, folder: str, message: str, token: str | None = None) -> str | None:
        if not self.is_world_process_zero():
            return None
        return push_student(folder, self.hub_model_id, commit_message=message, **self._hub_access(token))

    def _hub_access(self, token: str | None) -> dict[str, Any]:
        args = self.args
        return {"token": token or args.hub_token, "private": args.hub_private_repo, "revision": args.hub_revision}
