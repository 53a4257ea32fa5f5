"""Losses over the vocabulary: KL and Jensen-Shannon divergence to the teacher, cross-entropy to the text."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_trainer.errors import ConfigurationError
from distill_trainer.losses.reduction import check_mask, row_dot, select_pairs, token_mean

# Log of the smallest normal float32. A probability of exactly 0 counts as this, so that no divergence is infinite.
LOGPROB_FLOOR = -87.0


def kl_divergence(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """KL(P || Q) in nats over the last dimension, P from `logprobs` and Q from `other_logprobs`.

    Args:
        logprobs: Finite log-probabilities of P, `(..., vocab_size)`.
        other_logprobs: Finite log-probabilities of Q, same shape.

    Returns:
        `(...)`.
    """
    return row_dot(logprobs.exp(), logprobs - other_logprobs)


def mean_belief(logits: Tensor) -> Tensor:
    """Logarithm of the mean of several distributions, `(num_rows, num_samples, vocab_size)` -> without samples."""
    return F.log_softmax(logits.float(), dim=-1).logsumexp(dim=1) - math.log(logits.shape[1])


def divergence(student_logprobs: Tensor, teacher_logprobs: Tensor, direction: str) -> Tensor:
    """Divergence of the student's distribution from the teacher's in nats, see `kl_divergence_loss` for directions.

    Args:
        student_logprobs: Finite log-probabilities, `(..., num_outcomes)`.
        teacher_logprobs: Same shape.
        direction: `forward`, `reverse` or `js`.

    Returns:
        `(...)`.

    Raises:
        ConfigurationError: If the direction is unknown.
    """
    if direction == "forward":
        return kl_divergence(teacher_logprobs, student_logprobs)
    if direction == "reverse":
        return kl_divergence(student_logprobs, teacher_logprobs)
    if direction == "js":
        mixture = torch.logaddexp(student_logprobs, teacher_logprobs) - math.log(2)
        return (kl_divergence(teacher_logprobs, mixture) + kl_divergence(student_logprobs, mixture)) / 2
    raise ConfigurationError(f"direction must be one of forward, reverse, js, got {direction!r}.")


def kl_divergence_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    direction: str = "forward",
    token_weights: Tensor | None = None,
    num_items_in_batch: Tensor | int | float | None = None,
) -> Tensor:
    r"""Divergence of the student from the teacher over the vocabulary, times `temperature ** 2`.

    With p the teacher's and q the student's softmax at the temperature:

    - forward: KL(p || q) = sum p log(p / q), the student covers all that the teacher holds likely
      (Hinton et al. 2015, section 2, https://huggingface.co/papers/1503.02531);
    - reverse: KL(q || p), the student avoids what the teacher holds unlikely
      (https://huggingface.co/papers/2306.08543);
    - js: (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, between 0 and log 2
      (the generalised one of https://huggingface.co/papers/2306.13649 at one half).

    The factor keeps the gradient's size independent of the temperature (Hinton et al. 2015).

    A logit of -inf is a probability of 0 whose logarithm counts as -87. Where the teacher has it, forward gets 0 from
    that entry and reverse q * (log q + 87) in place of infinity; where the student has it, forward gets
    p * (log p + 87), and the entry itself receives no gradient.

    Args:
        student_logits: `(..., vocab_size)`, shifted and aligned by the caller.
        teacher_logits: Same shape. Logits, or log-probabilities up to a constant per token. Receives no gradient.
        mask: True where a token counts, bool, `(...)`. Other positions may hold anything.
        temperature: Softmax temperature of both sides, above 0.
        direction: See above.
        token_weights: Factor of each token, shape of `mask`, see `gap_weights`. Detached. None weighs all alike.
        num_items_in_batch: See `token_mean`.

    Returns:
        Scalar float32, in nats per token.

    Raises:
        ConfigurationError: If the logits differ in shape, or the direction is unknown.
    """
    student_logits, teacher_logits = select_pairs(student_logits, teacher_logits, mask)
    student, teacher = (tempered_logprobs(logits, temperature) for logits in (student_logits, teacher_logits))
    per_token = divergence(student, teacher, direction)
    weights = None if token_weights is None else token_weights[mask].detach().float()
    return temperature**2 * token_mean(per_token, num_items_in_batch, weights)


def lm_loss(
    student_logits: Tensor,
    labels: Tensor,
    mask: Tensor,
    *,
    num_items_in_batch: Tensor | int | float | None = None,
) -> Tensor:
    """Cross-entropy of the student on the true next tokens.

    Args:
        student_logits: `(..., vocab_size)`, already shifted: the logits at a position predict the label there.
        labels: Token ids, long, `(...)`.
        mask: True where a token counts, bool, `(...)`. Labels are -100 only where it is False.
        num_items_in_batch: See `token_mean`.

    Returns:
        Scalar float32, in nats per token.
    """
    check_mask(mask)
    per_token = F.cross_entropy(student_logits[mask].float(), labels[mask], reduction="none")
    return token_mean(per_token, num_items_in_batch)


def tempered_logprobs(logits: Tensor, temperature: float) -> Tensor:
    """Log-softmax at a temperature, finite: a logit of -inf becomes `LOGPROB_FLOOR`."""
    logprobs = F.log_softmax(logits / temperature, dim=-1)
    return logprobs.masked_fill(logprobs.isneginf(), LOGPROB_FLOOR)
