import copy
import math
import re

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from builders import TEXTS, arguments, logged, tiny_llama, tiny_moe, tiny_trainer, tokenizer, windows
from datasets import Dataset, IterableDataset
from datasets.arrow_dataset import Column
from torch.utils.data import BatchSampler
from transformers import TrainerState

from distill_trainer.baseline import run_baseline
from distill_trainer.curriculum import TEACHER_LOSS, CurriculumSampler, check_curriculum, with_teacher_losses
from distill_trainer.data import DistillationCollator
from distill_trainer.errors import ConfigurationError, DataError, UnsupportedModelError
from distill_trainer.schedules import LOSS_NAMES, competence
from distill_trainer.trainer import DistillationTrainer

SIZE = 200


def sampler(difficulties=None, *, epoch=0.0, max_steps=10**6, seed=0, windows_per_step=4):
    difficulties = torch.arange(SIZE).flip(0) if difficulties is None else difficulties
    state = TrainerState(epoch=epoch, max_steps=max_steps)
    return CurriculumSampler(difficulties, lambda: state, windows_per_step=windows_per_step, seed=seed)


@pytest.mark.parametrize("epoch", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("size", [1, 2, 3, SIZE])
def test_every_pass_reads_every_window_once(epoch, size):
    order = list(sampler(torch.rand(size), epoch=epoch))
    assert sorted(order) == list(range(size)) and len(sampler(torch.rand(size))) == size


@pytest.mark.parametrize("max_steps", [10**6, 20])
def test_a_window_comes_when_the_student_is_competent_and_not_before(max_steps):
    # Index 199 is the easiest. A run of 20 steps of 4 windows has a curriculum of 80.
    length, ranks = min(4 * max_steps, SIZE), [SIZE - 1 - index for index in sampler(max_steps=max_steps)]
    for position, rank in enumerate(ranks):
        progress = min(position / length, 1.0)
        assert rank < math.ceil(math.sqrt(progress * (1 - 0.01**2) + 0.01**2) * SIZE)
    # Not just the easiest of those that are left.
    assert ranks != sorted(ranks) and max(ranks[:length]) > 0.9 * SIZE


def test_each_draw_is_uniform_among_the_unlocked():
    # The third of 4 windows per pass: at half of the curriculum 3 of 4 are unlocked, one of which is left over.
    firsts = [tuple(sampler(torch.arange(4), seed=seed))[:2] for seed in range(600)]
    assert competence(0.25) == pytest.approx(0.5, abs=1e-3) and {first for first, _ in firsts} == {0}
    # At progress 1/4 the competence is just above a half: 3 windows are unlocked, and 0 is gone.
    assert [sum(second == index for _, second in firsts) for index in (1, 2)] == pytest.approx([300, 300], abs=60)


def test_later_passes_are_in_any_order():
    order = list(sampler(epoch=1.0))
    half = sum(index >= SIZE // 2 for index in order[: SIZE // 2])
    assert abs(half - SIZE // 4) < 20 and order != list(sampler(epoch=2.0))


def test_the_order_depends_on_seed_and_pass_alone():
    torch.manual_seed(1)
    first = list(sampler(seed=3))
    torch.manual_seed(2)
    assert list(sampler(seed=3, epoch=0.7)) == first != list(sampler(seed=4))


def test_equally_difficult_windows_are_in_random_order():
    drawn = list(sampler(torch.zeros(SIZE)))
    correlation = torch.corrcoef(torch.stack([torch.tensor(drawn).float(), torch.arange(SIZE).float()]))[0, 1]
    assert abs(float(correlation)) < 0.25


def test_ranks_share_one_order():
    whole = list(BatchSampler(sampler(), 4, drop_last=False))
    for rank in range(2):
        shard = BatchSamplerShard(BatchSampler(sampler(), 4, drop_last=False), 2, rank)
        assert list(shard) == whole[rank::2]


def mean_loss(model, window):
    """One window alone, in float64."""
    ids = torch.tensor([window["teacher_input_ids"]])
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    return -float(logprobs.gather(-1, ids[0, 1:, None]).mean())


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_the_teachers_loss_is_that_of_each_window_alone(tmp_path, padding_side):
    teacher = tiny_trainer(tmp_path).teacher
    sides = (tokenizer("student", padding_side), tokenizer("teacher", padding_side))
    options = (DistillationCollator(*sides), Accelerator(cpu=True))
    graded = with_teacher_losses(windows(), teacher, *options, batch_size=3)
    assert list(graded[TEACHER_LOSS]) == pytest.approx([mean_loss(teacher.model, w) for w in windows()], rel=1e-4)
    assert graded.remove_columns(TEACHER_LOSS)[:] == windows()[:]
    # What is there already is taken.
    own = windows().add_column(TEACHER_LOSS, [float(index) for index in range(len(windows()))])
    assert with_teacher_losses(own, None, *options, batch_size=3) is own


def test_a_loss_of_the_teacher_that_is_not_finite_is_an_error(tmp_path):
    trainer = tiny_trainer(tmp_path)
    with torch.no_grad():
        trainer.teacher.model.get_output_embeddings().weight[5] = math.inf
    with pytest.raises(UnsupportedModelError, match=rf"loss is not finite on {len(windows())} windows"):
        with_teacher_losses(windows(), trainer.teacher, trainer.data_collator, trainer.accelerator, batch_size=4)


class Reader:
    """A collator that keeps what it was given."""

    def __init__(self, collator):
        self.collator, self.seen = collator, []

    def __call__(self, rows):
        self.seen.append([row["input_ids"] for row in rows])
        return self.collator(rows)


def watched(trainer):
    trainer.data_collator = Reader(trainer.data_collator)
    return trainer


@pytest.mark.parametrize("curriculum", ["length", "teacher_loss"])
def test_the_run_and_its_baseline_read_easy_windows_first_in_the_same_batches(tmp_path, monkeypatch, curriculum):
    student = tiny_llama()
    before, readers = copy.deepcopy(student), []
    original = DistillationTrainer.train

    def train(trainer, **options):
        readers.append(watched(trainer).data_collator)
        return original(trainer, **options)

    monkeypatch.setattr(DistillationTrainer, "train", train)
    # Two passes over 10 windows.
    trainer = tiny_trainer(tmp_path, student=student, data_curriculum=curriculum, max_steps=10, save_strategy="no")
    trainer.train()
    baseline = run_baseline(trainer, before)
    assert readers[0].seen == readers[1].seen and len(readers[0].seen) == 10
    assert baseline.teacher is None and len(logged(baseline, "loss")) == 10
    column = list(trainer.train_dataset[curriculum])
    first = readers[0].seen[0] + readers[0].seen[1]
    difficulty = {tuple(ids): value for ids, value in zip(trainer.train_dataset["input_ids"], column, strict=True)}
    # At the fourth draw of ten, 6 windows are unlocked.
    assert max(difficulty[tuple(ids)] for ids in first) <= sorted(column)[5]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_reads_on_in_the_same_order(tmp_path, accumulation):
    seen = []
    for folder, checkpoint in (("whole", None), ("resumed", "whole/checkpoint-4")):
        trainer = watched(
            tiny_trainer(
                tmp_path / folder,
                data_curriculum="length",
                max_steps=6,
                gradient_accumulation_steps=accumulation,
                save_strategy="steps",
                save_steps=4,
            )
        )
        trainer.train(resume_from_checkpoint=checkpoint and str(tmp_path / checkpoint))
        seen.append(trainer.data_collator.seen)
    # Step 4 is in the first pass, or with two micro-batches a step in the second.
    whole, resumed = seen
    assert len(resumed) < len(whole) and whole[-len(resumed) :] == resumed


def test_the_curriculum_counts_the_windows_of_all_micro_batches_of_a_step(tmp_path):
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    assert tiny_trainer(tmp_path, data_curriculum="length", **sizes)._get_train_sampler().windows_per_step == 6


def stream():
    return IterableDataset.from_generator(lambda: iter({"text": text} for text in TEXTS))


def trainer_over(tmp_path, dataset, *, has_teacher=True, **changes):
    return DistillationTrainer(
        tiny_llama(),
        tiny_moe() if has_teacher else None,
        arguments(tmp_path, **changes),
        train_dataset=dataset,
        processing_class=tokenizer("student"),
        teacher_processing_class=tokenizer("teacher"),
    )


@pytest.mark.parametrize("curriculum", ["length", "teacher_loss"])
def test_a_stream_cannot_be_put_in_order(tmp_path, curriculum):
    with pytest.raises(ConfigurationError, match=f"data_curriculum must be none with streaming, got {curriculum}"):
        trainer_over(tmp_path, stream(), data_curriculum=curriculum)


def test_windows_without_their_length_cannot_be_ordered_by_it(tmp_path):
    with pytest.raises(ConfigurationError, match="data_curriculum length needs the column length"):
        trainer_over(tmp_path, windows().remove_columns("length"), data_curriculum="length")


@pytest.mark.parametrize(
    ("curriculum", "gap_schedule", "lines"),
    [("teacher_loss", True, 1), ("teacher_loss", False, 0), ("length", True, 0)],
)
def test_the_order_by_the_teachers_loss_is_said_to_move_the_gap(tmp_path, caplog, curriculum, gap_schedule, lines):
    tiny_trainer(tmp_path, data_curriculum=curriculum, gap_schedule=gap_schedule)
    assert sum("Set gap_schedule to false" in record.getMessage() for record in caplog.records) == lines


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "easy", [1.0]])
def test_a_given_difficulty_that_is_no_number_is_an_error(tmp_path, value):
    column = [value] * len(windows()) if isinstance(value, str | list) else [1.0, value, *[2.0] * (len(windows()) - 2)]
    said = re.escape(f"The column teacher_loss must hold finite numbers, got {value!r} in row ")
    with pytest.raises(DataError, match=said):
        trainer_over(tmp_path, windows().add_column(TEACHER_LOSS, column), data_curriculum="teacher_loss")


def test_a_given_difficulty_may_come_as_tensors(tmp_path):
    given = windows().add_column(TEACHER_LOSS, list(range(len(windows())))).with_format("torch")
    trainer = trainer_over(tmp_path, given, data_curriculum="teacher_loss")
    assert trainer._get_train_sampler().difficulties.tolist() == list(range(len(windows())))


def test_a_given_difficulty_is_read_in_one_piece(monkeypatch):
    monkeypatch.setattr(Column, "__iter__", None)
    check_curriculum("length", windows(), None)


def test_texts_can_be_ordered_too(tmp_path):
    trainer = trainer_over(tmp_path, Dataset.from_dict({"text": TEXTS}), data_curriculum="teacher_loss", max_steps=1)
    trainer.train()
    assert len(trainer.train_dataset[TEACHER_LOSS]) == len(windows())


def test_without_a_teacher_nobody_knows_what_it_finds_easy(tmp_path):
    alone = {f"{name}_weight": 0.0 for name in LOSS_NAMES if name != "lm"}
    with pytest.raises(ConfigurationError, match="data_curriculum must be none or length without a teacher"):
        tiny_trainer(tmp_path, teacher=None, data_curriculum="teacher_loss", **alone)
    documents = Dataset.from_dict({"text": TEXTS, TEACHER_LOSS: [1.0] * len(TEXTS)})
    with pytest.raises(ConfigurationError, match="data_curriculum must be none or length without a teacher"):
        trainer_over(tmp_path, documents, has_teacher=False, data_curriculum="teacher_loss", **alone)
