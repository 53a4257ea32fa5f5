"""How much of the teacher's belief about the next token the student holds, and how much of the gap it has closed."""

import datasets
import evaluate
import torch

_DESCRIPTION = """Agreement of two distributions over the same vocabulary, averaged over positions.

kl_divergence  = mean over positions of sum_v p_teacher(v) * (log p_teacher(v) - log p_student(v)), in nats
top1_agreement = share of positions where both put the same token first
top5_overlap   = mean share of the teacher's five likeliest tokens that are among the student's five
gap_closed     = (before - after) / (before - teacher), with bits per byte of the student before and after its
                 training and of the teacher; None where the teacher is not better than the student before

Two models with different vocabularies must first be brought to one: the student's."""

_INPUTS = """
Args:
    predictions (list of list of float): the student's log-probabilities, one row per position.
    references (list of list of float): the teacher's log-probabilities over the same vocabulary; -inf is allowed.
    bits_per_byte (dict, optional, for `compute`): bits per byte on the same text, under "before", "after", "teacher".
Returns:
    kl_divergence (float, nats), top1_agreement (float, 0 to 1), top5_overlap (float, 0 to 1);
    gap_closed (float, 1 is all of it; or None) with `bits_per_byte`
"""


def retention_per_position(student_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor) -> torch.Tensor:
    """KL divergence (nats), top-1 agreement and top-5 overlap at each position.

    Args:
        student_logprobs: `(num_positions, vocab_size)`.
        teacher_logprobs: Same shape. Tokens at -inf carry no probability and add nothing to the divergence.

    Returns:
        `(num_positions, 3)` float64 on the CPU, the columns in the order above.
    """
    student_logprobs, teacher_logprobs = student_logprobs.float(), teacher_logprobs.float()
    terms = teacher_logprobs.exp() * (teacher_logprobs - student_logprobs)
    # 0 * log 0 is 0 here, but NaN in floating point.
    divergence = terms.masked_fill(teacher_logprobs == float("-inf"), 0.0).sum(dim=-1)
    top = min(5, student_logprobs.shape[-1])
    student_top = student_logprobs.topk(top, dim=-1).indices
    teacher_top = teacher_logprobs.topk(top, dim=-1).indices
    agreement = (student_top[:, 0] == teacher_top[:, 0]).float()
    overlap = (student_top.unsqueeze(-1) == teacher_top.unsqueeze(-2)).sum(dim=(-1, -2)) / top
    return torch.stack([divergence, agreement, overlap], dim=-1).cpu().double()


def gap_closed(before: float | None, after: float | None, teacher: float | None) -> float | None:
    """Share of the distance from `before` to `teacher`, in bits per byte, that `after` has covered.

    None where a figure is missing or the teacher is not better than `before`, so there is no gap to close.
    """
    if before is None or after is None or teacher is None or before <= teacher:
        return None
    return (before - after) / (before - teacher)


class KnowledgeRetention(evaluate.Metric):
    """`retention_per_position`, averaged over all added positions, and `gap_closed`."""

    def _info(self):
        row = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": row, "references": row}),
        )

    def _compute(self, predictions, references, bits_per_byte=None):
        if bits_per_byte is not None and bits_per_byte.keys() != {"before", "after", "teacher"}:
            raise ValueError(
                f"bits_per_byte must have before, after and teacher, got {', '.join(bits_per_byte) or 'none'}."
            )
        if len({len(row) for row in (*predictions, *references)}) != 1:
            raise ValueError("All rows of predictions and references must be over one vocabulary, of one length.")
        student, teacher = torch.tensor(predictions), torch.tensor(references)
        for name, rows in (("predictions", student), ("references", teacher)):
            # Half precision is off by less; logits are off by more.
            if not (rows.logsumexp(dim=-1).abs() < 0.05).all():
                raise ValueError(f"{name} must be log-probabilities: the exponentials of a row sum to 1.")
        means = retention_per_position(student, teacher).mean(dim=0)
        scores = dict(zip(("kl_divergence", "top1_agreement", "top5_overlap"), means.tolist(), strict=True))
        return scores if bits_per_byte is None else {**scores, "gap_closed": gap_closed(**bits_per_byte)}
