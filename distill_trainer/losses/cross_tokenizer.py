"""Distances between distributions of models with different vocabularies: one value per anchor or chunk, float32."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_trainer.errors import ConfigurationError
from distill_trainer.losses.logits import LOGPROB_FLOOR, divergence, tempered_logprobs


def top_k_divergence(
    student_logits: Tensor, teacher_logprobs: Tensor, *, top_k: int, temperature: float, direction: str
) -> Tensor:
    """Divergence over the teacher's likeliest tokens and one bucket with all others, times `temperature ** 2`.

    The bucket is the ghost token of Sparse Logit Sampling (https://huggingface.co/papers/2503.16870). It makes this a
    true divergence, at most the one over the whole vocabulary and equal to it where `top_k` covers the vocabulary.

    Args:
        student_logits: `(num_anchors, student_vocab_size)`. A logit of -inf marks a row that is no token.
        teacher_logprobs: The teacher's log-probabilities over the student's vocabulary, same shape. No gradient.
        top_k: Tokens that keep an outcome of their own, at least 1. More than the vocabulary holds means all.
        temperature: Softens both sides over the whole vocabulary, above 0.
        direction: See `kl_divergence_loss`. A token or bucket without any probability has the log-probability -87.

    Returns:
        `(num_anchors,)`, in nats.

    Raises:
        ConfigurationError: If the two sides differ in shape.
    """
    if student_logits.shape != teacher_logprobs.shape:
        shapes = f"{tuple(student_logits.shape)} and {tuple(teacher_logprobs.shape)}"
        raise ConfigurationError(f"student_logits and teacher_logprobs must have the same shape, got {shapes}.")
    likeliest = teacher_logprobs.detach().topk(min(top_k, teacher_logprobs.shape[-1]), dim=-1).indices
    coarse = []
    for logits in (student_logits, teacher_logprobs.detach()):
        # From the logits, for gather keeps what it reads: so the scaled copy is the only one, overwritten in place.
        chosen = logits.gather(-1, likeliest).float() / temperature
        rest = (logits.float() / temperature).scatter_(-1, likeliest, -math.inf)
        coarse.append(tempered_logprobs(_coarse_logits(chosen, rest), 1.0))
    return temperature**2 * divergence(coarse[0], coarse[1], direction)


def uld_distance(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """L1 distance between the sorted probabilities of both sides, times `temperature`.

    Universal Logit Distillation (https://huggingface.co/papers/2402.12030): which token has a probability does not
    matter. The factor, which the paper lacks, keeps the gradient's size as a softened softmax's shrinks by it.

    Args:
        student_logits: `(num_anchors, student_vocab_size)`. A logit of -inf marks a row that is no token.
        teacher_logits: `(num_anchors, teacher_vocab_size)`, likewise. Receives no gradient.
        temperature: Softmax temperature of both sides, above 0.

    Returns:
        `(num_anchors,)`, between 0 and `2 * temperature`.
    """
    sides = (student_logits, teacher_logits.detach())
    return temperature * _sorted_distance(*(F.softmax(logits.float() / temperature, dim=-1) for logits in sides))


def hybrid_distance(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_matches: Tensor,
    teacher_matches: Tensor,
    *,
    temperature: float,
    direction: str,
) -> Tensor:
    """Divergence over the tokens that both vocabularies hold, plus the distance of `uld_distance` over all others.

    After GOLD (https://huggingface.co/docs/trl/gold_trainer), but with one more outcome that holds all mass without a
    match, so that the divergence is one. It is multiplied by `temperature ** 2`, the distance by `temperature`.

    Args:
        student_logits: `(num_anchors, student_vocab_size)`. A logit of -inf marks a row that is no token.
        teacher_logits: `(num_anchors, teacher_vocab_size)`, likewise. Receives no gradient.
        student_matches: Ids of the student's tokens that match, long, `(num_matches,)`. May be empty.
        teacher_matches: Id of the teacher's token for each of them, long, `(num_matches,)`.
        temperature: Softmax temperature of both sides over their whole vocabularies, above 0. A high one gives
            the bucket different masses in vocabularies of different sizes, and the gradient then grows with it.
        direction: See `top_k_divergence`.

    Returns:
        `(num_anchors,)`, nats plus probabilities.

    Raises:
        ConfigurationError: If the matches differ in number or name a token twice.
    """
    sides = []
    for logits, matches in ((student_logits, student_matches), (teacher_logits.detach(), teacher_matches)):
        unmatched = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device).index_fill(0, matches, False)
        others = unmatched.nonzero().squeeze(-1)
        if len(others) != logits.shape[-1] - len(student_matches):
            raise ConfigurationError("student_matches and teacher_matches must be as many and name each token once.")
        chosen, rest = (logits.index_select(-1, ids).float() / temperature for ids in (matches, others))
        coarse = _coarse_logits(chosen, rest)
        sides.append((tempered_logprobs(coarse, 1.0), (rest - coarse.logsumexp(dim=-1, keepdim=True)).exp()))
    (student, student_rest), (teacher, teacher_rest) = sides
    matched = temperature**2 * divergence(student, teacher, direction)
    return matched + temperature * _sorted_distance(student_rest, teacher_rest)


def alm_divergence(
    student_logprobs: Tensor, teacher_logprobs: Tensor, *, temperature: float, direction: str
) -> Tensor:
    """Divergence between how likely both models hold a chunk of text and how unlikely, times `temperature`.

    Approximate likelihood matching (https://huggingface.co/papers/2503.20083): between (p, 1 - p) of each side with
    p = likelihood ** (1 / temperature). For a high temperature 1 - p is -log(likelihood) / temperature, hence the
    factor. Where p is exactly 1, log(1 - p) counts as -87 and has no gradient.

    Args:
        student_logprobs: Log-likelihood of each chunk, the sum over its tokens, at most 0, in nats, `(num_chunks,)`.
        teacher_logprobs: Of the same text under the teacher, same shape. Receives no gradient.
        temperature: Above 0; the higher, the better it tells small likelihoods apart.
        direction: See `kl_divergence_loss`.

    Returns:
        `(num_chunks,)`, in nats.
    """
    scaled = torch.stack([student_logprobs, teacher_logprobs.detach()]).float() / temperature
    # The nearest that a p comes to 1: log(1 - p) is the floor there, and beyond it the gradient 0, not infinite.
    scaled = scaled.masked_fill(scaled.isneginf(), LOGPROB_FLOOR).clamp(max=-math.exp(LOGPROB_FLOOR))
    # Each form is exact where the other cancels. The bound keeps NaN out of the gradient of the one not taken.
    unlikely = torch.log1p(-scaled.clamp(max=-math.log(2)).exp())
    outcomes = torch.stack([scaled, torch.where(scaled > -math.log(2), (-scaled.expm1()).log(), unlikely)], dim=-1)
    return temperature * divergence(outcomes[0], outcomes[1], direction)


def _coarse_logits(chosen: Tensor, rest: Tensor) -> Tensor:
    """The chosen logits and, as the last, the one of `rest` taken together, -inf where that holds nothing.

    Rows of `rest` with nothing but -inf are overwritten by the lowest float: logsumexp would give them a NaN gradient.
    """
    empty = rest.isneginf().all(dim=-1, keepdim=True)
    bucket = rest.masked_fill_(empty, torch.finfo(rest.dtype).min).logsumexp(dim=-1, keepdim=True)
    return torch.cat([chosen, bucket.masked_fill(empty, -math.inf)], dim=-1)


def _sorted_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """L1 distance of the sorted probabilities `(num_anchors, ...)`; what one side has more of is compared with 0."""
    student, teacher = (probs.sort(dim=-1, descending=True).values for probs in (student, teacher))
    size = min(student.shape[-1], teacher.shape[-1])
    surplus = student[:, size:].sum(dim=-1) + teacher[:, size:].sum(dim=-1)
    return (student[:, :size] - teacher[:, :size]).abs().sum(dim=-1) + surplus
