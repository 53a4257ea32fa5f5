"""Defects that these tests catch: attention to later or padding keys, key heads assigned to the wrong query heads,
spans shifted by one token, mass lost at a BOS, KL in the wrong direction, a sum over heads, NaN from padding rows.
"""

import pytest
import torch

from distill_trainer.errors import ConfigurationError
from distill_trainer.losses.attention import attention_loss, attention_rows, pool_spans

# Row 0 is padded on the right, row 1 on the left; the second row has one anchor fewer.
KEY_MASK = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]], dtype=torch.bool)
POSITIONS = torch.tensor([[0, 2, 4], [3, 6, 0]])
ANCHOR_MASK = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool)


def random_states(seed: int, num_heads: int = 4, num_key_heads: int = 2, length: int = 7, head_dim: int = 6):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, num_heads, length, head_dim, generator=generator)
    return query, torch.randn(2, num_key_heads, length, head_dim, generator=generator)


def reference_rows(query, key, positions, anchor_mask, key_mask, scaling):
    """Softmax over the allowed keys, one row at a time in float64; zeros for padded anchors."""
    rows = torch.zeros(*query.shape[:2], positions.shape[1], key.shape[2], dtype=torch.float64)
    group_size = query.shape[1] // key.shape[1]
    for b, a in anchor_mask.nonzero().tolist():
        row = int(positions[b, a])
        allowed = [t for t in range(row + 1) if key_mask[b, t]]
        for head in range(query.shape[1]):
            scores = key[b, head // group_size, allowed].double() @ query[b, head, row].double() * scaling
            rows[b, head, a, allowed] = scores.softmax(dim=0)
    return rows


def reference_spans(rows, positions, anchor_mask):
    """Sums of the keys of each span, one at a time in float64."""
    pooled = torch.zeros(*rows.shape[:3], rows.shape[2], dtype=torch.float64)
    for b in range(rows.shape[0]):
        start = 0
        for span in anchor_mask[b].nonzero().flatten().tolist():
            end = int(positions[b, span]) + 1
            pooled[b, :, :, span] = rows[b, :, :, start:end].double().sum(dim=-1)
            start = end
    return pooled


def reference_loss(student_rows, teacher_rows, mask):
    """KL(teacher || student) of the heads' means, one anchor at a time in float64, 0 log 0 = 0."""
    terms = []
    for b, a in mask.nonzero().tolist():
        q, p = student_rows[b, :, a].double().mean(0), teacher_rows[b, :, a].double().mean(0)
        terms.append((p[p > 0] * (p[p > 0] / q[p > 0]).log()).sum())
    return torch.stack(terms).mean().float()


def pooled_rows(seed: int, num_heads: int = 4):
    query, key = random_states(seed, num_heads)
    return pool_spans(attention_rows(query, key, POSITIONS, KEY_MASK, 0.7), POSITIONS, ANCHOR_MASK)


@pytest.mark.parametrize("num_heads, num_key_heads", [(4, 4), (4, 2), (6, 2), (3, 1)])
def test_rows_match_the_definition_with_padding_and_grouped_heads(num_heads, num_key_heads):
    query, key = random_states(0, num_heads, num_key_heads)
    rows = attention_rows(query, key, POSITIONS, KEY_MASK, scaling=0.7)
    expected = reference_rows(query, key, POSITIONS, ANCHOR_MASK, KEY_MASK, 0.7).float()
    assert rows.dtype == torch.float32 and rows.shape == (2, num_heads, 3, 7)
    by_anchor = ANCHOR_MASK[:, None].expand(-1, num_heads, -1)
    torch.testing.assert_close(rows[by_anchor], expected[by_anchor])


def test_padding_of_nan_changes_neither_rows_nor_gradients():
    query, key = random_states(1)
    expected = attention_rows(query, key, POSITIONS, KEY_MASK, 0.7)
    padding = ~KEY_MASK[:, None, :, None]
    query = query.masked_fill(padding, float("nan")).requires_grad_()
    key = key.masked_fill(padding, float("nan")).requires_grad_()
    rows = attention_rows(query, key, POSITIONS, KEY_MASK, 0.7)
    assert rows.isfinite().all()
    by_anchor = ANCHOR_MASK[:, None].expand(-1, 4, -1)
    assert rows[by_anchor].equal(expected[by_anchor])
    pooled = pool_spans(rows, POSITIONS, ANCHOR_MASK)
    attention_loss(pooled, pooled_rows(2), ANCHOR_MASK).backward()
    for states in (query, key):
        assert states.grad.isfinite().all() and states.grad.abs().sum() > 0
        assert states.grad.masked_select(padding).eq(0).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_inputs_and_autocast_are_computed_in_float32(autocast):
    query, key = (x.bfloat16() for x in random_states(3))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        rows = attention_rows(query, key, POSITIONS, KEY_MASK, 0.7)
        pooled = pool_spans(rows, POSITIONS, ANCHOR_MASK)
    expected = reference_rows(query, key, POSITIONS, ANCHOR_MASK, KEY_MASK, 0.7)
    by_anchor = ANCHOR_MASK[:, None].expand(-1, 4, -1)
    torch.testing.assert_close(rows[by_anchor], expected[by_anchor].float())
    expected = reference_spans(expected, POSITIONS, ANCHOR_MASK)
    torch.testing.assert_close(pooled[by_anchor], expected[by_anchor].float())


def test_spans_match_the_definition_and_keep_all_mass():
    rows = attention_rows(*random_states(4), POSITIONS, KEY_MASK, 0.7)
    pooled = pool_spans(rows, POSITIONS, ANCHOR_MASK)
    by_anchor = ANCHOR_MASK[:, None].expand(-1, 4, -1)
    expected = reference_spans(rows, POSITIONS, ANCHOR_MASK).float()
    torch.testing.assert_close(pooled[by_anchor], expected[by_anchor])
    torch.testing.assert_close(pooled[by_anchor].sum(dim=-1), torch.ones(20))
    assert pooled.triu(1)[by_anchor].eq(0).all()


def test_spans_may_skip_an_anchor_in_the_middle():
    rows = attention_rows(*random_states(5), torch.tensor([[1, 3, 4]] * 2), torch.ones(2, 7, dtype=torch.bool), 0.7)
    mask = torch.tensor([[1, 0, 1]] * 2, dtype=torch.bool)
    pooled = pool_spans(rows, torch.tensor([[1, 3, 4]] * 2), mask)
    torch.testing.assert_close(pooled[..., 0], rows[..., :2].sum(dim=-1))
    assert pooled[..., 1].eq(0).all()
    torch.testing.assert_close(pooled[..., 2], rows[..., 2:5].sum(dim=-1))


@pytest.mark.parametrize("student_heads, teacher_heads", [(4, 4), (2, 6)])
def test_loss_matches_the_definition_for_any_number_of_heads(student_heads, teacher_heads):
    student, teacher = pooled_rows(6, student_heads), pooled_rows(7, teacher_heads)
    loss = attention_loss(student, teacher, ANCHOR_MASK)
    assert loss > 0
    torch.testing.assert_close(loss, reference_loss(student, teacher, ANCHOR_MASK))
    assert attention_loss(teacher, teacher, ANCHOR_MASK) == 0


def test_finer_tokens_with_the_same_mass_per_span_give_zero():
    # The teacher has a BOS and two tokens for each of the student's; spans receive 1 and then 0.25 and 0.75.
    student_positions, teacher_positions = torch.tensor([[0, 1]]), torch.tensor([[2, 4]])
    student = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]])
    teacher = torch.tensor([[[[0.2, 0.3, 0.5, 0.0, 0.0], [0.05, 0.1, 0.1, 0.5, 0.25]]]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    pooled = pool_spans(student, student_positions, mask), pool_spans(teacher, teacher_positions, mask)
    assert attention_loss(*pooled, mask) < 1e-6
    assert attention_loss(pooled[0], pool_spans(teacher, teacher_positions - 1, mask), mask) > 0.1


def test_a_single_span_gives_zero():
    student, teacher = pooled_rows(8), pooled_rows(9)
    first = torch.tensor([[1, 0, 0], [1, 0, 0]], dtype=torch.bool)
    assert attention_loss(student, teacher, first).abs() < 1e-6


def test_masked_anchors_change_neither_loss_nor_gradient():
    student, teacher = pooled_rows(10), pooled_rows(11)
    loss = attention_loss(student, teacher, ANCHOR_MASK)
    outside = ~ANCHOR_MASK[:, None, :, None]
    student = student.masked_fill(outside, float("nan")).requires_grad_()
    garbage = attention_loss(student, teacher.masked_fill(outside, float("nan")), ANCHOR_MASK)
    garbage.backward()
    assert garbage.equal(loss) and student.grad[1, :, 2].eq(0).all() and student.grad[0].abs().sum() > 0


def test_mass_that_vanished_on_one_side_gives_a_finite_loss_and_gradient():
    one, other = torch.eye(2)[None, None].clone(), torch.eye(2).flip(0)[None, None].clone()
    one.requires_grad_()
    loss = attention_loss(one, other, torch.ones(1, 2, dtype=torch.bool))
    loss.backward()
    assert loss.isfinite() and loss > 1 and one.grad.isfinite().all()


def test_empty_mask_gives_zero_and_still_backpropagates():
    student = pooled_rows(12).requires_grad_()
    loss = attention_loss(student, pooled_rows(13), torch.zeros_like(ANCHOR_MASK))
    loss.backward()
    assert loss == 0 and student.grad.eq(0).all()


def test_micro_batches_sum_to_the_whole_batch():
    student, teacher = pooled_rows(14), pooled_rows(15)
    parts = sum(
        attention_loss(student[i : i + 1], teacher[i : i + 1], ANCHOR_MASK[i : i + 1], num_items_in_batch=5)
        for i in range(2)
    )
    torch.testing.assert_close(parts, attention_loss(student, teacher, ANCHOR_MASK))


def test_teacher_receives_no_gradient():
    student, teacher = pooled_rows(16).requires_grad_(), pooled_rows(17).requires_grad_()
    attention_loss(student, teacher, ANCHOR_MASK).backward()
    assert student.grad is not None and teacher.grad is None


def test_rows_over_different_spans_are_refused():
    with pytest.raises(ConfigurationError, match=r"got \(1, 3, 3\) and \(1, 4, 4\)"):
        attention_loss(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 4, 4), torch.ones(1, 3, dtype=torch.bool))
