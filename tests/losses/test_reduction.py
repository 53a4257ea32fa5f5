import pytest
import torch

from distill_trainer.errors import ConfigurationError, DistillationError
from distill_trainer.losses.reduction import select_pairs, token_mean


def test_divides_by_the_tokens_given_when_the_batch_count_is_unknown():
    assert token_mean(torch.tensor([1.0, 2.0, 6.0])) == 3.0


@pytest.mark.parametrize("count", [6, 6.0, torch.tensor(6)])
def test_divides_by_the_count_of_the_whole_batch(count):
    assert token_mean(torch.tensor([1.0, 2.0, 6.0]), count) == 1.5


def test_weights_multiply_the_values_and_leave_the_divisor_alone():
    assert token_mean(torch.tensor([1.0, 2.0]), weights=torch.tensor([0.5, 1.5])) == 1.75


def test_no_tokens_give_zero_with_a_gradient_path():
    values = torch.ones(3, requires_grad=True)
    loss = token_mean(values[:0])
    loss.backward()
    assert loss == 0 and values.grad.eq(0).all()


def test_pairs_come_back_selected_in_float32_with_the_teacher_detached():
    student, teacher = torch.randn(2, 2, 3, 4, dtype=torch.bfloat16).requires_grad_().unbind(0)
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=torch.bool)
    selected, target = select_pairs(student, teacher, mask)
    assert selected.dtype == target.dtype == torch.float32 and selected.shape == (3, 4)
    assert selected.requires_grad and not target.requires_grad
    assert selected.equal(student[mask].float()) and target.equal(teacher[mask].float())


def test_shape_mismatch_names_both_shapes():
    with pytest.raises(ConfigurationError, match=r"got \(1, 2, 3\) and \(1, 2, 4\)"):
        select_pairs(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), torch.ones(1, 2, dtype=torch.bool))


def test_an_integer_mask_is_refused_instead_of_selecting_rows_0_and_1():
    with pytest.raises(DistillationError, match="mask must be a bool tensor, got torch.int64"):
        select_pairs(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 1]))
