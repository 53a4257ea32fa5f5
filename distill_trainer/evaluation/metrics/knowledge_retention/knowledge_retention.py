"""How much of the teacher's belief about the next token the student holds."""

import datasets
import evaluate
import torch

_DESCRIPTION = """Agreement of two distributions over the same vocabulary, averaged over positions.

kl_divergence  = mean over positions of sum_v p_teacher(v) * (log p_teacher(v) - log p_student(v)), in nats
top1_agreement = share of positions where both put the same token first
top5_overlap   = mean share of the teacher's five likeliest tokens that are among the student's five"""

_INPUTS = """
Args:
    predictions (list of list of float): the student's log-probabilities, one row per position.
    references (list of list of float): the teacher's log-probabilities over the same vocabulary; -inf is allowed.
Returns:
    kl_divergence (float, nats), top1_agreement (float, 0 to 1), top5_overlap (float, 0 to 1)
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


class KnowledgeRetention(evaluate.Metric):
    """`retention_per_position`, averaged over all added positions."""

    def _info(self):
        row = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": row, "references": row}),
        )

    def _compute(self, predictions, references):
        means = retention_per_position(torch.tensor(predictions), torch.tensor(references)).mean(dim=0)
        return dict(zip(("kl_divergence", "top1_agreement", "top5_overlap"), means.tolist(), strict=True))
