"""The chunked pass against ordinary autograd. Defects that these tests catch: a chunk left out or counted twice,
anchors and other positions mixed, a gradient scaled twice or not at all, a head's gradient of the last chunk only,
a softcap or an adapter without gradient, half-precision gradients that underflow, a wrong second
backward pass.
"""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from distill_trainer.losses.fused import fused_loss, unfused_loss
from distill_trainer.losses.heads import Head

STUDENT, TEACHER, ANCHORS, POSITIONS = (6, 11), (10, 17), 7, 12


def head(size, seed=0, bias=False, **changes):
    torch.manual_seed(seed)
    return Head(nn.Linear(*size, bias=bias), vocab_size=size[1], **changes)


def states(seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(POSITIONS, STUDENT[0], generator=generator).to(dtype).requires_grad_()
    teacher = torch.randn(ANCHORS, TEACHER[0], generator=generator).to(dtype).requires_grad_()
    return student, teacher


LABELS = torch.arange(POSITIONS) % STUDENT[1]


def loss_of(rows, student_logits, teacher_logits):
    """A cross-entropy everywhere, and where there is a teacher something that couples both sides."""
    lm = F.cross_entropy(student_logits, LABELS[rows], reduction="sum")
    if teacher_logits is None:
        return lm, torch.stack([lm.detach(), lm.detach() * 0])
    # A weight that depends on the place in the batch, so that a chunk in the wrong place shows.
    weights = 1 + rows.start + torch.arange(len(student_logits))
    coupled = (weights.unsqueeze(-1) * student_logits.softmax(-1) * teacher_logits[:, : STUDENT[1]].sigmoid()).sum()
    return lm + 3 * coupled, torch.stack([lm.detach(), coupled.detach()])


def gradients(run, student_head, teacher_head, dtype=torch.float32, factor=1.0):
    student, teacher = states(dtype=dtype)
    total, reported = run(loss_of, student, student_head, teacher, teacher_head)
    (factor * total).backward()
    found = {"student": student.grad, "teacher": teacher.grad}
    found |= {name: p.grad for name, p in student_head.linear.named_parameters()}
    # Kept apart from the next call, which starts without gradients.
    for parameter in student_head.linear.parameters():
        parameter.grad = None
    return total.detach(), reported, found


def fused(chunk_size, scale=1.0):
    return lambda *sides: fused_loss(*sides, chunk_size=chunk_size, scale=scale)


def unfused(scale=1.0):
    return lambda *sides: unfused_loss(*sides, scale=scale)


def frozen(size, **changes):
    teacher_head = head(size, seed=2, **changes)
    teacher_head.linear.requires_grad_(False)
    return teacher_head


def assert_same(found, expected, **tolerance):
    torch.testing.assert_close(found[0], expected[0], **tolerance)
    torch.testing.assert_close(found[1], expected[1], **tolerance)
    for name, value in expected[2].items():
        if value is None:
            assert found[2][name] is None, name
        else:
            torch.testing.assert_close(found[2][name], value, msg=name, **tolerance)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 7, 12, 100])
@pytest.mark.parametrize("changes", [{}, {"bias": True}, {"softcap": 2.0}, {"factor": 0.5, "divisor": 3.0}])
def test_any_chunk_size_gives_the_loss_and_the_gradients_of_autograd(chunk_size, changes):
    sides = head(STUDENT, **changes), frozen(TEACHER, softcap=changes.get("softcap"))
    expected = gradients(unfused(0.25), *sides)
    found = gradients(fused(chunk_size, 0.25), *sides)
    assert_same(found, expected, rtol=1e-5, atol=1e-6)
    assert expected[2]["student"].abs().max() > 0 and expected[2]["teacher"].abs().max() > 0


def test_the_unfused_reference_matches_a_float64_loop():
    sides = head(STUDENT), frozen(TEACHER)
    student, teacher = (x.detach().double() for x in states())
    student_weight, teacher_weight = (side.linear.weight.detach().double() for side in sides)
    expected = torch.zeros((), dtype=torch.float64)
    for position in range(POSITIONS):
        logits = student_weight @ student[position]
        expected -= logits.log_softmax(-1)[LABELS[position]]
        if position < ANCHORS:
            other = teacher_weight @ teacher[position]
            expected += 3 * (1 + position) * (logits.softmax(-1) * other[: STUDENT[1]].sigmoid()).sum()
    torch.testing.assert_close(gradients(unfused(), *sides)[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_passes_it_on():
    sides = frozen(STUDENT), frozen(TEACHER)
    expected, found = gradients(unfused(), *sides), gradients(fused(3), *sides)
    assert found[2]["weight"] is None
    assert_same(found, expected, rtol=1e-5, atol=1e-6)


def test_an_adapter_of_the_head_gets_its_gradient():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = nn.Linear(*STUDENT, bias=False)

        def forward(self, x):
            return self.lm_head(x)

    torch.manual_seed(3)
    model = get_peft_model(Model(), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    student_head = Head(model.base_model.model.lm_head, vocab_size=STUDENT[1])
    expected = gradients(unfused(), student_head, frozen(TEACHER))
    found = gradients(fused(3), student_head, frozen(TEACHER))
    trained = [name for name, value in expected[2].items() if value is not None]
    assert sum("lora_" in name for name in trained) == 2 and not any("base_layer" in name for name in trained)
    assert_same(found, expected, rtol=1e-5, atol=1e-6)


def test_a_tied_embedding_adds_both_of_its_gradients():
    embedding = nn.Embedding(STUDENT[1], STUDENT[0])
    student_head = Head(nn.Linear(*STUDENT, bias=False), vocab_size=STUDENT[1])
    student_head.linear.weight = embedding.weight
    found = []
    for run in (unfused(), fused(3)):
        embedding.weight.grad = None
        total, _ = run(loss_of, embedding(LABELS) * 2, student_head, states()[1], frozen(TEACHER))
        total.backward()
        found.append(embedding.weight.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_gradients_add_up_over_micro_batches():
    student_head, teacher_head = head(STUDENT), frozen(TEACHER)
    found = []
    for run in (unfused(0.5), fused(2, 0.5)):
        student_head.linear.weight.grad = None
        for seed in (1, 2, 3):
            student, teacher = states(seed)
            run(loss_of, student, student_head, teacher, teacher_head)[0].backward()
        found.append(student_head.linear.weight.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_text_alone_needs_no_teacher():
    def text_loss(rows, logits, _):
        nats = F.cross_entropy(logits, LABELS[rows], reduction="sum")
        return nats, nats.detach()

    found = []
    for run in (unfused(), fused(5)):
        student, student_head = states()[0], head(STUDENT)
        total, _ = run(text_loss, student, student_head, None, None)
        total.backward()
        found.append((total.detach(), student.grad, student_head.linear.weight.grad))
    for plain, chunked in zip(*found, strict=True):
        torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_anchors", [0, ANCHORS])
def test_nothing_to_learn_gives_zero_with_a_gradient_path(num_anchors):
    student_head = head(STUDENT)
    student = states()[0][:0]
    teacher = None if num_anchors == 0 else states()[1][:0]
    total, _ = fused_loss(loss_of, student, student_head, teacher, frozen(TEACHER), chunk_size=3)
    total.backward()
    assert total == 0 and student_head.linear.weight.grad.eq(0).all()


def test_without_gradient_only_the_value_is_computed():
    sides = head(STUDENT), frozen(TEACHER)
    student, teacher = states()
    expected, _ = unfused_loss(loss_of, student, sides[0], teacher, sides[1])
    with torch.no_grad():
        total, _ = fused_loss(loss_of, student, sides[0], teacher, sides[1], chunk_size=4)
    assert not total.requires_grad
    torch.testing.assert_close(total, expected.detach())


def test_the_teachers_side_may_be_without_gradient():
    sides = head(STUDENT), frozen(TEACHER)
    student, teacher = states()
    expected = gradients(unfused(), *sides)[2]
    fused_loss(loss_of, student, sides[0], teacher.detach(), sides[1], chunk_size=4)[0].backward()
    torch.testing.assert_close(student.grad, expected["student"])


def test_a_second_backward_pass_is_an_error_and_not_a_wrong_gradient():
    student, teacher = states()
    total, _ = fused_loss(loss_of, student, head(STUDENT), teacher, frozen(TEACHER), chunk_size=4)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        total.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_near_float32_and_keeps_the_masters_type(dtype):
    sides = head(STUDENT), frozen(TEACHER, autocast=False)
    expected = gradients(unfused(), *sides)
    with torch.autocast("cpu", dtype):
        found = gradients(fused(3), *sides)
    assert all(value is None or value.dtype == torch.float32 for value in found[2].values())
    assert_same(found, expected, rtol=0.05, atol=0.05)


def test_a_frozen_side_in_half_precision_is_not_autocast():
    teacher_head = frozen(TEACHER, autocast=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert teacher_head(torch.randn(2, TEACHER[0])).dtype == torch.float32
        assert head(STUDENT)(torch.randn(2, STUDENT[0])).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_get_gradients_of_their_type(dtype):
    sides = head(STUDENT), frozen(TEACHER)
    expected = gradients(unfused(), *sides)
    for side in sides:
        side.linear.to(dtype)
    found = gradients(fused(3), *sides, dtype=dtype)
    assert found[2]["weight"].dtype == found[2]["student"].dtype == found[2]["teacher"].dtype == dtype
    for name, value in expected[2].items():
        torch.testing.assert_close(found[2][name].float(), value, rtol=0.05, atol=0.1)


def test_small_gradients_survive_fp16_under_a_loss_scale():
    # A mean over many tokens times fp16's scale: divided inside of the chunk, the gradient would be all zeros.
    sides = head(STUDENT), frozen(TEACHER, autocast=False)
    tokens, loss_scale = 2.0**22, 2.0**16
    expected = gradients(unfused(1 / tokens), *sides, factor=loss_scale)
    with torch.autocast("cpu", torch.float16):
        found = gradients(fused(3, 1 / tokens), *sides, factor=loss_scale)
    torch.testing.assert_close(found[2]["weight"], expected[2]["weight"], rtol=0.05, atol=1e-4)
    assert expected[2]["weight"].abs().max() < 1


def test_a_sharded_or_packed_head_is_not_whole():
    assert head(STUDENT, bias=True).is_whole()
    gone = head(STUDENT)
    gone.linear.weight = nn.Parameter(torch.empty(0))
    assert not gone.is_whole()


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_head_that_fsdp_shards_is_not_whole_outside_of_its_forward(one_process):
    sharded = head(STUDENT)
    torch.distributed.fsdp.fully_shard(sharded.linear, mesh=one_process)
    assert not sharded.is_whole()
    found, expected = (gradients(unfused(), side, frozen(TEACHER)) for side in (sharded, head(STUDENT)))
    torch.testing.assert_close(found[2]["weight"].full_tensor(), expected[2]["weight"])
    torch.testing.assert_close(found[2]["student"], expected[2]["student"])
