"""The student-aware router at work: one for each re-routed layer of the teacher, on the anchors of a batch."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from distill_trainer.aligned import AnchorBatch, LayerDecision, RoutedBatch
from distill_trainer.logit_loss import Survey
from distill_trainer.losses.reduction import token_mean
from distill_trainer.moe import ExpertCall
from distill_trainer.router import ROUTER_PARTS, StudentAwareRouter, routing_losses, sample_experts
from distill_trainer.schedules import ScheduledValues
from distill_trainer.teacher import Teacher


class Routing(nn.Module):
    """The routers of all re-routed layers.

    Args:
        gate_rows: Weight of each layer's gate, `(num_experts, teacher_hidden_size)`, by layer. Not empty.
        student_hidden_size: Width of the student's hidden state.
        parts: See `StudentAwareRouter`.
        num_samples: Choices of experts to draw for each anchor, whose beliefs are averaged; 0 takes the likeliest.
    """

    def __init__(
        self,
        gate_rows: dict[int, Tensor],
        student_hidden_size: int,
        *,
        parts: Collection[str] = ROUTER_PARTS,
        num_samples: int = 0,
    ):
        super().__init__()
        self.num_samples = num_samples
        self.parts = tuple(part for part in ROUTER_PARTS if part in parts)
        self.routers = nn.ModuleDict(
            {
                str(layer): StudentAwareRouter(rows, student_hidden_size, parts)
                for layer, rows in sorted(gate_rows.items())
            }
        )

    def forward(self, at: AnchorBatch, survey: Survey, teacher: Teacher, values: ScheduledValues) -> RoutedBatch:
        """Let the routers choose at every anchor, and give what the teacher then holds."""
        student_states = at.select(at.trunk.last_hidden_state)
        decisions: dict[int, LayerDecision] = {}

        def choose(layer: int, own: ExpertCall) -> tuple[Tensor, Tensor]:
            gate_logits = own.gate_logits
            decision = self.routers[str(layer)](
                own.hidden_states,
                student_states,
                survey.entropy,
                survey.gap,
                gate_logits,
                min(values.top_k, gate_logits.shape[-1]),
                values.router_temperature,
            )
            if not values.router_learns:
                # Without a gradient to the weights the layers above keep no graph.
                decision = decision.settled()
            decisions[layer] = LayerDecision(decision, gate_logits, at.teacher.gate_experts[layer])
            if self.num_samples and layer == max(teacher.routed.depth):
                weights, selected_experts = sample_experts(
                    decision.router_logits,
                    decision.selected_experts.shape[-1],
                    values.router_temperature,
                    self.num_samples,
                )
                return selected_experts, weights
            return decision.selected_experts, decision.routing_weights

        rerouted = teacher.reroute(at.teacher, choose)
        residual = rerouted.residual.mean(dim=1) if self.num_samples else rerouted.residual
        return RoutedBatch(
            residual,
            rerouted.hidden_states,
            survey.gap,
            at.teacher.anchors.mask,
            decisions=dict(sorted(decisions.items())),
            layers=rerouted.layers,
        )


def router_losses(at: AnchorBatch, routed: RoutedBatch, survey: Survey) -> dict[str, Tensor]:
    """The parts of the routers' objective that need no logits, averaged over the re-routed layers."""
    target = survey.true_logprobs.exp()
    parts = [
        routing_losses(found.router, found.gate_logits, target, num_items_in_batch=at.num_anchors)
        for found in routed.decisions.values()
    ]
    return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}


@torch.no_grad()
def routing_metrics(at: AnchorBatch, routed: RoutedBatch) -> dict[str, Tensor]:
    """What the router chose at the highest re-routed layer, as means over the anchors of the accumulated batch."""
    router, gate_experts = routed.highest.router, routed.highest.gate_experts
    probabilities = torch.softmax(router.router_logits, dim=-1)
    entropy = torch.special.entr(probabilities).sum(dim=-1)
    changed = router.selected_experts[:, 0] != gate_experts[:, 0]
    load = torch.zeros_like(probabilities).scatter(-1, router.selected_experts, router.routing_weights)
    metrics = {
        "capacity": token_mean(router.capacity, at.num_anchors),
        "changed_fraction": token_mean(changed.float(), at.num_anchors),
        "router_entropy": token_mean(entropy, at.num_anchors),
    }
    return metrics | {f"expert_load_{e}": token_mean(load[:, e], at.num_anchors) for e in range(load.shape[-1])}
