"""The teacher's probability of a student token that the teacher writes in several tokens."""

import math

import torch
from torch import Tensor


def correct_spans(logprobs: Tensor, first_ids: Tensor, true_ids: Tensor, span_logprobs: Tensor) -> Tensor:
    r"""The projected distribution, with what the teacher gives the true next token moved there from its first piece.

    The projection gives all mass of a teacher token t1 to f(t1), the first student token of t1's own bytes. Where t1
    only begins the student's token s, the share of that mass that goes on to spell s belongs to s. By the chain rule
    over the teacher's tokens t1 .. tm that spell s in the text (scoring across tokenizers:
    https://huggingface.co/papers/2512.14954) that share is

        P = p(t1) p(t2 | t1) .. p(tm | t1 .. tm-1),    q(f(t1)) -= P,    q(s) += P.

    It needs no further pass of the teacher, which has read the text. What only such a pass could tell stays as it is:
    other tokens that begin with t1, other ways to spell s, and that P counts all texts that begin with s's bytes, also
    those that the student would cut in another place (a longer token that begins with s).

    P <= p(t1) <= q(f(t1)), so nothing becomes negative. Rounding may break that: at most q(f(t1)) is moved.

    Args:
        logprobs: The teacher's projected log-probabilities, finite, `(num_anchors, student_vocab_size)`.
        first_ids: f(t1) of the teacher's own true next token t1, -1 where it has none, long, `(num_anchors,)`.
        true_ids: The student's true next token s, long, `(num_anchors,)`.
        span_logprobs: log P in nats, -inf where nothing is to be moved, `(num_anchors,)`.

    Returns:
        Log-probabilities, same shape, finite: the smallest normal float stands in for 0. Gradients reach `logprobs`
        and `span_logprobs`. Rows with f(t1) = s, without f(t1) or without P are those of `logprobs`, bit for bit.
    """
    # Two entries of the rows to correct are all that enters the arithmetic: the vocabulary is copied once, and all
    # other entries stay exact.
    rows = ((first_ids >= 0) & (first_ids != true_ids) & ~span_logprobs.isneginf()).nonzero()[:, 0]
    entries = rows.repeat(2), torch.cat([first_ids[rows], true_ids[rows]])
    first, true = logprobs[entries].chunk(2)
    moved = torch.minimum(span_logprobs[rows].to(first.dtype), first)
    # log q + log(1 - P / q), not log(q - P): a small q would overflow the gradient of the latter.
    tiny = torch.finfo(first.dtype).tiny
    kept = first + (-torch.expm1(moved - first)).clamp(min=tiny).log()
    corrected = torch.cat([kept.clamp(min=math.log(tiny)), torch.logaddexp(true, moved)])
    return logprobs.index_put(entries, corrected)
