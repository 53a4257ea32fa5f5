from collections import Counter

import pytest
import torch
from builders import collated

from distill_trainer.evaluation import breakdown
from distill_trainer.evaluation.breakdown import retention_breakdown


def anchors_of(batch):
    """Row, real tokens read and true next token (None: not scored) of every anchor that a token follows."""
    for row, mask in enumerate(batch["anchor_mask"]):
        positions = batch["student_positions"][row][mask].tolist()
        first = int(batch["attention_mask"][row].argmax())
        for position in positions:
            if not batch["attention_mask"][row, position + 1 : position + 2].any():
                continue
            scored = position < positions[-1]
            yield row, position - first + 1, int(batch["input_ids"][row, position + 1]) if scored else None


def values_of(count, seed=0):
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_groups_are_those_of_counting_by_hand(monkeypatch, padding_side):
    monkeypatch.setattr(breakdown, "FREQUENCIES", (1, 2, 3))
    monkeypatch.setattr(breakdown, "POSITIONS", (1, 4, 9))
    batches = [collated(4, padding_side=padding_side), collated(2, padding_side=padding_side)]
    anchors = [anchor for batch in batches for anchor in anchors_of(batch)]
    counts = Counter()
    for batch in batches:
        for row, mask in enumerate(batch["anchor_mask"]):
            positions = batch["student_positions"][row][mask].tolist()
            counts.update(batch["input_ids"][row, positions[0] + 1 : positions[-1] + 1].tolist())
    values = {"student": values_of(len(anchors)), "student_before": values_of(len(anchors), seed=1)}
    found = retention_breakdown(values, batches)
    kinds = {
        "by_position": ([read for _, read, _ in anchors], [(1, 3), (4, 8), (9, None)]),
        "by_frequency": (
            [counts[token] if token is not None else 0 for *_, token in anchors],
            [(1, 1), (2, 2), (3, None)],
        ),
    }
    for name, (numbers, bounds) in kinds.items():
        groups = {(group["from"], group["to"]): group for group in found[name]}
        assert list(groups) == bounds
        for (low, high), group in groups.items():
            members = [i for i, n in enumerate(numbers) if low <= n and (high is None or n <= high)]
            assert group["anchors"] == len(members) > 0
            for role, own in values.items():
                assert group["kl_divergence"][role] == pytest.approx(own[members, 0].mean().item())
                assert group["top1_agreement"][role] == pytest.approx(own[members, 1].mean().item())
            assert group["kl_divergence"]["baseline"] is None
    assert sum(group["anchors"] for group in found["by_frequency"]) == sum(t is not None for *_, t in anchors)


def test_groups_without_anchors_are_left_out():
    batch = collated(2)
    count = len(list(anchors_of(batch)))
    found = retention_breakdown({"student": values_of(count)}, [batch])
    assert [group["from"] for group in found["by_frequency"]] == [1]
    assert [group["from"] for group in found["by_position"]] == [1, 8]
    assert found["by_position"][0]["to"] == 7
