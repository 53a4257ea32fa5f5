"""How alike two models distribute their attention over the same spans of text."""

import math

import datasets
import evaluate
import torch

_DESCRIPTION = """One minus the Jensen-Shannon divergence, in bits, between two attention rows over the same spans.

similarity = 1 - (KL(p || m) + KL(q || m)) / (2 ln 2), with m = (p + q) / 2, averaged over rows

1 means the same attention, 0 means attention to wholly different spans. Lin 1991, doi 10.1109/18.61115."""

_INPUTS = """
Args:
    predictions (list of list of float): the student's attention rows, each summing to 1.
    references (list of list of float): the teacher's attention rows over the same spans.
Returns:
    similarity (float, 0 to 1)
"""


def similarity_per_row(student_rows: torch.Tensor, teacher_rows: torch.Tensor) -> torch.Tensor:
    """One minus the Jensen-Shannon divergence in bits of each pair of rows.

    Args:
        student_rows: `(num_rows, num_spans)`, non-negative, each row summing to 1.
        teacher_rows: Same shape.

    Returns:
        `(num_rows,)` float64 in 0 to 1.
    """
    rows = torch.stack([student_rows, teacher_rows]).double()
    middle = rows.mean(dim=0)
    # xlogy is 0 where the row is 0, whatever the logarithm.
    divergence = (torch.xlogy(rows, rows) - torch.xlogy(rows, middle)).sum(dim=-1).mean(dim=0)
    return (1 - divergence / math.log(2)).clamp(0, 1)


class AttentionSimilarity(evaluate.Metric):
    """`similarity_per_row`, averaged over all added rows. Rows may differ in length."""

    def _info(self):
        row = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="https://doi.org/10.1109/18.61115",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": row, "references": row}),
        )

    def _compute(self, predictions, references):
        if not predictions:
            raise ValueError("predictions must hold at least one row, got none.")
        values = []
        for number, (p, q) in enumerate(zip(predictions, references, strict=True)):
            if len(p) != len(q):
                raise ValueError(f"Row {number} has {len(p)} spans in predictions and {len(q)} in references.")
            student, teacher = torch.tensor([p]), torch.tensor([q])
            for name, row in (("predictions", student), ("references", teacher)):
                if not (row.numel() and row.min() >= 0 and abs(row.sum() - 1) < 0.05):
                    raise ValueError(f"Row {number} of {name} must be shares that sum to 1, got {row.sum():.4g}.")
            values.append(similarity_per_row(student, teacher))
        return {"similarity": torch.cat(values).mean().item()}
