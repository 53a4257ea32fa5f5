"""The frozen teacher: what it believes and holds at anchors, with its own gate or with the student-aware router's."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from distill_trainer.alignment import VocabularyProjection
from distill_trainer.anchors import Anchors, Spans
from distill_trainer.errors import UnsupportedModelError
from distill_trainer.losses.attention import attention_rows, pool_spans
from distill_trainer.moe import ExpertCall, expert_blocks, mix_experts, record_experts
from distill_trainer.taps import decoder_layers, final_norm, output_head, run_trunk

logger = logging.get_logger(__name__)


@dataclass
class TeacherOutput:
    """What the teacher computed with its own gate, at anchors.

    Attributes:
        anchors: Where.
        last_layer: Index of the last layer.
        residual: Residual stream after the last layer, `(num_anchors, hidden_size)`.
        hidden_states: Input of the head, `(num_anchors, hidden_size)`.
        layers: Residual stream after each tapped layer, `(num_anchors, hidden_size)`.
        attentions: Attention over the spans between anchors of each tapped layer, mean of its heads,
            `(batch_size, 1, num_anchors, num_anchors)`.
        experts: What the last layer's experts did, None for a dense teacher.
        spans: The tokens between the anchors.
        inner_states: Input of the head at the inner tokens of the spans, `(num_inner, hidden_size)`.
    """

    anchors: Anchors
    last_layer: int
    residual: Tensor
    hidden_states: Tensor
    layers: dict[int, Tensor]
    attentions: dict[int, Tensor]
    experts: ExpertCall | None
    spans: Spans
    inner_states: Tensor


class Teacher:
    """A frozen causal language model. No `nn.Module`, so no optimizer, wrapper or checkpoint can reach its weights.

    Args:
        model: Any causal language model of transformers. Frozen and set to evaluation in place.
        projection: Maps its vocabulary to the student's.
        use_router: Find the experts of the last layer, so that `reroute` can be called.

    Raises:
        UnsupportedModelError: If it is a mixture whose last layer cannot be re-routed, or its logits overflow.
    """

    def __init__(self, model: PreTrainedModel, projection: VocabularyProjection, *, use_router: bool = True):
        self.model = model.eval().requires_grad_(False)
        self.projection = projection
        self.head = output_head(model, autocast=False)
        self.last_layer = model.config.num_hidden_layers - 1
        blocks = expert_blocks(model) if use_router else []
        self.block = blocks[-1] if blocks else None
        if self.block is not None and not any(self.block is module for module in decoder_layers(model)[-1].modules()):
            raise UnsupportedModelError(
                f"The last layer of the teacher {type(model).__name__} has no experts. Set use_router to false to "
                "distil from its own gate."
            )
        if use_router and self.block is None:
            logger.warning(f"The teacher {type(model).__name__} is dense: it teaches without a router.")

    @property
    def num_experts(self) -> int:
        """Experts of the last layer, 0 for a dense teacher or without a router."""
        count: Any = 0 if self.block is None else self.block.experts.num_experts
        return count

    @torch.no_grad()
    def __call__(
        self,
        batch: dict[str, Tensor],
        anchors: Anchors,
        *,
        layers: tuple[int, ...] = (),
        attention_layers: tuple[int, ...] = (),
    ) -> TeacherOutput:
        """Read the batch's text with the teacher's own gate.

        Args:
            batch: A collated batch.
            anchors: Where the results are taken.
            layers: Layers whose residual stream is kept.
            attention_layers: Layers whose attention is kept.
        """
        input_ids, attention_mask = batch["teacher_input_ids"], batch["teacher_attention_mask"]
        at = (anchors.rows, anchors.teacher_positions)
        tapped = tuple(sorted({*layers, self.last_layer}))
        if self.block is None:
            trunk = run_trunk(self.model, input_ids, attention_mask, layers=tapped, attention_layers=attention_layers)
            experts = None
        else:
            with record_experts(self.block) as calls:
                trunk = run_trunk(
                    self.model, input_ids, attention_mask, layers=tapped, attention_layers=attention_layers
                )
            experts = calls[0].at(anchors.rows * input_ids.shape[1] + anchors.teacher_positions)
        attentions = {
            layer: pool_spans(
                attention_rows(
                    taps.query, taps.key, batch["teacher_positions"], attention_mask.bool(), taps.scaling
                ).mean(dim=1, keepdim=True),
                batch["teacher_positions"],
                batch["anchor_mask"],
            )
            for layer, taps in trunk.attentions.items()
        }
        spans = Spans.of(batch, anchors)
        return TeacherOutput(
            anchors=anchors,
            last_layer=self.last_layer,
            residual=trunk.layers[self.last_layer][at],
            hidden_states=trunk.last_hidden_state[at],
            layers={layer: trunk.layers[layer][at] for layer in layers},
            attentions=attentions,
            experts=experts,
            spans=spans,
            inner_states=trunk.last_hidden_state[spans.teacher_rows, spans.teacher_positions],
        )

    def reroute(
        self, output: TeacherOutput, selected_experts: Tensor, routing_weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The student-aware teacher: what it would hold and say if its last experts were mixed like this.

        The mixture takes the place of the experts' own output in the residual stream, then the final norm follows.
        Gradients reach `routing_weights` only. The weights are scaled by the sum of the gate's own, so that families
        whose gates do not sum to 1 keep the size of their experts' output.

        Args:
            output: Of a call with the same text.
            selected_experts: `(num_anchors, top_k)`.
            routing_weights: Sum 1, `(num_anchors, top_k)`.

        Returns:
            Residual stream and input of the head, each `(num_anchors, hidden_size)`.
        """
        own = output.experts
        scale = own.routing_weights.float().sum(dim=-1, keepdim=True)
        # A gate that renormalises gives a sum of 1 up to rounding, which must not change our weights by a bit.
        rounding = own.routing_weights.shape[-1] * torch.finfo(own.routing_weights.dtype).eps
        scale = torch.where((scale - 1).abs() <= rounding, 1.0, scale)
        weights = (routing_weights * scale).to(own.routing_weights.dtype)
        mixture = mix_experts(self.block, own.hidden_states, selected_experts, weights)
        with torch.autocast(mixture.device.type, enabled=False):
            residual = output.residual + (mixture - own.output)
            return residual, final_norm(self.model)(residual)

    @torch.no_grad()
    def verify(self) -> None:
        """Check on a few tokens that the head, the norm and the re-routing reproduce the model itself.

        Raises:
            UnsupportedModelError: If they do not, or if the logits are not finite in the teacher's dtype.
        """
        device = self.model.device
        input_ids = torch.arange(1, 9, device=device).clamp(max=self.model.config.vocab_size - 1).unsqueeze(0)
        positions = torch.arange(7, device=device).unsqueeze(0)
        batch = {
            "input_ids": input_ids,
            "labels": input_ids,
            "teacher_input_ids": input_ids,
            "teacher_attention_mask": torch.ones_like(input_ids),
            "student_positions": positions,
            "teacher_positions": positions,
            "anchor_mask": torch.ones_like(positions, dtype=torch.bool),
        }
        output = self(batch, Anchors.of(batch))
        expected = self.model(input_ids=input_ids, use_cache=False).logits[0, :-1]
        if not expected.isfinite().all():
            raise UnsupportedModelError(
                f"The teacher's logits overflow in {self.model.dtype}. Set teacher_dtype to bfloat16 or float32."
            )
        self._check("head", self.head(output.hidden_states), expected)
        if self.block is not None:
            self._verify_reroute(input_ids, output)

    def _verify_reroute(self, input_ids: Tensor, output: TeacherOutput) -> None:
        """Compare `reroute` with the model run while another expert is forced on its last block."""
        own = output.experts
        forced = ((own.selected_experts + 1) % self.num_experts)[:, :1]
        scale = own.routing_weights.sum(dim=-1, keepdim=True)

        def force(module, arguments):
            hidden_states, selected_experts, _ = arguments
            others = ((selected_experts + 1) % self.num_experts)[:, :1]
            weights = torch.zeros_like(others, dtype=scale.dtype)
            weights[: len(scale)] = scale
            return hidden_states, others, weights

        hook = self.block.experts.register_forward_pre_hook(force)
        try:
            expected = self.model(input_ids=input_ids, use_cache=False).logits[0, :-1]
        finally:
            hook.remove()
        self._check("re-routing", self.head(self.reroute(output, forced, torch.ones_like(scale))[1]), expected)

    def _check(self, what: str, found: Tensor, expected: Tensor) -> None:
        tolerance = {torch.float32: 1e-3, torch.float16: 1e-2}.get(expected.dtype, 6e-2)
        difference = (found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-3)
        if not difference < tolerance:
            raise UnsupportedModelError(
                f"The {what} of the teacher {type(self.model).__name__} does more than this package knows: its logits "
                f"differ by {difference:.1e} of their size. Use another teacher."
            )
