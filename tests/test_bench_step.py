"""The benchmark of a whole step runs, and leaves out what it says."""

import importlib
from pathlib import Path

import pytest

from distill_trainer.schedules import LOSS_NAMES


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")
    return importlib.import_module("bench_step")


def test_a_tiny_run_prints_every_part_beside_the_floor(bench, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench_step.py", "--tiny", "--device", "cpu", "--tokens", "30", "--repeats", "1"])
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    for name in ("floor", "whole step", *(f"step without {part}" for part in (*LOSS_NAMES, "router"))):
        (line,) = (line for line in lines if line.startswith(name + "  "))
        assert float(line[24:33]) > 0
    assert "1 x 30 tokens, 29 anchors" in lines[1]
    assert lines[-3].startswith("whole step over its floor:") and lines[-3].endswith("budget 1.15")
    assert lines[-2].startswith("mean of steps, where the router learns in every 4th:")
    assert lines[-1].startswith("whole step over the floor and 3 passes of the teacher's head:")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--device cuda", "--device must be cpu where torch finds no GPU, got cuda."),
        ("--batch_size 0", "--batch_size must be 1 or above, got 0."),
        ("--tokens 0", "--tokens must be 2 or above, got 0."),
        ("--tokens -3", "--tokens must be 2 or above, got -3."),
        ("--repeats 0", "--repeats must be 1 or above, got 0."),
        ("--logit_chunk_mb -1", "--logit_chunk_mb must be above 0, got -1.0."),
        ("--logit_chunk_mb nan", "--logit_chunk_mb must be above 0, got nan."),
    ],
)
def test_an_option_that_cannot_work_is_one_line(bench, monkeypatch, capsys, flags, said):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench_step.py", "--tiny", *flags.split()])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2 and capsys.readouterr().err.endswith(f"error: {said}\n")


@pytest.mark.parametrize("part", ["feature", "layerwise", "contrastive"])
def test_a_step_without_a_part_leaves_its_projections_alone(bench, part):
    step = bench.Step(bench.TINY, 1, 30, "cpu")
    projections = getattr(step.models[True], f"{part}_projections")
    step((part,))
    assert all(parameter.grad is None for parameter in projections.parameters())
    step()
    assert all(parameter.grad is not None for parameter in projections.parameters())
