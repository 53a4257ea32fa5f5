"""All that trains in one module: the student, the student-aware router and the projections to the teacher's width."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill_trainer.aligned import AnchorBatch, RoutedBatch
from distill_trainer.anchors import IGNORE_INDEX
from distill_trainer.balance import LossBalance, gradient_sizes, value_sizes
from distill_trainer.layer_plan import LayerPairs
from distill_trainer.logit_loss import LogitSettings, Survey
from distill_trainer.logit_pass import LogitPass
from distill_trainer.losses.attention import attention_loss
from distill_trainer.losses.contrastive import contrastive_loss, evenly_spaced
from distill_trainer.losses.feature import feature_loss
from distill_trainer.losses.layerwise import layerwise_loss
from distill_trainer.losses.logits import mean_belief
from distill_trainer.negatives import anchors_per_rank, last_tokens, of_other_ranks
from distill_trainer.router import KnowledgeGap
from distill_trainer.routing import Routing, router_losses, routing_metrics
from distill_trainer.schedules import LOGIT_LOSSES, ScheduledValues
from distill_trainer.taps import output_head, run_trunk
from distill_trainer.teacher import Teacher, TeacherOutput

STUDENT_PREFIX = "student."


class DistillationModel(nn.Module):
    """The student and everything that trains beside it; the model that the Trainer wraps.

    Args:
        student: The model to train, a `PeftModel` over one included.
        routing: The student-aware routers of the teacher's layers; None trains none.
        teacher_hidden_size: Width that student states are projected to.
        pairs: Layers to compare.
        contrastive: Make the projection of the contrastive loss.
        logits: How the logit losses compare the models.
        loss_balancing: How the losses are measured, see `LossBalance`; `none` does not measure them.
    """

    # Tells the Trainer to count the items of the whole accumulated batch.
    accepts_loss_kwargs = True

    def __init__(
        self,
        student: nn.Module,
        *,
        routing: Routing | None,
        teacher_hidden_size: int,
        pairs: LayerPairs,
        contrastive: bool,
        logits: LogitSettings | None = None,
        loss_balancing: str = "none",
    ):
        super().__init__()
        self.student = student
        self.pairs = pairs
        self.logit_settings = logits or LogitSettings()
        width = self.causal_lm.config.hidden_size
        self.routing = routing
        self.gap = KnowledgeGap()
        self.balance = None if loss_balancing == "none" else LossBalance(loss_balancing)

        def projections(count: int) -> nn.ModuleList:
            return nn.ModuleList(nn.Linear(width, teacher_hidden_size, bias=False) for _ in range(count))

        self.feature_projections = projections(len(pairs.feature))
        self.layerwise_projections = projections(len(pairs.layerwise))
        self.contrastive_projections = projections(int(contrastive))

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The student itself, under its PEFT wrapper if it has one."""
        return self.student.get_base_model() if hasattr(self.student, "peft_config") else self.student

    @property
    def config(self):
        """The student's configuration."""
        return self.causal_lm.config

    def activation_checkpointing_enable(self, **kwargs) -> None:
        """Recompute the student's activations in the backward pass."""
        self.causal_lm.activation_checkpointing_enable(**kwargs)

    def gradient_checkpointing_enable(self, **kwargs) -> None:
        """The older name of `activation_checkpointing_enable`, which transformers before 5.20 call."""
        self.causal_lm.gradient_checkpointing_enable(**kwargs)

    def extra_state_dict(self) -> dict[str, Tensor]:
        """All of the state that is not the student's."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith(STUDENT_PREFIX)}

    def forward(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        weights: dict[str, float] | None = None,
        teacher: Teacher | None = None,
        teacher_output: TeacherOutput | None = None,
        values: ScheduledValues | None = None,
        gradient_scale: float | None = None,
        **batch,
    ) -> dict[str, Any]:
        """Losses of a batch.

        Args:
            input_ids: Student tokens, `(batch_size, sequence_length)`.
            attention_mask: 1 at real tokens, same shape.
            labels: `input_ids`, -100 where a token is not predicted, same shape. The shift happens here.
            weights: Weight of each loss; those of 0 are not computed. None gives the summed cross-entropy of each row,
                `(batch_size,)`, as `row_nats`, and nothing else.
            teacher: The frozen teacher, for re-routing.
            teacher_output: What it computed. None skips all losses but `lm`.
            values: Temperatures, top-k and unlocked fraction.
            gradient_scale: Measure the losses' gradients for their balance, see `gradient_sizes`. None does not.
            **batch: The rest of the collated batch, `num_items_in_batch` (tokens that the accumulated batch predicts)
                and `num_anchors_in_batch` (its anchors).

        Returns:
            `logit_loss`: the weighted sum of KL, LM and the router's share of the logits, whose gradients are formed
            together. `losses`: all by name and unweighted, `kl` and `lm` detached. `router`: the parts of the router's
            objective and `anchor_kl`, of which `ce`, `student_kl` and `anchor_kl` are detached; empty without one.
            `metrics`: detached. Everything is a share of a mean over the whole accumulated batch. `sizes`: of the
            losses, by `value_sizes` or `gradient_sizes`; none of `lm` alone.
        """
        losses = frozenset(name for name, weight in (weights or {}).items() if weight > 0)
        tapped = {} if teacher_output is None else self.tapped_layers(weights, side=0)
        by_gradient = gradient_scale is not None
        trunk = run_trunk(self.causal_lm, input_ids, attention_mask, **tapped, embeddings=by_gradient)
        logits = self._logit_pass(teacher, input_ids)
        num_items, num_anchors = batch.get("num_items_in_batch"), batch.get("num_anchors_in_batch")
        if teacher_output is None:
            predicted = labels[:, 1:] != IGNORE_INDEX
            states, targets = trunk.last_hidden_state[:, :-1][predicted], labels[:, 1:][predicted]
            if weights is None:
                nats = -logits.token_logprobs(logits.head, states, targets)
                return {"row_nats": nats.new_zeros(len(labels)).index_add(0, predicted.nonzero()[:, 0], nats)}
            lm = logits.text_loss(states, targets, num_items=num_items)
            return {"logit_loss": weights["lm"] * lm, "losses": {"lm": lm.detach()}, "router": {}, "metrics": {}}

        batch |= {"input_ids": input_ids, "labels": labels}
        at = AnchorBatch.of(batch, trunk, teacher_output, num_items=num_items, num_anchors=num_anchors)
        survey = logits.survey(at, routes=self.routing is not None)
        routed = self.route(at, survey, teacher, values)
        weigh_logits = partial(logits.losses, at, routed, survey, weights=weights, temperature=values.temperature)
        logit_loss, parts = weigh_logits()
        state_losses = self._state_losses(at, routed, losses, values.unlocked_fraction)
        learnable = state_losses.pop("student_feature", None)
        if "attention" in losses:
            state_losses["attention"] = self._attention_loss(at, attention_mask, batch)
        if "contrastive" in losses:
            state_losses["contrastive"] = self._contrastive_loss(at, routed, input_ids, attention_mask)
        router = {}
        if self.routing is not None:
            # The student's side is detached in all of them.
            router = {name: parts[name] for name in ("ce", "student_kl")} | router_losses(at, routed, survey)
            router |= {} if learnable is None else {"student_feature": learnable}
        named = {name: parts[name] for name in LOGIT_LOSSES if name in losses} | state_losses
        sizes: dict[str, Tensor] = {}
        if by_gradient:
            # In a pass of its own, because the gradient of one can be read only once.
            sizes = gradient_sizes(state_losses, weigh_logits()[0], weights, trunk.embeddings, scale=gradient_scale)
        elif self.balance is not None and self.balance.method == "ema":
            sizes = value_sizes(named, weights)
        return {
            "logit_loss": logit_loss,
            "losses": named,
            "router": router,
            "metrics": self._metrics(at, routed, parts),
            "sizes": sizes,
        }

    def tapped_layers(self, weights: Mapping[str, float], side: int) -> dict[str, tuple[int, ...]]:
        """Layers that the losses with a weight need, of the student (side 0) or the teacher (side 1)."""
        used = self.pairs.used_by(weights)
        return {
            "layers": tuple(sorted({pair[side] for pair in used.feature + used.layerwise})),
            "attention_layers": tuple(sorted({pair[side] for pair in used.attention})),
        }

    def route(self, at: AnchorBatch, survey: Survey, teacher: Teacher, values: ScheduledValues) -> RoutedBatch:
        """Let the router choose at every anchor, and give what the teacher then holds.

        Without a router it is the teacher as it is.
        """
        if self.routing is None:
            return RoutedBatch(at.teacher.residual, at.teacher.hidden_states, survey.gap, at.teacher.anchors.mask)
        return self.routing(at, survey, teacher, values)

    def route_batch(
        self, batch: dict[str, Tensor], teacher: Teacher, teacher_output: TeacherOutput, values: ScheduledValues
    ) -> RoutedBatch:
        """`route` for a collated batch on its own, with the logits, to look at what the router does."""
        trunk = run_trunk(self.causal_lm, batch["input_ids"], batch["attention_mask"])
        at = AnchorBatch.of(batch, trunk, teacher_output)
        survey = self._logit_pass(teacher, batch["input_ids"]).survey(at)
        routed = self.route(at, survey, teacher, values)
        logits = teacher.head(routed.hidden_states)
        return replace(routed, logits=logits if logits.ndim == 2 else mean_belief(logits))

    def _logit_pass(self, teacher: Teacher | None, input_ids: Tensor) -> LogitPass:
        head = output_head(self.causal_lm)
        return LogitPass(self.logit_settings, head, teacher, num_positions=input_ids.numel())

    def _state_losses(
        self, at: AnchorBatch, routed: RoutedBatch, losses: frozenset[str], unlocked_fraction: float
    ) -> dict[str, Tensor]:
        """Feature and layer-wise loss: the student's projected states against the teacher's.

        And `student_feature`, if layers are re-routed as targets: how far these are from what the student holds.
        """
        result, distances = {}, []

        def projected(pairs, projections) -> tuple[list[Tensor], list[Tensor]]:
            students = [
                project(at.select(at.trunk.layers[student]))
                for (student, _), project in zip(pairs, projections, strict=True)
            ]
            for (_, layer), student in zip(pairs, students, strict=True):
                if layer in at.teacher.experts and layer in routed.layers:
                    target = (routed.layers[layer], student, at.mask)
                    distances.append(feature_loss(*target, num_items_in_batch=at.num_anchors))
            return students, [at.teacher_state(layer, routed) for _, layer in pairs]

        if "feature" in losses:
            students, teachers = projected(self.pairs.feature, self.feature_projections)
            values = [
                feature_loss(student, teacher, at.mask, num_items_in_batch=at.num_anchors)
                for student, teacher in zip(students, teachers, strict=True)
            ]
            result["feature"] = torch.stack(values).mean()
        if "layerwise" in losses:
            students, teachers = projected(self.pairs.layerwise, self.layerwise_projections)
            result["layerwise"] = layerwise_loss(
                students,
                teachers,
                at.mask,
                unlocked_fraction=unlocked_fraction,
                num_items_in_batch=at.num_anchors,
            )
        if distances:
            result["student_feature"] = torch.stack(distances).mean()
        return result

    def _contrastive_loss(
        self, at: AnchorBatch, routed: RoutedBatch, input_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """Some of this rank's anchors against those of all ranks."""
        anchors = at.teacher.anchors
        chosen = evenly_spaced(len(anchors), anchors_per_rank(), input_ids.device)
        rows, positions = anchors.rows[chosen], anchors.student_positions[chosen]
        student = self.contrastive_projections[0](at.trunk.last_hidden_state[rows, positions])
        teacher = routed.residual[chosen].detach().float()
        texts = last_tokens(input_ids, attention_mask, rows, positions)
        other_states, other_texts = of_other_ranks(teacher, texts)
        loss = contrastive_loss(
            student, teacher, at.mask[chosen], texts=texts, other_features=other_states, other_texts=other_texts
        )
        # A batch-level term: its plain mean counts by this micro-batch's share of the anchors.
        return loss * (1.0 if at.num_anchors is None else len(at.mask) / at.num_anchors)

    def _attention_loss(self, at: AnchorBatch, attention_mask: Tensor, batch: dict[str, Tensor]) -> Tensor:
        values = []
        for student, teacher in self.pairs.attention:
            taps = at.trunk.attentions[student]
            spans = taps.over_spans(batch["student_positions"], attention_mask, batch["anchor_mask"])
            teacher_spans = at.teacher.attentions[teacher]
            values.append(
                attention_loss(spans, teacher_spans, at.teacher.anchors.mask, num_items_in_batch=at.num_anchors)
            )
        return torch.stack(values).mean()

    @torch.no_grad()
    def _metrics(self, at: AnchorBatch, routed: RoutedBatch, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        metrics = {name: parts[name] for name in ("gap", "gap_difference")}
        metrics["gap_count"] = at.teacher.anchors.same_next.sum().float()
        if routed.decisions:
            metrics |= routing_metrics(at, routed)
        return metrics
