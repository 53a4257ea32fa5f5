"""What one causal language model costs at work: speed of reading and of writing, and memory."""

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from distill_trainer.data import special_prefix
from distill_trainer.evaluation.measure import evaluating, floating_dtype, forward_logits, side_inputs
from distill_trainer.tokens import encode

# Long enough to be a text, short enough for the smallest context and for a CPU.
PROMPT_CHARACTERS, NEW_TOKENS = 64, 32
SAMPLING_SECONDS = 0.002


@contextmanager
def cast_up(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Hold the floating parameters in a wider `dtype` for a while; going back loses nothing.

    Buffers keep their dtype: the frequencies of a rotary embedding stay in float32 beside half-precision weights.
    """
    own = {parameter: parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    try:
        for parameter in own:
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, own_dtype in own.items():
            parameter.data = parameter.data.to(own_dtype)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """The first `PROMPT_CHARACTERS` of a text as one model reads them, `(1, prompt_length)`."""
    return torch.tensor([special_prefix(tokenizer) + encode(tokenizer, text[:PROMPT_CHARACTERS])[0]])


def measure_speed(
    model: PreTrainedModel,
    batch: dict[str, Tensor],
    prompt: Tensor,
    side: str = "student",
    *,
    bytes_per_token: float,
    dtype: torch.dtype | None = None,
    repeats: int = 5,
    warmup: int = 2,
) -> dict[str, float]:
    """Speed of prefill (the forward pass over a batch) and of generation, medians behind untimed warm-up runs.

    Generation is greedy with a cache, `NEW_TOKENS` tokens whatever is written, the pass over the prompt included.

    Args:
        model: Any causal language model.
        batch: Of `collate_windows`.
        prompt: See `prompt_ids`.
        side: "student" or "teacher": whose token ids the model reads.
        bytes_per_token: UTF-8 bytes in one of the model's tokens of held-out text, on average. What a model happens to
            write, often one word again and again, would say nothing about its speed.
        dtype: Dtype for the work, at least as wide as the model's own, so that models compare. None keeps the own.
            A quantised model always keeps its own.
        repeats: Timed runs.
        warmup: Untimed runs before them, 1 or above; the memory is watched in these.

    Returns:
        `tokens_per_second` and `bytes_per_second` of all text in the batch's windows, context included;
        `generated_tokens_per_second` and `generated_bytes_per_second`; `peak_memory_mb`, see `PeakMemory`.
    """
    if dtype is None or getattr(model, "is_quantized", False):
        dtype = floating_dtype(model)
    prompt = prompt.to(model.device)
    tokens = int(side_inputs(batch, side, model.device)[1].sum())
    with evaluating(model), cast_up(model, dtype):
        memory = PeakMemory(model)
        works = (lambda: forward_logits(model, batch, side)), (lambda: generate(model, prompt))
        for _ in range(warmup):
            for work in works:
                memory.watch(work)
        prefill, generation = (
            statistics.median(_seconds(work, model.device) for _ in range(repeats)) for work in works
        )
    return {
        "tokens_per_second": tokens / prefill,
        "bytes_per_second": int(batch["window_bytes"].sum()) / prefill,
        "generated_tokens_per_second": NEW_TOKENS / generation,
        "generated_bytes_per_second": bytes_per_token * NEW_TOKENS / generation,
        "peak_memory_mb": memory.megabytes,
    }


def generate(model: PreTrainedModel, prompt: Tensor) -> Tensor:
    """`NEW_TOKENS` greedy tokens behind a prompt, with a cache and without an early stop.

    Returns:
        `(1, prompt_length + NEW_TOKENS)`.
    """
    # All that a model's own settings may hold beside plain greedy search, switched off.
    greedy = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        pad_token_id=0,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
    )
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=greedy)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_kind(device: torch.device) -> str:
    """What `peak_memory_mb` means on a device."""
    cuda = device.type == "cuda"
    return "CUDA allocator, this model alone" if cuda else "resident set of the whole process, other models included"


class PeakMemory:
    """The most memory that a model took while it was watched.

    On CUDA the weights plus what the allocator held above them; elsewhere the resident set of the process, sampled.
    The latter covers other models and the data too, so it is an upper bound and hardly compares models.

    Args:
        model: Whose work is watched; on CUDA its weights in the dtype they have now count.
    """

    def __init__(self, model: PreTrainedModel):
        self.device = model.device
        self.bytes = 0
        self._weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())

    def watch(self, work: Callable[[], object]) -> None:
        """Do the work and keep its peak, if it is the highest so far."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            work()
            peak = torch.cuda.max_memory_allocated(self.device) - before + self._weights
        else:
            peak = _sampled_resident_set(work)
        self.bytes = max(self.bytes, peak)

    @property
    def megabytes(self) -> float:
        """In 10^6 bytes."""
        return self.bytes / 1e6


def _sampled_resident_set(work: Callable[[], object]) -> int:
    """Largest resident set of this process, in bytes, while the work is done."""
    import psutil  # comes with accelerate, needed here only

    process, done = psutil.Process(), threading.Event()
    samples = [process.memory_info().rss]

    def sample() -> None:
        while not done.wait(SAMPLING_SECONDS):
            samples.append(process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return max(*samples, process.memory_info().rss)
