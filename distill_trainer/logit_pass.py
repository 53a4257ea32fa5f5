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
from distill_trainer.losses.logits import kl_divergence
from distill_trainer.teacher import Teacher

logger = logging.get_logger(__name__)

# Float32 copies of one position's logits that a chunk holds at its peak.
STUDENT_COPIES, TEACHER_COPIES = 8, 6
# Without a budget the chunks may take this share of what all logits would, and at most so many bytes.
LOGIT_SHARE, MOST_BYTES = 0.10, 2**29


class LogitPass:
    """The heads of the student and, unless it trains on the text alone, of the frozen teacher.

    Args:
        settings: How the models are compared.
        head: The student's.
        teacher: None without one.
    """

    def __init__(self, settings: LogitSettings, head: Head, teacher: Teacher | None = None):
        self.settings, self.head, self.teacher = settings, head, teacher

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
        return self._run(chunk_loss, states, None, scale)[0]

    @torch.no_grad()
    def token_logprobs(self, head: Head, states: Tensor, ids: Tensor) -> Tensor:
        """Log-probability that a head gives each token, `(num_positions,)`, nats."""
        pieces = [
            -F.cross_entropy(head(states[rows]).float(), ids[rows], reduction="none") for rows in self._chunks(states)
        ]
        return torch.cat(pieces)

    @torch.no_grad()
    def survey(self, at: AnchorBatch) -> Survey:
        """Look at both models' logits at the anchors, before the router chooses."""
        pieces = []
        for rows in self._chunks(at.teacher.hidden_states):
            student = F.log_softmax(self.head(at.hidden_states[: len(at.upcoming)][rows]).float(), dim=-1)
            own = self.teacher.projection.log_probs(self.teacher.head(at.teacher.hidden_states[rows]))
            entropy = -(student.exp() * student).sum(dim=-1) / math.log(student.shape[-1])
            true = student.gather(-1, at.labels[: len(at.upcoming)][rows].unsqueeze(-1)).squeeze(-1)
            pieces.append(torch.stack([kl_divergence(own, student).clamp(min=0), entropy, true]))
        survey = Survey(*torch.cat(pieces, dim=1))
        spans, alm = at.teacher.spans, self.settings.kl_method == "alm"
        if alm or self.settings.span_correction:
            inner = self.token_logprobs(self.teacher.head, at.teacher.inner_states, spans.teacher_targets)
            survey.inner_logprobs = spans.inner_sums(inner)
        if alm:
            others = slice(len(at.upcoming), None)
            inside = at.owner[others] >= 0
            logprobs = self.token_logprobs(self.head, at.hidden_states[others], at.labels[others])
            survey.span_logprobs = survey.true_logprobs.index_add(0, at.owner[others][inside], logprobs[inside])
        return survey

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
            `student_kl`); and the unweighted parts, detached: means by name, and `teacher_loss`, the student-aware
            teacher's loss on the student's true tokens, summed over the anchors of `same_next`.
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
        total, sums = self._run(loss, states, routed.hidden_states, 1 / loss.num_items)
        return total, loss.parts(sums)

    def _run(self, chunk_loss, states: Tensor, teacher_states: Tensor | None, scale) -> tuple[Tensor, Tensor]:
        heads = (self.head, None if self.teacher is None else self.teacher.head)
        sides = (states, heads[0], teacher_states, heads[1])
        if all(head is None or head.is_whole() for head in heads):
            return fused_loss(chunk_loss, *sides, chunk_size=self._chunk_size(len(states)), scale=scale)
        logger.warning_once("A head is sharded outside of its forward: all logits of a batch are held at once.")
        return unfused_loss(chunk_loss, *sides, scale=scale)

    def _chunk_size(self, num_positions: int) -> int:
        """Positions whose logits, with the copies that the losses make of them, fit the budget."""
        student_row = 4 * self.head.vocab_size
        teacher_row = 0 if self.teacher is None else 4 * self.teacher.head.vocab_size
        budget = min(LOGIT_SHARE * num_positions * (student_row + teacher_row), MOST_BYTES)
        if self.settings.logit_chunk_mb is not None:
            budget = 1e6 * self.settings.logit_chunk_mb
        return max(int(budget // (STUDENT_COPIES * student_row + TEACHER_COPIES * teacher_row)), 1)

    def _chunks(self, states: Tensor) -> Iterator[slice]:
        size = self._chunk_size(len(states))
        return (slice(start, start + size) for start in range(0, max(len(states), 1), size))
