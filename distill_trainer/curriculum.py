"""The order in which training windows come: easy ones first, by a rule that needs no state."""

import math
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.utils.data import Sampler
from transformers import TrainerState
from transformers.utils import logging

from distill_trainer.data import DistillationCollator
from distill_trainer.errors import ConfigurationError, DataError, UnsupportedModelError
from distill_trainer.logit_loss import LogitSettings
from distill_trainer.logit_pass import LogitPass
from distill_trainer.schedules import DATA_CURRICULA, competence
from distill_trainer.taps import run_trunk
from distill_trainer.teacher import Teacher
from distill_trainer.validation import is_number

logger = logging.get_logger(__name__)

_, LENGTH, TEACHER_LOSS = DATA_CURRICULA


class CurriculumSampler(Sampler[int]):
    """Indices of all windows, in the first pass over them drawn from a growing share of the easiest.

    After a part p of the curriculum each window is drawn from the easiest `competence(p)` of all (competence-based
    curriculum learning, https://huggingface.co/papers/1903.09848), without those that were drawn before:
    a pass stays a pass, and no text is read twice before all is read once. Later passes draw from all.

    The order of a pass depends on `seed` and the number of the pass alone, so every process has the same, and a
    resumed run goes on in it.

    Args:
        difficulties: `(num_windows,)`. Equally difficult windows have a random order.
        state: Gives the Trainer's state when a pass begins: wrappers of a resumed run's dataloader do not hand down
            `set_epoch`.
        windows_per_step: Windows of an optimizer step. A pass is the curriculum, or the run where that is shorter.
        seed: Of the random numbers.
    """

    def __init__(self, difficulties: Tensor, state: Callable[[], TrainerState], *, windows_per_step: int, seed: int):
        self.difficulties, self.state, self.windows_per_step, self.seed = difficulties, state, windows_per_step, seed

    def __len__(self) -> int:
        return len(self.difficulties)

    def __iter__(self) -> Iterator[int]:
        state, size = self.state(), len(self)
        epoch, length = int(state.epoch), min(state.max_steps * self.windows_per_step, size)
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(size, generator=generator)
        if epoch > 0:
            yield from order.tolist()
            return
        ranked = order[self.difficulties[order].argsort(stable=True)].tolist()
        draws = torch.rand(size, generator=generator, dtype=torch.float64).tolist()
        available: list[int] = []
        taken = 0
        for position, draw in enumerate(draws):
            # Always more than were drawn so far, because the competence is above the progress.
            unlocked = math.ceil(competence(position / length) * size)
            available += ranked[taken:unlocked]
            taken = unlocked
            chosen = int(draw * len(available))
            available[chosen], available[-1] = available[-1], available[chosen]
            yield available.pop()


def check_curriculum(
    curriculum: str, dataset: Dataset | IterableDataset | None, teacher: Teacher | None, *, gap_schedule: bool = False
) -> None:
    """Raise unless the windows of a dataset can be put in this order; warn where the order misleads the gap schedule.

    Args:
        curriculum: The setting `data_curriculum`.
        dataset: Documents or windows.
        teacher: None without one.
        gap_schedule: The setting of this name.

    Raises:
        ConfigurationError: If they are a stream, or nobody is there to say how difficult they are.
        DataError: If the windows' own column does not say it.
    """
    if curriculum == "none" or dataset is None:
        return
    if isinstance(dataset, IterableDataset):
        raise ConfigurationError(
            f"data_curriculum must be none with streaming, got {curriculum}. All windows must be known beforehand."
        )
    # Columns of documents do not outlive the cut into windows.
    is_cut = "input_ids" in dataset.column_names
    given = is_cut and curriculum in dataset.column_names
    if curriculum == TEACHER_LOSS and teacher is None and not given:
        raise ConfigurationError(
            f"data_curriculum must be none or length without a teacher, got {curriculum}. "
            "Or give the training windows a column teacher_loss."
        )
    if curriculum == LENGTH and is_cut and not given:
        raise ConfigurationError("data_curriculum length needs the column length of prepare_dataset, got none.")
    for row, value in enumerate(dataset.with_format(None)[curriculum][:] if given else ()):
        if not is_number(value):
            raise DataError(f"The column {curriculum} must hold finite numbers, got {value!r} in row {row}.")
    if curriculum == TEACHER_LOSS and teacher is not None and gap_schedule:
        logger.warning(
            "With data_curriculum teacher_loss the gap to the teacher starts on the easiest windows, so that their "
            "order moves it too, and with it kl_weight. Set gap_schedule to false to keep kl_weight."
        )


def with_teacher_losses(
    dataset: Dataset, teacher: Teacher, collator: DistillationCollator, accelerator: Accelerator, *, batch_size: int
) -> Dataset:
    """The windows with a column `teacher_loss`: nats per token of the teacher; as they are where they have it.

    Every rank reads its share of the windows, and all get the same figures.

    Args:
        dataset: Windows of `prepare_dataset`.
        teacher: The frozen teacher, who reads with its own gate.
        collator: Pads the windows.
        accelerator: Of the trainer.
        batch_size: Windows at a time.

    Raises:
        UnsupportedModelError: If a loss is not finite.
    """
    if TEACHER_LOSS in dataset.column_names:
        return dataset
    losses = torch.zeros(len(dataset), device=accelerator.device)
    rows = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        batch = collator([dataset[row] for row in chosen])
        losses[list(chosen)] = _teacher_loss(teacher, {n: value.to(losses.device) for n, value in batch.items()})
    losses = accelerator.reduce(losses, "sum")
    if broken := int((~losses.isfinite()).sum()):
        raise UnsupportedModelError(
            f"The teacher's loss is not finite on {broken} windows. Set teacher_dtype to bfloat16 or float32."
        )
    return dataset.add_column(TEACHER_LOSS, losses.tolist())


@torch.no_grad()
def _teacher_loss(teacher: Teacher, batch: dict[str, Tensor]) -> Tensor:
    """Mean loss of the teacher's tokens in each row, nats, `(batch_size,)`."""
    input_ids, mask = batch["teacher_input_ids"], batch["teacher_attention_mask"]
    states = run_trunk(teacher.model, input_ids, mask).last_hidden_state[:, :-1]
    predicted = (mask[:, :-1] * mask[:, 1:]).bool()
    logits = LogitPass(LogitSettings(), teacher.head, num_positions=input_ids.numel())
    nats = -logits.token_logprobs(teacher.head, states[predicted], input_ids[:, 1:][predicted])
    sums = nats.new_zeros(len(input_ids)).index_add(0, predicted.nonzero()[:, 0], nats)
    return sums / predicted.sum(dim=1)
