"""Time and memory of one call, on a CPU or a GPU; what the benchmarks beside this file share."""

import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def seconds(call: Callable[[], object], device: str) -> float:
    """Time of one call, its kernels included."""
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_extra(call: Callable[[], object], device: str, *, without: int | None = None) -> int:
    """Bytes that a call allocates at its peak beyond those that were there before it.

    Args:
        call: Called once.
        device: "cpu" or "cuda".
        without: On a CPU, tensors of so many bytes are not counted, such as a gradient that any training needs.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        # Gradients of the call before are among it, and make room for those of this call.
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    held = highest = 0
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        if abs(event.nbytes()) != without:
            held += event.nbytes()
            highest = max(highest, held)
    return highest


def measure(call: Callable[[], object], device: str, repeats: int, *, without: int | None = None) -> tuple[float, int]:
    """Median seconds behind one warm-up, and `peak_extra`."""
    call()
    times = [seconds(call, device) for _ in range(repeats)]
    return statistics.median(times), peak_extra(call, device, without=without)
