"""The frozen teacher: what it believes and holds at anchors, with its own gate or with the student-aware router's."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from distill_trainer.alignment import VocabularyProjection
from distill_trainer.anchors import Anchors, Spans
from distill_trainer.errors import UnsupportedModelError
from distill_trainer.layer_plan import RoutedLayers
from distill_trainer.mixing import like_the_gate, mix_experts, reroute_experts
from distill_trainer.moe import ExpertCall, expert_layers, gate_rows, record_choices, record_experts
from distill_trainer.replay import LayerCall, record_calls, replay
from distill_trainer.router import select_experts
from distill_trainer.taps import decoder_layers, final_norm, output_head, run_trunk

logger = logging.get_logger(__name__)

# A layer and what its gate decided at the anchors -> experts and weights (sum 1), each `(num_anchors, top_k)`.
LayerChoice = Callable[[int, ExpertCall], tuple[Tensor, Tensor]]


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
        experts: What the experts did of the layers that are re-routed in place, by layer.
        spans: The tokens between the anchors.
        inner_states: Input of the head at the inner tokens of the spans, `(num_inner, hidden_size)`.
        calls: How the layers were called that run again to be re-routed, by layer.
        sequence_length: Tokens in a row of the batch.
        gate_experts: What the gates of the re-routed layers chose, most weight first, `(num_anchors, gate_top_k)`, by
            layer. In a second run re-routed layers below change what a gate reads, and so its choice there.
    """

    anchors: Anchors
    last_layer: int
    residual: Tensor
    hidden_states: Tensor
    layers: dict[int, Tensor]
    attentions: dict[int, Tensor]
    experts: dict[int, ExpertCall]
    spans: Spans
    inner_states: Tensor
    calls: dict[int, LayerCall] = field(default_factory=dict)
    sequence_length: int = 0
    gate_experts: dict[int, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> Tensor:
        """Indices of the anchors among the batch's tokens, `(num_anchors,)`."""
        return self.anchors.rows * self.sequence_length + self.anchors.teacher_positions


@dataclass
class ReroutedTeacher:
    """What the teacher would hold at anchors with another choice of experts.

    Attributes:
        residual: Residual stream after the last layer, `(num_anchors, hidden_size)`, or
            `(num_anchors, num_samples, hidden_size)` for several choices per anchor.
        hidden_states: Input of the head, same shape.
        layers: Residual stream after re-routed layers below the last, `(num_anchors, hidden_size)`, by layer.
    """

    residual: Tensor
    hidden_states: Tensor
    layers: dict[int, Tensor] = field(default_factory=dict)


class Teacher:
    """A frozen causal language model. No `nn.Module`, so no optimizer, wrapper or checkpoint can reach its weights.

    Args:
        model: Any causal language model of transformers. Frozen and set to evaluation in place.
        projection: Maps its vocabulary to the student's.
        use_router: Find the experts, so that `reroute` can be called.
        router_layers: Which layers `reroute` changes, see `RoutedLayers.plan`.
        checkpointing: Keep no activations of layers that run again, see `replay`.

    Attributes:
        gate_top_k: Experts per token that the gate of the highest re-routed layer chooses, once `verify` has looked.

    Raises:
        UnsupportedModelError: If it is a mixture that cannot be re-routed, or its logits overflow.
        ConfigurationError: If `router_layers` does not fit its layers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        projection: VocabularyProjection,
        *,
        use_router: bool = True,
        router_layers: str | list[str] = "last",
        checkpointing: bool = False,
    ):
        self.model = model.eval().requires_grad_(False)
        self.projection = projection
        self.head = output_head(model, autocast=False)
        self.last_layer = model.config.num_hidden_layers - 1
        self.blocks = expert_layers(model) if use_router else {}
        self.routed = RoutedLayers.plan(router_layers, list(self.blocks)) if self.blocks else RoutedLayers()
        self.checkpointing = checkpointing
        self.gate_top_k = 0
        # Experts of the last layer alone are mixed in place: nothing above them but the norm has to run again.
        in_place = self.routed.depth in ((), (self.last_layer,))
        first = self.last_layer + 1 if in_place else self.routed.depth[0]
        self.replayed = {i: layer for i, layer in enumerate(decoder_layers(model)) if i >= first}
        # Some families scale what a block adds to the residual stream.
        self.residual_multiplier = getattr(model.config, "residual_multiplier", None) or 1.0
        if use_router and not self.blocks:
            logger.warning(f"The teacher {type(model).__name__} is dense: it teaches without a router.")

    @property
    def num_experts(self) -> int:
        """Experts of the last layer that has some, 0 for a dense teacher or without a router."""
        return len(self.gate_rows()[self.routed.depth[-1]]) if self.routed.depth else 0

    def gate_rows(self) -> dict[int, Tensor]:
        """Weight of the gate of every re-routed layer, `(num_experts, hidden_size)`, by layer."""
        return {layer: gate_rows(self.blocks[layer]) for layer in self.routed.all}

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
        in_place = [layer for layer in self.routed.targets if layer in layers]
        if not self.replayed:
            in_place += self.routed.depth
        with ExitStack() as stack:
            recorded = {layer: stack.enter_context(record_experts(self.blocks[layer])) for layer in in_place}
            choices = {layer: stack.enter_context(record_choices(self.blocks[layer])) for layer in self.routed.all}
            calls = stack.enter_context(record_calls(self.replayed))
            trunk = run_trunk(self.model, input_ids, attention_mask, layers=tapped, attention_layers=attention_layers)
        tokens = anchors.rows * input_ids.shape[1] + anchors.teacher_positions
        attentions = {
            layer: taps.over_spans(batch["teacher_positions"], attention_mask, batch["anchor_mask"])
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
            experts={layer: experts[0].at(tokens) for layer, experts in recorded.items()},
            spans=spans,
            inner_states=trunk.last_hidden_state[spans.teacher_rows, spans.teacher_positions],
            calls=calls,
            sequence_length=input_ids.shape[1],
            gate_experts={layer: experts[0][tokens] for layer, experts in choices.items()},
        )

    def reroute(self, output: TeacherOutput, choose: LayerChoice) -> ReroutedTeacher:
        """The student-aware teacher: what it would hold and say if its experts were mixed as `choose` says.

        Where only the last layer is re-routed, the mixture takes the place of the experts' own output in the residual
        stream, then the final norm follows. Otherwise the layers from the first re-routed one run again. Gradients
        reach the routing weights only.

        Args:
            output: Of a call with the same text.
            choose: Gets a layer and what its gate decided at the anchors, and gives the experts and weights (sum 1) to
                use there, each `(num_anchors, top_k)`. Several mixtures per anchor, `(num_anchors, num_samples,
                top_k)`, are possible where only the last layer is re-routed.
        """
        with torch.autocast(self.model.device.type, enabled=False):
            layers = {i: self._in_place(output, i, choose) for i in output.experts if i not in self.routed.depth}
            if self.replayed:
                layers |= self._again(output, choose)
                residual = layers.pop(self.last_layer)
            else:
                residual = self._in_place(output, self.last_layer, choose)
            return ReroutedTeacher(residual, final_norm(self.model)(residual), layers)

    def _in_place(self, output: TeacherOutput, layer: int, choose: LayerChoice) -> Tensor:
        """Residual stream after a layer with another mixture in the place of its experts' own output."""
        own = output.experts[layer]
        mixture = mix_experts(self.blocks[layer], own.hidden_states, *like_the_gate(own, *choose(layer, own)))
        residual = output.residual if layer == self.last_layer else output.layers[layer]
        if mixture.ndim == 3:
            residual, before = residual.unsqueeze(1), own.output.unsqueeze(1)
        else:
            before = own.output
        return residual + (mixture - before) * self.residual_multiplier

    def _again(self, output: TeacherOutput, choose: LayerChoice) -> dict[int, Tensor]:
        """Residual stream at the anchors after each layer of a second run with re-routed experts."""

        def changed(layer: int) -> AbstractContextManager:
            if layer not in self.routed.depth:
                return nullcontext()
            return reroute_experts(self.blocks[layer], output.tokens, partial(choose, layer))

        residuals = replay(self.replayed, output.calls, changed, checkpointing=self.checkpointing)
        return {layer: residual.flatten(0, 1)[output.tokens] for layer, residual in residuals.items()}

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
        if self.routed.depth:
            self.gate_top_k = output.gate_experts[self.routed.depth[-1]].shape[-1]
            self._verify_gates(output)
            self._verify_reroute(input_ids, output)

    def _verify_gates(self, output: TeacherOutput) -> None:
        """Compare what the gates did with what their scores say, from which the router starts."""

        def as_scored(layer: int, own: ExpertCall) -> tuple[Tensor, Tensor]:
            return select_experts(own.gate_logits, own.selected_experts.shape[-1], 1.0)[::-1]

        rerouted = self.reroute(output, as_scored)
        way_out = "Set use_router to false to distil from its own gate"
        self._check("gate", self.head(rerouted.hidden_states), self.head(output.hidden_states), way_out)

    def _verify_reroute(self, input_ids: Tensor, output: TeacherOutput) -> None:
        """Compare `reroute` with the model run while other experts are forced on its blocks."""

        def another(own: ExpertCall) -> tuple[Tensor, Tensor]:
            chosen = ((own.selected_experts + 1) % own.router_logits.shape[-1])[:, :1]
            return chosen, torch.ones_like(chosen, dtype=torch.float32)

        with ExitStack() as stack:
            for layer in self.routed.depth:
                stack.enter_context(reroute_experts(self.blocks[layer], output.tokens, another))
            expected = self.model(input_ids=input_ids, use_cache=False).logits[0, :-1]
        rerouted = self.reroute(output, lambda layer, own: another(own))
        # A norm between experts and residual stream is right where whole layers run again.
        way_out = "Use another teacher" if self.replayed else "Set router_layers to last:2 or all"
        self._check("re-routing", self.head(rerouted.hidden_states), expected, way_out)

    def _check(self, what: str, found: Tensor, expected: Tensor, way_out: str = "Use another teacher") -> None:
        tolerance = {torch.float32: 1e-3, torch.float16: 1e-2}.get(expected.dtype, 6e-2)
        difference = (found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-3)
        if not difference < tolerance:
            raise UnsupportedModelError(
                f"The {what} of the teacher {type(self.model).__name__} does more than this package knows: its logits "
                f"differ by {difference:.1e} of their size. {way_out}."
            )
