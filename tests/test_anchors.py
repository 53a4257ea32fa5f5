"""Anchors and the spans between them against loops over the rows."""

import pytest
import torch
from builders import EXCHANGED, SAME, collated

from distill_trainer.anchors import IGNORE_INDEX, Anchors, Spans


def spans_of(batch):
    """For each anchor with a next token: its row, its place, and the place of the next anchor of its row or None."""
    found = []
    for row in range(len(batch["anchor_mask"])):
        places = [
            (int(s), int(t))
            for s, t, there in zip(
                batch["student_positions"][row],
                batch["teacher_positions"][row],
                batch["anchor_mask"][row],
                strict=True,
            )
            if there
        ]
        for place, following in zip(places, [*places[1:], None], strict=True):
            labels = batch["labels"][row]
            if place[0] + 1 < len(labels) and labels[place[0] + 1] != IGNORE_INDEX:
                found.append((row, place, following))
    return found


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("sides", [("student", "teacher"), SAME, EXCHANGED], ids=["usual", "same", "exchanged"])
def test_spans_match_a_loop_over_the_rows(padding_side, sides):
    batch = collated(6, padding_side=padding_side, sides=sides)
    anchors = Anchors.of(batch)
    spans = Spans.of(batch, anchors)
    expected = spans_of(batch)
    positions = (anchors.rows, anchors.student_positions, anchors.teacher_positions)
    assert list(zip(*(x.tolist() for x in positions), strict=True)) == [(row, *place) for row, place, _ in expected]
    assert spans.complete.tolist() == [following is not None for _, _, following in expected]
    single = [following is not None and following[0] == place[0] + 1 for _, place, following in expected]
    assert spans.one_student_token.tolist() == single
    inner, owners = [], torch.full_like(batch["input_ids"], -1)
    for index, (row, place, following) in enumerate(expected):
        if following is not None:
            owners[row, place[0] : following[0]] = index
            inner += [(row, position, index) for position in range(place[1] + 1, following[1])]
    assert torch.equal(spans.student_owner, owners)
    columns = (spans.teacher_rows, spans.teacher_positions, spans.teacher_owner)
    assert sorted(zip(*(column.tolist() for column in columns), strict=True)) == sorted(inner)
    following = batch["teacher_input_ids"][spans.teacher_rows, spans.teacher_positions + 1]
    assert torch.equal(spans.teacher_targets, following)
    assert spans.num_inner.tolist() == [sum(owner == index for *_, owner in inner) for index in range(len(expected))]
    # Only then does the test see what it is for.
    assert bool(inner) is (sides == EXCHANGED)
    assert any(spans.one_student_token & (spans.num_inner > 0)) is (sides == EXCHANGED) or not inner
    torch.testing.assert_close(spans.inner_sums(torch.ones(len(inner))), spans.num_inner.float())
