"""The teachers of the benchmarks are saved whole: an interrupted save is made anew, not taken for a model."""

import importlib
from pathlib import Path

import pytest
from builders import tiny_llama, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


@pytest.fixture
def benchmark_module(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")
    return importlib.import_module


def make_teacher(benchmark_module, monkeypatch, name, folder):
    """Run what makes the teacher of a benchmark, without its texts and its training."""
    bench = benchmark_module(name)
    monkeypatch.setattr(bench, "load_sotu", lambda side: [])
    monkeypatch.setattr(bench, "train_language_model", lambda *args, **options: None)
    if name == "native_teacher":
        monkeypatch.setattr("sys.argv", ["native_teacher.py", "--output", str(folder)])
        bench.main()
    else:
        monkeypatch.setattr(bench, "WEAK", folder)
        bench.make_weak_teacher()


@pytest.mark.parametrize("name", ["native_teacher", "bench_when_it_pays"])
def test_an_interrupted_teacher_is_no_teacher(benchmark_module, monkeypatch, tmp_path, name):
    folder = tmp_path / "outputs" / "teacher"
    save = PreTrainedModel.save_pretrained

    def interrupted(model, path, **options):
        save(model, path, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PreTrainedModel, "save_pretrained", interrupted)
        make_teacher(benchmark_module, patch, name, folder)
    assert not (folder / "config.json").exists() and list(folder.parent.iterdir()) == [folder]
    make_teacher(benchmark_module, monkeypatch, name, folder)
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == len(AutoTokenizer.from_pretrained(folder))


def test_a_teacher_that_is_made_again_loses_nothing_else_in_its_folder(benchmark_module, tmp_path):
    (tmp_path / "notes.txt").touch()
    for seed in (0, 1):
        benchmark_module("saving").save_whole(tmp_path, tiny_llama(seed), tokenizer("student"))
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").is_file()
    assert found.lm_head.weight.equal(tiny_llama(1).lm_head.weight)
