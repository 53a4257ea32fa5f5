"""Both models' heads, run over the positions of a batch a few at a time."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from distill_trainer.aligned import AnchorBatch, RoutedBatch
from distill_trainer.logit_loss import AnchorLoss, LogitSettings, Survey
from distill_trainer.losses.fused import fused_loss, unfused_loss
from distill_trainer.losses.heads import Head
from distill_trainer.losses.logits import kl_divergence, mean_belief
from distill_trainer.losses.reduction import row_dot
from distill_trainer.teacher import Teacher

logger = logging.get_logger(__name__)

# Float32 copies of a position's logits over the student's and the teacher's vocabulary that a chunk holds at its peak.
COPIES = {"projected": (7, 2), "topk": (7, 2), "uld": (9, 6), "hybrid": (10, 6), "alm": (6, 2)}
# The same for the passes that compare nothing: LM alone, and those without gradient.
TEXT_COPIES, LOOK_COPIES = (4, 0), (5, 1)
# Jensen-Shannon holds the mixture of both sides as well.
JS_COPIES = 3
# Without a budget the chunks may take this share of what all logits would, within these bytes: a matrix product over a
# few positions takes far longer for each, and a small batch is no reason to save.
LOGIT_SHARE, LEAST_BYTES, MOST_BYTES = 0.14, 2e8, 5e8


class LogitPass:
    """The heads of the student and, unless it trains on the text alone, of the frozen teacher.

    Args:
        settings: How the models are compared.
        head: The student's.
        teacher: None without one.
        num_positions: Positions of the batch, which set the budget where the settings give none.
    """

    def __init__(self, settings: LogitSettings, head: Head, teacher: Teacher | None = None, *, num_positions: int):
        self.settings, self.head, self.teacher, self.num_positions = settings, head, teacher, num_positions

    def text_loss(self, states: Tensor, labels: Tensor, *, num_items: Tensor | float | None) -> Tensor:
        """The LM loss alone, see `lm_loss`.

        Args:
            states: Input of the student's head, `(num_positions, hidden_size)`.
            labels: True next tokens, `(num_positions,)`.
            num_items: See `token_mean`.
        """

        def chunk_loss(rows: slice, logits: Tensor, _) -> tuple[Tensor, Tensor]:
            nats = F.cross_entropy(logits, labels[rows], reduction="sum")
            return nats, nats.detach()

        scale = 1 / (max(len(labels), 1) if num_items is None else num_items)
        return self._run(chunk_loss, states, None, scale, TEXT_COPIES)[0]

    @torch.no_grad()
    def token_logprobs(self, head: Head, states: Tensor, ids: Tensor) -> Tensor:
        """Log-probability that a head gives each token, `(num_positions,)`, nats; of several states, of their mean."""
        values = []
        for rows in self._chunks(ids):
            logits = head(states[rows]).float()
            logits = logits if logits.ndim == 2 else mean_belief(logits)
            values.append(-F.cross_entropy(logits, ids[rows], reduction="none"))
        return torch.cat(values)

    @torch.no_grad()
    def survey(self, at: AnchorBatch, *, routes: bool = True) -> Survey:
        """Look at both models' logits at the anchors, before the router chooses.

        Args:
            at: The batch.
            routes: Whether a router will ask for the gap and the student's beliefs. Without one they are looked at
                only if the settings need them.
        """
        spans, alm = at.teacher.spans, self.settings.kl_method == "alm"
        survey = Survey()
        if routes or alm or self.settings.gap_weighting:
            survey = Survey(*torch.cat([self._look(at, rows) for rows in self._chunks(at.upcoming)], dim=1))
        if alm or self.settings.corrects_spans:
            inner = self.token_logprobs(self.teacher.head, at.teacher.inner_states, spans.teacher_targets)
            survey.inner_logprobs = spans.inner_sums(inner)
        if alm:
            others = slice(len(at.upcoming), None)
            inside = at.owner[others] >= 0
            logprobs = self.token_logprobs(self.head, at.hidden_states[others], at.labels[others])
            survey.span_logprobs = survey.true_logprobs.index_add(0, at.owner[others][inside], logprobs[inside])
        return survey

    def _look(self, at: AnchorBatch, rows: slice) -> Tensor:
        """Gap, entropy and true log-probability at some anchors, `(3, num_rows)`."""
        rows = slice(rows.start, min(rows.stop, len(at.upcoming)))
        teacher_logits = self.teacher.head(at.teacher.hidden_states[rows]).float()
        own, _ = self.teacher.projection.log_probs_(teacher_logits, at.upcoming[rows])
        del teacher_logits
        student = F.log_softmax(self.head(at.hidden_states[rows]).float(), dim=-1)
        gap = kl_divergence(own, student).clamp(min=0)
        entropy = -row_dot(student.exp(), student) / math.log(student.shape[-1])
        return torch.stack([gap, entropy, student.gather(-1, at.labels[rows].unsqueeze(-1)).squeeze(-1)])

    def losses(
        self, at: AnchorBatch, routed: RoutedBatch, survey: Survey, *, weights: dict[str, float], temperature: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """KL, LM and the parts of the router's objective that need logits.

        Args:
            at: The batch.
            routed: The student-aware teacher.
            survey: Of the same batch.
            weights: Weight of `kl` and `lm`; 0 skips one.
            temperature: Softmax temperature of the KL.

        Returns:
            The weighted sum, with gradients to the student (from `kl` and `lm`) and to `routed` (from `ce` and
            `student_kl`); and the unweighted parts, detached: means by name, and `gap_difference`, by how much the
            student's loss on its true tokens is above the student-aware teacher's, summed over the anchors of
            `same_next`.
        """
        alm = self.settings.kl_method == "alm" and weights["kl"] > 0
        first = self.token_logprobs(self.teacher.head, routed.hidden_states, at.upcoming) if alm else None
        loss = AnchorLoss(
            self.settings,
            self.teacher.projection,
            at,
            routed,
            survey,
            weights=weights,
            temperature=temperature,
            first_logprobs=first,
        )
        states = at.hidden_states if weights["lm"] or alm else at.hidden_states[: len(at.upcoming)]
        student, teacher = COPIES[self.settings.kl_method]
        # Of several choices of experts at an anchor each has its own logits, and its own gradient.
        samples = 1 if routed.hidden_states.ndim == 2 else 2 * routed.hidden_states.shape[1]
        copies = (student + JS_COPIES * (self.settings.kl_direction == "js"), teacher * samples)
        total, sums = self._run(loss, states, routed.hidden_states, 1 / loss.num_items, copies)
        return total, loss.parts(sums)

    def _run(self, chunk_loss, states: Tensor, teacher_states: Tensor | None, scale, copies: tuple[int, int]):
        heads = (self.head, None if self.teacher is None else self.teacher.head)
        sides = (states, heads[0], teacher_states, heads[1])
        if self._are_whole():
            return fused_loss(chunk_loss, *sides, chunk_size=self._chunk_size(copies), scale=scale)
        logger.warning_once(
            "A head is sharded or packed outside of its forward: all logits of a batch are held at once."
        )
        return unfused_loss(chunk_loss, *sides, scale=scale)

    def _are_whole(self) -> bool:
        return self.head.is_whole() and (self.teacher is None or self.teacher.head.is_whole())

    def _chunk_size(self, copies: tuple[int, int]) -> int:
        """Positions whose logits fit the budget in so many copies of the student's and of the teacher's."""
        rows = (4 * self.head.vocab_size, 0 if self.teacher is None else 4 * self.teacher.head.vocab_size)
        budget = min(max(LOGIT_SHARE * self.num_positions * sum(rows), LEAST_BYTES), MOST_BYTES)
        if self.settings.logit_chunk_mb is not None:
            budget = 1e6 * self.settings.logit_chunk_mb
        return max(int(budget // (copies[0] * rows[0] + copies[1] * rows[1])), 1)

    def _chunks(self, rows: Tensor) -> Iterator[slice]:
        # Every call of a sharded head gathers it on all ranks, so each rank must make just one, whatever its rows.
        size = self._chunk_size(LOOK_COPIES) if self._are_whole() else max(len(rows), 1)
        return (slice(start, start + size) for start in range(0, max(len(rows), 1), size))
