import math
import time
from itertools import count

import pytest
import torch
from builders import TEXTS, tiny_llama, tiny_moe, tokenizer

from distill_trainer.evaluation import speed
from distill_trainer.evaluation.measure import floating_dtype, model_size
from distill_trainer.evaluation.speed import (
    NEW_TOKENS,
    PROMPT_CHARACTERS,
    PeakMemory,
    cast_up,
    generate,
    measure_speed,
    memory_kind,
    prompt_ids,
)
from distill_trainer.evaluation.windows import evaluation_batches

CPU = torch.device("cpu")
TEXT = TEXTS[0]


def batch():
    tokenizers = tokenizer("student"), tokenizer("teacher")
    return evaluation_batches(TEXTS, *tokenizers, max_length=16, stride=8, batch_size=3)[0][1]


def measured(model, side="student", **changes):
    prompt = prompt_ids(tokenizer(side), TEXT)
    return measure_speed(model, batch(), prompt, side, **({"bytes_per_token": 3.0, "warmup": 1} | changes))


class Clock:
    """Time that passes in the timed work only: `durations` of the runs in turn."""

    def __init__(self, *durations):
        self.durations, self.now, self.ticks = durations, 0.0, count()

    def perf_counter(self):
        tick = next(self.ticks)
        # Read before and after each run.
        self.now += self.durations[tick // 2] if tick % 2 else 0.0
        return self.now


def dtypes_of(model):
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    return seen


def test_casting_up_is_undone_bit_for_bit_and_spares_buffers():
    model = tiny_llama().to(torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = {name: value.dtype for name, value in model.named_buffers()}
    with cast_up(model, torch.float32):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert {name: value.dtype for name, value in model.named_buffers()} == buffers
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert floating_dtype(model) == torch.bfloat16


@pytest.mark.parametrize(("side", "make"), [("student", tiny_llama), ("teacher", tiny_moe)])
def test_speeds_are_medians_of_the_timed_runs_per_token_and_per_byte(monkeypatch, side, make):
    runs = {"prefill": 0, "generate": 0}
    forward, greedy = speed.forward_logits, speed.generate

    def counted(name, work):
        def call(*arguments):
            runs[name] += 1
            return work(*arguments)

        return call

    monkeypatch.setattr(speed, "forward_logits", counted("prefill", forward))
    monkeypatch.setattr(speed, "generate", counted("generate", greedy))
    monkeypatch.setattr(speed.time, "perf_counter", Clock(4.0, 1.0, 50.0, 20.0, 90.0, 10.0).perf_counter)
    found = measured(make(), side, repeats=3, warmup=2)
    mask = {"student": "attention_mask", "teacher": "teacher_attention_mask"}[side]
    assert found["tokens_per_second"] == int(batch()[mask].sum()) / 4.0
    assert found["bytes_per_second"] == int(batch()["window_bytes"].sum()) / 4.0
    assert found["generated_tokens_per_second"] == NEW_TOKENS / 20.0
    assert found["generated_bytes_per_second"] == 3.0 * NEW_TOKENS / 20.0
    assert runs == {"prefill": 5, "generate": 5}


def test_all_work_is_done_in_the_common_dtype_and_the_weights_come_back():
    model = tiny_llama().half()
    dtypes = dtypes_of(model)
    measured(model, dtype=torch.float32, repeats=1)
    assert len(dtypes) == 2 * (1 + NEW_TOKENS) and set(dtypes) == {torch.float32}
    assert floating_dtype(model) == torch.float16


def test_a_quantised_model_keeps_its_own_dtype_for_the_speed():
    model = tiny_llama().to(torch.bfloat16)
    model.is_quantized = True
    dtypes = dtypes_of(model)
    assert math.isfinite(measured(model, dtype=torch.float32, repeats=1)["bytes_per_second"])
    assert set(dtypes) == {torch.bfloat16}


def test_generation_is_greedy_with_a_cache_and_does_not_stop_early():
    model = tiny_llama(initializer_range=0.3)
    prompt = prompt_ids(tokenizer("student"), TEXT)
    # The likeliest token ends the text at once, and the model's own settings are all but plain greedy search.
    with torch.no_grad():
        first = model(prompt).logits[0, -1].argmax().item()
    model.generation_config.eos_token_id = first
    model.generation_config.do_sample, model.generation_config.repetition_penalty = True, 1.5
    lengths = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    written = generate(model, prompt)
    assert written.shape == (1, prompt.shape[1] + NEW_TOKENS) and (written[:, : prompt.shape[1]] == prompt).all()
    # One pass over the prompt, then a token at a time.
    assert lengths == [prompt.shape[1]] + [1] * (NEW_TOKENS - 1)
    ids = prompt
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        logits[first] = -torch.inf
        ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
    assert torch.equal(written, ids)


def test_all_models_continue_the_same_text():
    prompts = {side: prompt_ids(tokenizer(side), TEXT)[0] for side in ("student", "teacher")}
    assert {tokenizer(side).decode(ids) for side, ids in prompts.items()} == {TEXT[:PROMPT_CHARACTERS]}


def test_memory_on_a_cpu_is_the_peak_of_the_process_while_it_works():
    memory = PeakMemory(tiny_llama())
    memory.watch(lambda: None)
    quiet = memory.megabytes
    assert quiet > model_size(tiny_llama())["size_mb"]

    def work():
        held = torch.ones(50_000_000)
        time.sleep(0.1)
        del held

    memory.watch(work)
    assert memory.megabytes > quiet + 150
    peak = memory.megabytes
    memory.watch(lambda: None)
    assert memory.megabytes == peak


def test_the_memory_that_is_reported_is_named():
    assert "whole process" in memory_kind(CPU)
    assert "this model alone" in memory_kind(torch.device("cuda"))


@pytest.mark.gpu
def test_memory_on_a_gpu_is_that_of_the_model_alone():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    model, other = tiny_llama().cuda(), torch.ones(50_000_000, device="cuda")
    weights = model_size(model)["size_mb"]
    memory = PeakMemory(model)
    memory.watch(lambda: torch.ones(10_000_000, device="cuda"))
    assert memory.megabytes == pytest.approx(weights + 40, abs=3) and len(other)
