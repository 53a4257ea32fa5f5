"""What a few positions contribute to the losses over the vocabulary, from both models' logits there."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_trainer.aligned import AnchorBatch, RoutedBatch
from distill_trainer.alignment import VocabularyProjection
from distill_trainer.losses.cross_tokenizer import alm_divergence, hybrid_distance, top_k_divergence, uld_distance
from distill_trainer.losses.gap_weights import gap_weights
from distill_trainer.losses.logits import divergence, kl_divergence, mean_belief
from distill_trainer.losses.span_correction import correct_spans
from distill_trainer.router import student_divergence


@dataclass(frozen=True)
class LogitSettings:
    """How the models are compared; the settings of the same names, see `DistillationArguments`."""

    kl_method: str = "projected"
    kl_direction: str = "forward"
    kl_top_k: int = 64
    span_correction: bool = True
    gap_weighting: bool = False
    logit_chunk_mb: float | None = None
    router_student_weight: float = 0.1

    @property
    def corrects_spans(self) -> bool:
        """Whether the projected beliefs are corrected; the other methods do not use them."""
        return self.span_correction and self.kl_method in ("projected", "topk")


@dataclass
class Survey:
    """What a first look at the logits, without gradient, says at the anchors. In nats, `(num_anchors,)`.

    The first three are None where nothing needs them before the losses: the look is a pass through both heads.

    Attributes:
        gap: KL(teacher with its own gate || student).
        entropy: Of the student's next token, over its maximum, in [0, 1].
        true_logprobs: Log-probability that the student gives its true next token.
        span_logprobs: Log-probability that the student gives all its tokens up to the next anchor; None if not needed.
        inner_logprobs: Log-probability that the teacher gives its tokens up to the next anchor but for the first; None
            if not needed.
    """

    gap: Tensor | None = None
    entropy: Tensor | None = None
    true_logprobs: Tensor | None = None
    span_logprobs: Tensor | None = None
    inner_logprobs: Tensor | None = None


class AnchorLoss:
    """Sum of the weighted logit losses over some positions of a batch.

    Called with anchors it sees both models' logits; called with other positions only the student's. The losses are
    sums, so that any division into chunks gives the same.

    Args:
        settings: How the models are compared.
        projection: From the teacher's vocabulary to the student's.
        at: The batch.
        routed: The student-aware teacher.
        survey: Of the batch.
        weights: Weight of `kl` and `lm`, 0 skips one.
        temperature: Softmax temperature of the KL.
        first_logprobs: The student-aware teacher's log-probability of its next token at the anchors, `(num_anchors,)`;
            only `alm` needs it beforehand.
    """

    # What `__call__` reports, in this order: sums over positions, in nats.
    REPORTED = ("lm", "kl", "ce", "student_kl", "gap", "gap_difference")

    def __init__(
        self,
        settings: LogitSettings,
        projection: VocabularyProjection,
        at: AnchorBatch,
        routed: RoutedBatch,
        survey: Survey,
        *,
        weights: dict[str, float],
        temperature: float,
        first_logprobs: Tensor | None = None,
    ):
        self.settings, self.projection, self.at, self.survey = settings, projection, at, survey
        self.weights, self.temperature = weights, temperature
        self.routes = bool(routed.decisions)
        self.num_items = max(len(at.labels), 1) if at.num_items is None else at.num_items
        self.num_anchors = max(len(at.upcoming), 1) if at.num_anchors is None else at.num_anchors
        self.anchor_weights = (
            gap_weights(survey.gap, at.mask)
            if settings.gap_weighting
            else torch.ones(len(at.upcoming), device=at.upcoming.device)
        )
        spans = at.teacher.spans
        self.corrected = spans.complete & spans.one_student_token & (spans.num_inner > 0)
        self.corrects = self.corrected.tolist() if settings.corrects_spans else []
        if settings.kl_method == "alm" and weights["kl"]:
            self._match_spans(first_logprobs)

    def __call__(self, rows: slice, student_logits: Tensor, teacher_logits: Tensor | None) -> tuple[Tensor, Tensor]:
        """Loss of the positions `rows`, times the predicted tokens of the whole batch; and the reported sums.

        Args:
            rows: Of the batch's `num_positions`.
            student_logits: `(num_rows, student_vocab_size)`, float32.
            teacher_logits: Of the student-aware teacher, `(num_rows, teacher_vocab_size)`, float32; written over; or
                several, `(num_rows, num_samples, teacher_vocab_size)`. None if the rows are no anchors.
        """
        if teacher_logits is not None and teacher_logits.ndim == 3:
            teacher_logits = mean_belief(teacher_logits)
        sums = {name: student_logits.new_zeros(()) for name in self.REPORTED}
        student_logprobs = F.log_softmax(student_logits, dim=-1)
        true_logprobs = _picked(student_logprobs, self.at.labels[rows])
        total = true_logprobs.sum() * 0
        if self.weights["lm"]:
            sums["lm"] = -true_logprobs.sum()
            total = total + self.weights["lm"] * sums["lm"]
        # Anchors count by their own number: the caller divides everything by the predicted tokens.
        per_anchor = self.num_items / self.num_anchors
        if self.weights["kl"] and self.settings.kl_method == "alm":
            sums["kl"] = self._alm(rows, true_logprobs)
        if teacher_logits is not None:
            if self.weights["kl"] and self.settings.kl_method in ("uld", "hybrid"):
                sums["kl"] = self._unprojected(rows, student_logits, teacher_logits)
            # The logits are gone from here on: the projection writes over them.
            teacher_logprobs, first_logprobs = self.projection.log_probs_(teacher_logits, self.at.upcoming[rows])
            ahead = _picked(teacher_logprobs, self.at.labels[rows]) - true_logprobs
            sums["gap_difference"] = ahead[self.at.teacher.anchors.same_next[rows]].sum()
            if self.survey.gap is None:
                # Without a router the teacher here is the teacher as it is.
                beliefs = teacher_logprobs.detach(), student_logprobs.detach()
                sums["gap"] = kl_divergence(*beliefs).clamp(min=0).sum()
            else:
                sums["gap"] = self.survey.gap[rows].sum()
            if self.routes:
                sums["ce"] = -first_logprobs.sum()
                # Without the spans' correction, which moves mass to student tokens that no teacher token begins with.
                reachable = self.projection.reachable
                sums["student_kl"] = student_divergence(student_logprobs, teacher_logprobs, reachable).sum()
                total = total + per_anchor * (sums["ce"] + self.settings.router_student_weight * sums["student_kl"])
            if self.weights["kl"] and self.settings.kl_method in ("projected", "topk"):
                target = self._target(rows, teacher_logprobs, first_logprobs)
                sums["kl"] = self._projected(rows, student_logits, student_logprobs, target)
        total = total + per_anchor * self.weights["kl"] * sums["kl"]
        return total, torch.stack([sums[name].detach() for name in self.REPORTED])

    def parts(self, sums: Tensor) -> dict[str, Tensor]:
        """The reported sums of all positions as means, by name; `gap_difference` stays a sum."""
        counts = {"lm": self.num_items, "gap_difference": 1}
        return {name: sums[i] / counts.get(name, self.num_anchors) for i, name in enumerate(self.REPORTED)}

    def _target(self, rows: slice, teacher_logprobs: Tensor, first_logprobs: Tensor) -> Tensor:
        """What the student learns from: the projected log-probabilities, with the spans corrected; detached."""
        if not any(self.corrects[rows]):
            return teacher_logprobs.detach()
        spelled = (first_logprobs.detach() + self.survey.inner_logprobs[rows]).masked_fill(
            ~self.corrected[rows], -torch.inf
        )
        first_ids = self.projection.student_ids[self.at.upcoming[rows]]
        return correct_spans(teacher_logprobs.detach(), first_ids, self.at.labels[rows], spelled)

    def _projected(self, rows: slice, logits: Tensor, logprobs: Tensor, target: Tensor) -> Tensor:
        """Sum of the weighted divergences over the student's vocabulary."""
        settings, temperature = self.settings, self.temperature
        options: dict[str, Any] = {"temperature": temperature, "direction": settings.kl_direction}
        if settings.kl_method == "topk":
            values = top_k_divergence(logits, target, top_k=settings.kl_top_k, **options)
        else:
            if temperature != 1:
                logprobs, target = (F.log_softmax(x / temperature, dim=-1) for x in (logits, target))
            values = temperature**2 * divergence(logprobs, target, settings.kl_direction)
        return (self.anchor_weights[rows] * values).sum()

    def _unprojected(self, rows: slice, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Sum of the weighted distances between sorted probabilities."""
        # Rows of the teacher's head that are no token take no part.
        teacher_logits = teacher_logits.detach().masked_fill(self.projection.student_ids < 0, -torch.inf)
        options: dict[str, Any] = {"temperature": self.temperature}
        if self.settings.kl_method == "uld":
            values = uld_distance(student_logits, teacher_logits, **options)
        else:
            options["direction"] = self.settings.kl_direction
            values = hybrid_distance(student_logits, teacher_logits, *self.projection.matches, **options)
        return (self.anchor_weights[rows] * values).sum()

    def _alm(self, rows: slice, true_logprobs: Tensor) -> Tensor:
        """Sum of the spans' values, which were computed from all their tokens, with the gradient to these tokens."""
        slope = self.span_slopes[rows] * (true_logprobs - true_logprobs.detach())
        return slope.sum() + self.span_values[rows].sum()

    def _match_spans(self, first_logprobs: Tensor) -> None:
        """Compare the likelihoods of whole spans, and how each changes with the student's token log-probabilities."""
        spans = self.at.teacher.spans
        with torch.enable_grad():
            student = self.survey.span_logprobs.detach().requires_grad_()
            values = (
                self.anchor_weights
                * spans.complete
                * alm_divergence(
                    student,
                    first_logprobs + self.survey.inner_logprobs,
                    temperature=self.temperature,
                    direction=self.settings.kl_direction,
                )
            )
            (slopes,) = torch.autograd.grad(values.sum(), student)
        self.span_values = values.detach()
        # -1 stands for no span: the added last entry is 0.
        self.span_slopes = F.pad(slopes, (0, 1))[self.at.owner]


def _picked(logprobs: Tensor, ids: Tensor) -> Tensor:
    """The entry of each row, `(num_rows, vocab_size)` and `(num_rows,)` -> `(num_rows,)`."""
    return logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
