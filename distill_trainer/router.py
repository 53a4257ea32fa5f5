"""The student-aware router: it re-weights the teacher's experts for what this student can absorb now."""

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_trainer.losses.reduction import row_dot, token_mean

CAPACITY_HIDDEN_SIZE = 64
FIRST_CAPACITY = 0.25
MAX_KEY_SIZE = 128
# What moves the router away from the teacher's gate.
ROUTER_PARTS = ("importance", "capacity", "gap")
# Nats from the gate at which leaving it has cost most of what it can, and a share of it that smooths the corner at 0.
ANCHOR_REACH, ANCHOR_CORNER = 0.1, 1e-3
GAP_WARMUP_STEPS = 20
GAP_DECAY = 0.95


@dataclass
class RouterOutput:
    """The router's decision at some anchors.

    Attributes:
        router_logits: Scores before softmax and temperature, `(num_anchors, num_experts)`.
        routing_weights: Weights of the selected experts, sum 1, `(num_anchors, top_k)`.
        selected_experts: Indices, most weight first, `(num_anchors, top_k)`.
        capacity: Estimated probability that the student gives the true next token, in (0, 1), `(num_anchors,)`.
        importance: What the router adds to the teacher's gate, `(num_anchors, num_experts)`.
        capacity_logits: `capacity` before its sigmoid, `(num_anchors,)`.
    """

    router_logits: Tensor
    routing_weights: Tensor
    selected_experts: Tensor
    capacity: Tensor
    importance: Tensor
    capacity_logits: Tensor

    def settled(self) -> "RouterOutput":
        """The same decision, of which only the capacity is still learned."""
        return RouterOutput(
            self.router_logits.detach(),
            self.routing_weights.detach(),
            self.selected_experts,
            self.capacity,
            self.importance.detach(),
            self.capacity_logits,
        )


class StudentAwareRouter(nn.Module):
    """Route each anchor to the teacher's experts by the teacher's gate, the student's state, capacity and gap.

    The router's logits are the gate's logits plus an importance per expert: the scaled dot product of a query, made
    from the teacher's and the student's hidden state, the estimated capacity and the knowledge gap, with one key per
    expert. The query starts at zero, so at first the router is the teacher's own gate.

    Args:
        gate_rows: The gate's weight, `(num_experts, teacher_hidden_size)`; the keys start from it.
        student_hidden_size: Width of the student's hidden state.
        parts: Which of `ROUTER_PARTS` the query is made from: `importance` are both hidden states. Without any the
            router's logits are the gate's.
    """

    def __init__(self, gate_rows: Tensor, student_hidden_size: int, parts: Collection[str] = ROUTER_PARTS):
        super().__init__()
        teacher_hidden_size = gate_rows.shape[1]
        sizes = {"importance": teacher_hidden_size + student_hidden_size, "capacity": 1, "gap": 1}
        self.parts = tuple(part for part in ROUTER_PARTS if part in parts)
        key_size = min(teacher_hidden_size, MAX_KEY_SIZE)
        # A random orthogonal projection keeps the angles between the gate's rows in fewer dimensions.
        projection = torch.empty(teacher_hidden_size, key_size)
        nn.init.orthogonal_(projection)
        keys = F.normalize(gate_rows.float().cpu(), dim=-1) @ projection
        self.keys = nn.Parameter(F.normalize(keys, dim=-1) * math.sqrt(key_size))
        self.query = nn.Linear(sum(sizes[part] for part in self.parts), key_size, bias=False) if self.parts else None
        if self.query is not None:
            nn.init.zeros_(self.query.weight)
        self.capacity_hidden = nn.Linear(student_hidden_size + 1, CAPACITY_HIDDEN_SIZE)
        self.capacity_output = nn.Linear(CAPACITY_HIDDEN_SIZE, 1)
        # About what a language model of 100 M parameters gives the true token: the estimate has one pass to settle.
        nn.init.constant_(self.capacity_output.bias, math.log(FIRST_CAPACITY / (1 - FIRST_CAPACITY)))

    def forward(
        self,
        teacher_hidden: Tensor,
        student_hidden: Tensor,
        student_entropy: Tensor,
        gap: Tensor,
        gate_logits: Tensor,
        top_k: int,
        temperature: float,
    ) -> RouterOutput:
        """Route.

        Args:
            teacher_hidden: Input of the teacher's MoE block, `(num_anchors, teacher_hidden_size)`.
            student_hidden: The student's hidden state, detached here, `(num_anchors, student_hidden_size)`.
            student_entropy: Entropy of the student's next-token distribution over its maximum, in [0, 1],
                `(num_anchors,)`.
            gap: Knowledge gap KL(teacher || student) in nats, detached here, `(num_anchors,)`.
            gate_logits: The teacher's gate before softmax, `(num_anchors, num_experts)`. Not detached: where a layer
                below is re-routed too, its router's gradient runs through the gates above.
            top_k: Experts to select, from 1 to the number of experts.
            temperature: Softmax temperature, above 0.
        """
        student_state = F.rms_norm(student_hidden.detach().float(), student_hidden.shape[-1:])
        teacher_state = F.rms_norm(teacher_hidden.detach().float(), teacher_hidden.shape[-1:])
        student_entropy = student_entropy.detach().float().unsqueeze(-1)
        capacity_state = F.silu(self.capacity_hidden(torch.cat([student_state, student_entropy], dim=-1)))
        capacity_logits = self.capacity_output(capacity_state).squeeze(-1).float()
        capacity = torch.sigmoid(capacity_logits)

        # The capacity is fitted to what the student does; the routing reads it and may not bend it.
        inputs = {
            "importance": torch.cat([teacher_state, student_state], dim=-1),
            "capacity": capacity.detach().unsqueeze(-1),
            "gap": torch.log1p(gap.detach().float()).unsqueeze(-1),
        }
        importance = torch.zeros_like(gate_logits, dtype=torch.float32)
        if self.query is not None:
            query = self.query(torch.cat([inputs[part] for part in self.parts], dim=-1))
            importance = (query @ self.keys.T.to(query.dtype)).float() / math.sqrt(self.keys.shape[-1])
        router_logits = gate_logits.float() + importance
        routing_weights, selected_experts = select_experts(router_logits, top_k, temperature)
        return RouterOutput(router_logits, routing_weights, selected_experts, capacity, importance, capacity_logits)


def select_experts(router_logits: Tensor, top_k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Softmax at the temperature, the `top_k` most probable experts, weights renormalised to sum 1.

    A single weight is the constant 1 and would leave the router without gradient. It is written `p / p.detach()`: the
    same value, with the gradient of `log p`. Of equally probable experts the gate's own choice, the first, is taken.

    Returns:
        Routing weights and expert indices, each `(num_anchors, top_k)`.
    """
    probabilities = torch.softmax(router_logits / temperature, dim=-1)
    chosen, selected_experts = probabilities.topk(top_k, dim=-1)
    total = chosen.detach() if top_k == 1 else chosen.sum(dim=-1, keepdim=True)
    return chosen / total, selected_experts


def sample_experts(router_logits: Tensor, top_k: int, temperature: float, num_samples: int) -> tuple[Tensor, Tensor]:
    """Several choices of experts, each drawn without replacement by the probabilities of the softmax.

    Knowledge augmentation of MoE teachers (https://huggingface.co/papers/2502.12947, section 3.2) averages what the
    teacher says over such choices.

    Returns:
        Routing weights, which sum to 1 in each choice, and expert indices, each `(num_anchors, num_samples, top_k)`.
    """
    logprobs = F.log_softmax(router_logits / temperature, dim=-1).unsqueeze(1).expand(-1, num_samples, -1)
    # The largest of log-probabilities plus Gumbel noise are a sample without replacement.
    noise = -torch.empty_like(logprobs).exponential_().log()
    selected_experts = (logprobs.detach() + noise).topk(top_k, dim=-1).indices
    chosen = logprobs.gather(-1, selected_experts).exp()
    total = chosen.detach() if top_k == 1 else chosen.sum(dim=-1, keepdim=True)
    return chosen / total, selected_experts


def routing_objective(
    parts: dict[str, Tensor],
    *,
    student_weight: float,
    anchor_weight: float,
    balance_weight: float,
    capacity_weight: float = 1.0,
) -> Tensor:
    """What the router's parameters minimise beside `ce` and `student_kl`; none of it reaches the student.

    Args:
        parts: `anchor`, `balance` and `capacity_bce`, see `routing_losses`, and `student_feature` if layers are
            re-routed as targets. Scalars.
        student_weight: Weight of `student_feature`: be near what the student holds.
        anchor_weight: Weight of `anchor`: stay with the teacher's gate unless leaving it pays.
        balance_weight: Weight of `balance`: use all experts.
        capacity_weight: Weight of `capacity_bce`: know what the student can do.
    """
    learnable = student_weight * parts["student_feature"] if "student_feature" in parts else 0.0
    estimate = capacity_weight * parts["capacity_bce"]
    return anchor_weight * parts["anchor"] + balance_weight * parts["balance"] + estimate + learnable


def routing_losses(
    output: RouterOutput,
    gate_logits: Tensor,
    true_token_probability: Tensor,
    *,
    num_items_in_batch: Tensor | float | None = None,
) -> dict[str, Tensor]:
    """The parts of the objective that need the routing only: anchor, balance and capacity.

    Args:
        output: The router's decision.
        gate_logits: The teacher's gate before softmax, `(num_anchors, num_experts)`.
        true_token_probability: What the student gave the true next token, the capacity's target, `(num_anchors,)`.
        num_items_in_batch: See `token_mean`.

    Returns:
        `anchor_kl` (nats to the gate, detached), `anchor` (what it costs, see `anchor_cost`), `balance` (1 at equal
        load; Fedus et al. 2021, https://huggingface.co/papers/2101.03961, equations 4 to 6, with the router's weights
        as the load) and `capacity_bce` (nats). `anchor` and `balance` depend on who shares the micro-batch.
    """
    # A gate above another re-routed layer depends on that layer's router, whose business these parts are not.
    gate_logits = gate_logits.detach().float()
    router_logprobs = F.log_softmax(gate_logits + output.importance, dim=-1)
    gate_logprobs = F.log_softmax(gate_logits, dim=-1)
    anchor_kl = F.kl_div(router_logprobs, gate_logprobs, reduction="none", log_target=True).sum(dim=-1)
    num_experts = router_logprobs.shape[-1]
    load = torch.zeros_like(router_logprobs).scatter(-1, output.selected_experts, output.routing_weights.detach())
    balance = num_experts * (load.mean(dim=0) * router_logprobs.exp().mean(dim=0)).sum()
    # What is a function of means over the micro-batch counts by its share of all anchors.
    share = 1.0 if num_items_in_batch is None else len(router_logprobs) / num_items_in_batch
    capacity_bce = F.binary_cross_entropy_with_logits(
        output.capacity_logits, true_token_probability.detach().float(), reduction="none"
    )
    return {
        "anchor_kl": token_mean(anchor_kl.detach(), num_items_in_batch),
        "anchor": anchor_cost(anchor_kl.mean()) * share if len(router_logprobs) else anchor_kl.sum(),
        "balance": balance * share if len(router_logprobs) else anchor_kl.sum(),
        "capacity_bce": token_mean(capacity_bce, num_items_in_batch),
    }


def anchor_cost(anchor_kl: Tensor) -> Tensor:
    """What a mean KL to the gate (nats) costs: near 0 it grows with its root, and it ends at 1.

    The root makes the first change the dearest, as a group lasso does (https://doi.org/10.1111/j.1467-9868.2005.00532.x):
    with a gate that was trained with its experts there is little to win but the noise of the batches, and the router
    stays. The bound lets one that has earned its way go on, as concave penalties do
    (https://doi.org/10.1198/016214501753382273), where the KL itself would hold it back.
    """
    left = anchor_kl / (anchor_kl + ANCHOR_REACH)
    return left / (left + ANCHOR_CORNER).sqrt()


def student_divergence(student_logprobs: Tensor, teacher_logprobs: Tensor, reachable: Tensor) -> Tensor:
    """KL(student || student-aware teacher) per anchor: how hard the teacher's answer is for this student.

    Part of the router's objective, after knowledge augmentation for MoE teachers
    (https://huggingface.co/papers/2502.12947). Only student tokens that the teacher can produce take part; the
    student's distribution is renormalised over them.

    Args:
        student_logprobs: Detached here, `(num_anchors, student_vocab_size)`.
        teacher_logprobs: Projected distribution of the student-aware teacher, same shape.
        reachable: True at student tokens that receive teacher mass, `(student_vocab_size,)`.

    Returns:
        `(num_anchors,)`, nats.
    """
    # KL = sum of p log(p / q) / Z - log Z over the reachable tokens, with Z their mass under the student.
    student_logprobs = student_logprobs.detach().float()
    probs = student_logprobs.exp().mul_(reachable)
    mass = probs.sum(dim=-1)
    return (row_dot(probs, student_logprobs) - row_dot(probs, teacher_logprobs)) / mass - mass.log()


class KnowledgeGap(nn.Module):
    """Running difference between the student's and the student-aware teacher's loss on the true tokens, in nats.

    The first `GAP_WARMUP_STEPS` optimizer steps give the start value, their plain mean; after them an exponential
    average follows. The state is in buffers, so a resumed run continues it.
    """

    steps: Tensor
    start: Tensor
    running: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.float64))
        self.register_buffer("start", torch.zeros((), dtype=torch.float64))
        self.register_buffer("running", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, difference: Tensor) -> None:
        """Take in the mean difference of one optimizer step."""
        self.steps += 1
        if self.steps <= GAP_WARMUP_STEPS:
            self.start += (difference - self.start) / self.steps
            self.running.copy_(self.start)
        else:
            self.running += (1 - GAP_DECAY) * (difference - self.running)

    def ratio(self) -> float:
        """The running gap over its start, cut to 0 to 1; 1 while the start is being measured."""
        if self.steps <= GAP_WARMUP_STEPS:
            return 1.0
        if self.start <= 0:
            return 0.0
        return min(max(float(self.running / self.start), 0.0), 1.0)
