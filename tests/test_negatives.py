"""Defects that these tests catch: padding taken for text, own anchors sent back as negatives, filled rows that arrive
as anchors, ranks of different sizes that hang, gradients of another size than one batch's after DDP's mean over ranks.
"""

import pytest
import torch
import torch.multiprocessing as multiprocessing
from builders import collated, distillation_model, run, scheduled, tiny_teacher

from distill_trainer.anchors import Anchors
from distill_trainer.losses.contrastive import MAX_ANCHORS, contrastive_loss, evenly_spaced
from distill_trainer.losses.feature import tame_outliers
from distill_trainer.negatives import (
    BEFORE_THE_TEXT,
    SAME_TOKENS,
    anchors_per_rank,
    last_tokens,
    of_other_ranks,
)

WIDTH = 12


def texts_at(side, positions, lengths=(12, 5)):
    """Last tokens in rows that hold 100, 101, ... and 200, 201, ..."""
    width = max(lengths)
    input_ids, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
    rows, columns = [], []
    for row, length in enumerate(lengths):
        start = width - length if side == "left" else 0
        input_ids[row, start : start + length] = 100 * (row + 1) + torch.arange(length)
        mask[row, start : start + length] = 1
        rows += [row] * len(positions[row])
        columns += [start + position for position in positions[row]]
    return last_tokens(input_ids, mask, torch.tensor(rows), torch.tensor(columns)).tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_tokens_end_at_the_anchor_and_begin_with_the_row(side):
    nothing = BEFORE_THE_TEXT
    assert texts_at(side, ([0, 7, 11], [2, 4])) == [
        [*[nothing] * 7, 100],
        list(range(100, 108)),
        list(range(104, 112)),
        [*[nothing] * 5, 200, 201, 202],
        [*[nothing] * 3, *range(200, 205)],
    ]


def test_one_rank_has_no_others_and_all_anchors():
    states, texts = of_other_ranks(torch.randn(3, WIDTH), torch.zeros(3, SAME_TOKENS, dtype=torch.long))
    assert states.shape == (0, WIDTH) and texts.shape == (0, SAME_TOKENS)
    assert anchors_per_rank() == MAX_ANCHORS


def test_a_batch_in_which_nothing_repeats_gives_the_plain_loss_of_its_anchors():
    teacher = tiny_teacher()
    model = distillation_model(teacher)
    batch = collated()
    anchors = Anchors.of(batch)
    texts = last_tokens(batch["input_ids"], batch["attention_mask"], anchors.rows, anchors.student_positions)
    assert len(texts.unique(dim=0)) == len(texts)
    found = run(model, teacher, batch, frozenset({"contrastive"}))["losses"]["contrastive"]
    states = model.student.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    student = model.contrastive_projections[0](states.last_hidden_state[anchors.rows, anchors.student_positions])
    output = teacher(batch, anchors)
    with torch.no_grad():
        residual = model.route_batch(batch, teacher, output, scheduled()).residual
    torch.testing.assert_close(found, contrastive_loss(student, residual, torch.ones(len(anchors), dtype=torch.bool)))


def test_windows_that_repeat_in_a_batch_are_not_each_others_negatives():
    teacher = tiny_teacher()
    model = distillation_model(teacher)
    batch = collated(2)
    twice = {name: torch.cat([value, value]) for name, value in batch.items()}
    once, doubled = (
        run(model, teacher, each, frozenset({"contrastive"}))["losses"]["contrastive"] for each in (batch, twice)
    )
    # Every anchor has the same negatives as before, each twice.
    assert once < doubled < once + torch.log(torch.tensor(2.0))


# Anchors of each of two ranks, and whether some of their texts repeat.
CASES = {"uneven": (7, 3), "one rank without anchors": (5, 0), "more than a rank may give": (200, 128)}


def anchors_of(counts, rank, width=WIDTH):
    """Projected student states, teacher states and texts of one rank; a third of the texts repeat on both ranks."""
    generator = torch.Generator().manual_seed(rank)
    student, teacher = torch.randn(2, counts[rank], width, generator=generator).unbind(0)
    numbers = torch.arange(counts[rank])
    own = torch.where(numbers % 3 == 0, numbers % 2, 1000 * (rank + 1) + numbers)
    return student, teacher, own[:, None].expand(-1, SAME_TOKENS)


def local_loss(weight, counts, rank):
    """What `DistillationModel` computes of a rank's own anchors, as a share of the mean over all ranks."""
    student, teacher, texts = anchors_of(counts, rank)
    chosen = evenly_spaced(len(student), anchors_per_rank())
    student, teacher, texts = student[chosen] @ weight, teacher[chosen], texts[chosen]
    others, other_texts = of_other_ranks(teacher, texts)
    mask = torch.ones(len(chosen), dtype=torch.bool)
    loss = contrastive_loss(student, teacher, mask, texts=texts, other_features=others, other_texts=other_texts)
    # DDP takes the mean over the ranks.
    return loss * counts[rank] / (sum(counts) / 2), len(others)


def one_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for name, counts in CASES.items():
        weight = torch.eye(WIDTH, requires_grad=True)
        loss, num_others = local_loss(weight, counts, rank)
        loss.backward()
        torch.distributed.all_reduce(weight.grad)
        results[name] = loss.detach(), weight.grad / 2, num_others, anchors_per_rank()
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What each of two processes found for every case."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(one_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_have_the_loss_and_gradient_of_one_batch(two_ranks, name):
    counts = CASES[name]
    # A rank gives at most half of what one alone would; here the choice of the joined batch is made to be the same.
    kept = [min(count, MAX_ANCHORS // 2) for count in counts]
    weight = torch.eye(WIDTH, requires_grad=True)
    parts = []
    for rank, count in enumerate(kept):
        side = anchors_of(counts, rank)
        rows = torch.tensor([i * (counts[rank] - 1) // max(count - 1, 1) for i in range(count)], dtype=torch.long)
        parts.append([tensor[rows] for tensor in side])
    student, teacher, texts = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    expected = reference(student @ weight, teacher, texts[:, 0].tolist())
    # Each rank counts by its anchors, whether they were chosen or not.
    share = torch.cat([torch.full((n,), total / max(n, 1)) for n, total in zip(kept, counts, strict=True)])
    expected = (expected * share).sum() / sum(counts)
    expected.backward()
    losses = torch.stack([results[name][0] for results in two_ranks])
    torch.testing.assert_close(losses.mean(), expected.detach().float())
    for rank, (_, gradient, num_others, limit) in enumerate(results[name] for results in two_ranks):
        torch.testing.assert_close(gradient, weight.grad)
        assert num_others == kept[1 - rank] and limit == MAX_ANCHORS // 2


def reference(student, teacher, groups):
    """-log of each positive's share among the anchors of other groups, in float64."""
    terms = []
    # Rows this short have channels that stand out.
    student, teacher = tame_outliers(student), tame_outliers(teacher)
    for i, state in enumerate(student.double()):
        kept = [j for j in range(len(teacher)) if j == i or groups[j] != groups[i]]
        scores = torch.cosine_similarity(state[None], teacher[kept].double()) / 0.07
        terms.append(scores.logsumexp(0) - scores[kept.index(i)])
    return torch.stack(terms)
