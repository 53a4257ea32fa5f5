"""All that trains in one module: the student, the student-aware router and the projections to the teacher's width."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill_trainer.aligned import AnchorBatch, RoutedBatch
from distill_trainer.losses.attention import attention_loss, attention_rows, pool_spans
from distill_trainer.losses.contrastive import contrastive_loss
from distill_trainer.losses.feature import feature_loss
from distill_trainer.losses.gap_weights import gap_weights
from distill_trainer.losses.layerwise import layerwise_loss
from distill_trainer.losses.logits import kl_divergence, kl_divergence_loss, lm_loss
from distill_trainer.losses.reduction import token_mean
from distill_trainer.router import (
    KnowledgeGap,
    StudentAwareRouter,
    routing_losses,
    student_divergence,
)
from distill_trainer.schedules import ScheduledValues
from distill_trainer.taps import LayerPairs, lm_logits, run_trunk
from distill_trainer.teacher import IGNORE_INDEX, Teacher, TeacherOutput

STUDENT_PREFIX = "student."


class DistillationModel(nn.Module):
    """The student and everything that trains beside it; the model that the Trainer wraps.

    Args:
        student: The model to train, a `PeftModel` over one included.
        gate_rows: Weight of the teacher's last gate, `(num_experts, teacher_hidden_size)`; None trains no router.
        teacher_hidden_size: Width that student states are projected to.
        pairs: Layers to compare.
        contrastive: Make the projection of the contrastive loss.
        kl_direction: `forward`, `reverse` or `js`, see `kl_divergence_loss`.
        gap_weighting: Weigh anchors in the KL loss by their knowledge gap, see `gap_weights`.
    """

    # Tells the Trainer to count the items of the whole accumulated batch.
    accepts_loss_kwargs = True

    def __init__(
        self,
        student: nn.Module,
        *,
        gate_rows: Tensor | None,
        teacher_hidden_size: int,
        pairs: LayerPairs,
        contrastive: bool,
        kl_direction: str = "forward",
        gap_weighting: bool = True,
    ):
        super().__init__()
        self.student = student
        self.pairs = pairs
        self.kl_direction = kl_direction
        self.gap_weighting = gap_weighting
        width = self.causal_lm.config.hidden_size
        self.router = None if gate_rows is None else StudentAwareRouter(gate_rows, width)
        self.gap = KnowledgeGap()

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
        losses: frozenset[str] = frozenset(),
        teacher: Teacher | None = None,
        teacher_output: TeacherOutput | None = None,
        values: ScheduledValues | None = None,
        per_row: bool = False,
        **batch,
    ) -> dict[str, dict[str, Tensor]]:
        """Named losses of a batch, unweighted.

        Args:
            input_ids: Student tokens, `(batch_size, sequence_length)`.
            attention_mask: 1 at real tokens, same shape.
            labels: `input_ids`, -100 where a token is not predicted, same shape. The shift happens here.
            losses: Names of the losses to compute.
            teacher: The frozen teacher, for re-routing.
            teacher_output: What it computed. None skips all losses but `lm`.
            values: Temperatures, top-k and unlocked fraction.
            per_row: Give the summed cross-entropy of each row as `lm`, `(batch_size,)`, and nothing else.
            **batch: The rest of the collated batch, `num_items_in_batch` (tokens that the accumulated batch predicts)
                and `num_anchors_in_batch` (its anchors).

        Returns:
            `losses` by name, `router` with the parts of the router's objective (empty without one), and `metrics`,
            detached. Everything is a share of a mean over the whole accumulated batch.
        """
        tapped: dict[str, tuple[int, ...]] = {}
        if teacher_output is not None:
            tapped = self.tapped_layers(losses, side=0)
        trunk = run_trunk(self.causal_lm, input_ids, attention_mask, **tapped)
        predicted = labels[:, 1:] != IGNORE_INDEX
        logits = lm_logits(self.causal_lm, trunk.last_hidden_state[:, :-1][predicted])
        targets = labels[:, 1:][predicted]
        everything = torch.ones_like(targets, dtype=torch.bool)
        num_items, num_anchors = batch.get("num_items_in_batch"), batch.get("num_anchors_in_batch")
        result: dict[str, dict[str, Tensor]] = {"losses": {}, "router": {}, "metrics": {}}
        if per_row:
            nats = F.cross_entropy(logits.float(), targets, reduction="none")
            rows = nats.new_zeros(len(labels)).index_add(0, predicted.nonzero()[:, 0], nats)
            return result | {"losses": {"lm": rows}}
        if "lm" in losses:
            result["losses"]["lm"] = lm_loss(logits, targets, everything, num_items_in_batch=num_items)
        if teacher_output is None:
            return result

        anchors = teacher_output.anchors
        index = (predicted.flatten().cumsum(0) - 1).view_as(predicted)[anchors.rows, anchors.student_positions]
        at_anchors = AnchorBatch(trunk, logits[index], targets[index], teacher_output, num_anchors)
        routed = self.route(at_anchors, teacher, values)
        if "kl" in losses:
            result["losses"]["kl"] = self._kl_loss(at_anchors, routed, values)
        result["losses"] |= self._state_losses(at_anchors, routed, losses, values.unlocked_fraction)
        if "attention" in losses:
            result["losses"]["attention"] = self._attention_loss(at_anchors, attention_mask, batch)
        if self.router is not None:
            result["router"] = self._router_losses(at_anchors, routed, teacher, batch["teacher_input_ids"])
        result["metrics"] = self._metrics(at_anchors, routed)
        return result

    def tapped_layers(self, losses: frozenset[str], side: int) -> dict[str, tuple[int, ...]]:
        """Layers that the active losses need, of the student (side 0) or the teacher (side 1)."""
        pairs = [pair for name in ("feature", "layerwise") if name in losses for pair in getattr(self.pairs, name)]
        attention = self.pairs.attention if "attention" in losses else ()
        return {
            "layers": tuple(sorted({pair[side] for pair in pairs})),
            "attention_layers": tuple(sorted({pair[side] for pair in attention})),
        }

    def route(self, at: AnchorBatch, teacher: Teacher, values: ScheduledValues) -> RoutedBatch:
        """Let the router choose at every anchor, and give what the teacher then holds and says.

        Without a router it is the teacher as it is.
        """
        output = at.teacher
        own_logprobs = teacher.projection.log_probs(output.logits)
        student_logprobs = F.log_softmax(at.logits.detach().float(), dim=-1)
        gap = kl_divergence(own_logprobs, student_logprobs).clamp(min=0)
        if self.router is None:
            return RoutedBatch(output.logits, own_logprobs, output.residual, gap, output.anchors.mask)
        entropy = -(student_logprobs.exp() * student_logprobs).sum(dim=-1) / math.log(student_logprobs.shape[-1])
        decision = self.router(
            output.experts.hidden_states,
            at.select(at.trunk.last_hidden_state),
            entropy,
            gap,
            output.experts.router_logits,
            values.top_k,
            values.router_temperature,
        )
        residual, logits = teacher.reroute(output, decision.selected_experts, decision.routing_weights)
        logprobs = teacher.projection.log_probs(logits)
        own, mask = output.experts, output.anchors.mask
        return RoutedBatch(logits, logprobs, residual, gap, mask, decision, own.router_logits, own.selected_experts)

    def route_batch(
        self, batch: dict[str, Tensor], teacher: Teacher, teacher_output: TeacherOutput, values: ScheduledValues
    ) -> RoutedBatch:
        """`route` for a collated batch on its own, to look at what the router does."""
        anchors = teacher_output.anchors
        trunk = run_trunk(self.causal_lm, batch["input_ids"], batch["attention_mask"])
        logits = lm_logits(self.causal_lm, trunk.last_hidden_state[anchors.rows, anchors.student_positions])
        targets = batch["labels"][anchors.rows, anchors.student_positions + 1]
        return self.route(AnchorBatch(trunk, logits, targets, teacher_output), teacher, values)

    def _kl_loss(self, at: AnchorBatch, routed: RoutedBatch, values: ScheduledValues) -> Tensor:
        return kl_divergence_loss(
            at.logits,
            routed.logprobs,
            at.mask,
            temperature=values.temperature,
            direction=self.kl_direction,
            token_weights=gap_weights(routed.gap, at.mask) if self.gap_weighting else None,
            num_items_in_batch=at.num_anchors,
        )

    def _state_losses(
        self, at: AnchorBatch, routed: RoutedBatch, losses: frozenset[str], unlocked_fraction: float
    ) -> dict[str, Tensor]:
        """Feature, layer-wise and contrastive loss: the student's projected states against the teacher's."""

        def projected(pairs, projections) -> tuple[list[Tensor], list[Tensor]]:
            students = [
                project(at.select(at.trunk.layers[student]))
                for (student, _), project in zip(pairs, projections, strict=True)
            ]
            return students, [at.teacher_state(teacher, routed) for _, teacher in pairs]

        result = {}
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
        if "contrastive" in losses:
            student = self.contrastive_projections[0](at.select(at.trunk.last_hidden_state))
            # A batch-level term: its plain mean counts by this micro-batch's share of the anchors.
            share = 1.0 if at.num_anchors is None else len(at.mask) / at.num_anchors
            result["contrastive"] = contrastive_loss(student, routed.residual, at.mask) * share
        return result

    def _attention_loss(self, at: AnchorBatch, attention_mask: Tensor, batch: dict[str, Tensor]) -> Tensor:
        values = []
        for student, teacher in self.pairs.attention:
            taps = at.trunk.attentions[student]
            rows = attention_rows(
                taps.query, taps.key, batch["student_positions"], attention_mask.bool(), taps.scaling
            )
            # Pooling is linear: the mean over heads goes first, because it is all that the loss compares.
            rows = rows.mean(dim=1, keepdim=True)
            spans = pool_spans(rows, batch["student_positions"], batch["anchor_mask"])
            teacher_spans = at.teacher.attentions[teacher]
            values.append(
                attention_loss(spans, teacher_spans, at.teacher.anchors.mask, num_items_in_batch=at.num_anchors)
            )
        return torch.stack(values).mean()

    def _router_losses(
        self, at: AnchorBatch, routed: RoutedBatch, teacher: Teacher, teacher_input_ids: Tensor
    ) -> dict[str, Tensor]:
        """The parts of the router's objective. The student's side is detached throughout."""
        anchors = at.teacher.anchors
        # The teacher's own next token: exact, where the projected vocabulary may lack the student's.
        upcoming = teacher_input_ids[anchors.rows, anchors.teacher_positions + 1]
        true_logprobs = -F.cross_entropy(at.logits.detach().float(), at.targets, reduction="none")
        divergence = student_divergence(at.logits, routed.logprobs, teacher.projection.reachable)
        return {
            "ce": lm_loss(routed.logits, upcoming, at.mask, num_items_in_batch=at.num_anchors),
            "student_kl": token_mean(divergence, at.num_anchors),
        } | routing_losses(routed.router, routed.gate_logits, true_logprobs.exp(), num_items_in_batch=at.num_anchors)

    @torch.no_grad()
    def _metrics(self, at: AnchorBatch, routed: RoutedBatch) -> dict[str, Tensor]:
        student_loss = F.cross_entropy(at.logits.float(), at.targets, reduction="none")
        teacher_loss = F.nll_loss(routed.logprobs, at.targets, reduction="none")
        same_next = at.teacher.anchors.same_next
        metrics = {
            "gap": token_mean(routed.gap, at.num_anchors),
            "gap_difference": (student_loss - teacher_loss)[same_next].sum(),
            "gap_count": same_next.sum().float(),
        }
        if routed.router is not None:
            probabilities = torch.softmax(routed.router.router_logits, dim=-1)
            entropy = torch.special.entr(probabilities).sum(dim=-1)
            changed = routed.router.selected_experts[:, 0] != routed.gate_experts[:, 0]
            load = torch.zeros_like(probabilities).scatter(
                -1, routed.router.selected_experts, routed.router.routing_weights
            )
            metrics |= {
                "capacity": token_mean(routed.router.capacity, at.num_anchors),
                "changed_fraction": token_mean(changed.float(), at.num_anchors),
                "router_entropy": token_mean(entropy, at.num_anchors),
            }
            metrics |= {f"expert_load_{e}": token_mean(load[:, e], at.num_anchors) for e in range(load.shape[-1])}
        return metrics
