"""The student-aware router at work: one for each re-routed layer of the teacher, on the anchors of a batch."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from distill_trainer.aligned import AnchorBatch, RoutedBatch
from distill_trainer.logit_loss import Survey
from distill_trainer.losses.reduction import token_mean
from distill_trainer.moe import ExpertCall
from distill_trainer.router import ROUTER_PARTS, RouterOutput, StudentAwareRouter, routing_losses, sample_experts
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
        decisions: dict[int, tuple[RouterOutput, ExpertCall, Tensor]] = {}

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
            decisions[layer] = decision, own, gate_logits
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
        top = max(decisions)
        router, own, gate_logits = decisions.pop(top)
        # Not all gates give their choice in order.
        order = own.routing_weights.argsort(dim=-1, descending=True, stable=True)
        residual = rerouted.residual.mean(dim=1) if self.num_samples else rerouted.residual
        return RoutedBatch(
            residual,
            rerouted.hidden_states,
            survey.gap,
            at.teacher.anchors.mask,
            layers=rerouted.layers,
            router=router,
            gate_logits=gate_logits,
            gate_experts=own.selected_experts.gather(-1, order),
            others=[(decision, logits) for decision, _, logits in decisions.values()],
        )


def router_losses(at: AnchorBatch, routed: RoutedBatch, survey: Survey) -> dict[str, Tensor]:
    """The parts of the routers' objective that need no logits, averaged over the re-routed layers."""
    decisions = [(routed.router, routed.gate_logits), *routed.others]
    target = survey.true_logprobs.exp()
    parts = [
        routing_losses(decision, logits, target, num_items_in_batch=at.num_anchors) for decision, logits in decisions
    ]
    return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}


@torch.no_grad()
def routing_metrics(at: AnchorBatch, routed: RoutedBatch) -> dict[str, Tensor]:
    """What the router chose at the highest re-routed layer, as means over the anchors of the accumulated batch."""
    probabilities = torch.softmax(routed.router.router_logits, dim=-1)
    entropy = torch.special.entr(probabilities).sum(dim=-1)
    changed = routed.router.selected_experts[:, 0] != routed.gate_experts[:, 0]
    load = torch.zeros_like(probabilities).scatter(-1, routed.router.selected_experts, routed.router.routing_weights)
    metrics = {
        "capacity": token_mean(routed.router.capacity, at.num_anchors),
        "changed_fraction": token_mean(changed.float(), at.num_anchors),
        "router_entropy": token_mean(entropy, at.num_anchors),
    }
    return metrics | {f"expert_load_{e}": token_mean(load[:, e], at.num_anchors) for e in range(load.shape[-1])}
