import importlib.util
import json
import math
from functools import partial
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import ASSETS, tiny_llama, tokenizer

from distill_trainer.errors import ConfigurationError
from distill_trainer.evaluation import benchmarks
from distill_trainer.evaluation.benchmarks import OFFLINE, Benchmarks, benchmark_rows, load_benchmarks
from distill_trainer.loading import load_causal_lm

EXAMPLES = [
    ("The Congress of the United", [" States", " potato", " walk"], 0),
    ("to the people of the United", [" banana", " States"], 1),
    ("In the year of our", [" independence", " dog"], 1),
]
TASK = """
task: next_word
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 2.0
"""
needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with one task and its data. The harness's own tasks, whose files take long to read, are left out."""
    if importlib.util.find_spec("lm_eval"):
        from lm_eval.tasks import TaskManager

        monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    data = tmp_path / "next_word.jsonl"
    rows = [{"context": context, "choices": choices, "answer": answer} for context, choices, answer in EXAMPLES]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "next_word.yaml").write_text(TASK.format(data=data))
    return tmp_path


def is_right(model, context, choices, answer):
    """Whether the true continuation is the likeliest, token by token in float64."""
    loaded, sums = tokenizer("student"), []
    for choice in choices:
        before, ids = loaded(context)["input_ids"], loaded(context + choice)["input_ids"]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
        sums.append(sum(logprobs[n - 1, ids[n]].item() for n in range(len(before), len(ids))))
    return sums.index(max(sums)) == answer


def results(accuracy, stderr):
    return {
        "results": {
            "arc": {
                "alias": "arc",
                "sample_len": 40,
                "acc,none": accuracy,
                "acc_stderr,none": stderr,
                "exact_match,strict": accuracy / 2,
                "exact_match_stderr,strict": "N/A",
            }
        },
        "versions": {"arc": 1.0},
        "n-shot": {"arc": 5},
        "higher_is_better": {"arc": {"acc": True}},
        "n-samples": {"arc": {"original": 99, "effective": 40}},
    }


def test_a_row_holds_one_metric_of_one_task_with_the_scores_of_all_students():
    rows = benchmark_rows({"student_before": results(0.25, 0.07), "student": results(0.5, 0.08)})
    assert rows == [
        {
            "task": "arc",
            "version": 1.0,
            "metric": "acc",
            "filter": "none",
            "higher_is_better": True,
            "num_fewshot": 5,
            "samples": 40,
            "scores": {
                "student_before": {"value": 0.25, "stderr": 0.07},
                "student": {"value": 0.5, "stderr": 0.08},
            },
        },
        {
            "task": "arc",
            "version": 1.0,
            "metric": "exact_match",
            "filter": "strict",
            "higher_is_better": None,
            "num_fewshot": 5,
            "samples": 40,
            "scores": {
                "student_before": {"value": 0.125, "stderr": None},
                "student": {"value": 0.25, "stderr": None},
            },
        },
    ]


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int64])
def test_a_score_of_numpy_becomes_a_plain_number(kind):
    (row, _) = benchmark_rows({"student": results(kind(1), kind(0))})
    assert row["scores"] == {"student": {"value": 1, "stderr": 0}}
    assert {type(value) for value in row["scores"]["student"].values()} <= {int, float}


def test_without_tasks_the_harness_is_not_looked_for(monkeypatch):
    monkeypatch.setattr(benchmarks, "version", None)
    assert load_benchmarks(None) is None and load_benchmarks([]) is None


@pytest.mark.parametrize("installed", [None, "0.4.9"])
def test_a_missing_or_old_harness_is_refused_with_how_to_get_it(monkeypatch, installed):
    def version(package):
        assert package == "lm_eval"
        if installed is None:
            raise PackageNotFoundError(package)
        return installed

    monkeypatch.setattr(benchmarks, "version", version)
    with pytest.raises(ConfigurationError) as raised:
        load_benchmarks(["arc_easy"])
    assert str(raised.value) == (
        f"lm_eval_tasks needs lm_eval 0.4.13 or newer, got {installed or 'none installed'}. "
        'Install it with pip install "distill_trainer[lm_eval]", or leave lm_eval_tasks out.'
    )


def test_a_folder_of_tasks_that_does_not_exist_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmarks, "version", lambda package: "0.4.13")
    with pytest.raises(ConfigurationError, match="lm_eval_include_path must be a folder with task files, got .*no"):
        Benchmarks(["arc_easy"], str(tmp_path / "no"))


@needs_harness
def test_the_harness_scores_a_task_from_local_files(tasks):
    student, before = load_causal_lm(str(ASSETS / "student")).train(), tiny_llama(initializer_range=0.3)
    loaded = Benchmarks(["next_word"], str(tasks))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    found = {
        role: loaded.run(model, tokenizer("student"), batch_size=2)
        for role, model in (("student_before", before), ("student", student))
    }
    assert student.training and torch.equal(torch.get_rng_state(), state)
    table = loaded.table(found)
    assert table["harness"] and table["limit"] is None
    (row,) = table["rows"]
    assert (row["task"], row["version"], row["metric"], row["samples"]) == ("next_word", 2.0, "acc", 3)
    for role, model in (("student_before", before), ("student", student.eval())):
        right = [is_right(model, *example) for example in EXAMPLES]
        mean = sum(right) / 3
        assert row["scores"][role]["value"] == pytest.approx(mean)
        # Standard error of a mean of three.
        assert row["scores"][role]["stderr"] == pytest.approx(math.sqrt(mean * (1 - mean) / 2))


@needs_harness
def test_a_task_can_be_a_file_and_only_its_first_examples_taken(tasks):
    loaded = Benchmarks([str(tasks / "next_word.yaml")], limit=2)
    table = loaded.table({"student": loaded.run(tiny_llama(), tokenizer("student"), batch_size=2)})
    assert table["limit"] == 2 and [row["samples"] for row in table["rows"]] == [2]


@needs_harness
def test_tasks_that_cannot_run_are_refused_when_they_are_named(tasks):
    with pytest.raises(ConfigurationError, match="got next_ward. The nearest is next_word."):
        Benchmarks(["next_ward"], str(tasks))
    (tasks / "next_word.jsonl").unlink()
    with pytest.raises(ConfigurationError, match="lm_eval_tasks: the task next_word cannot be loaded: "):
        Benchmarks(["next_word"], str(tasks))


@needs_harness
@pytest.mark.parametrize("kind", [RuntimeError, AssertionError])
def test_a_task_whose_own_code_or_data_fail_is_refused_when_it_is_named(tasks, monkeypatch, kind):
    def load(self, names):
        raise kind("Dataset scripts are no longer supported")

    monkeypatch.setattr("lm_eval.tasks.TaskManager.func.load", load)
    with pytest.raises(ConfigurationError, match="next_word cannot be loaded: Dataset scripts are no longer"):
        Benchmarks(["next_word"], str(tasks))


REFUSED = {
    "a name in a template": (
        ("{{context}}", "{{contextx}}"),
        "lm_eval_tasks: the task next_word cannot be loaded: 'contextx' is undefined",
    ),
    "a template that is no template": (("{{context}}", "{{context"), "the task next_word cannot be loaded: "),
    "a template that cannot be computed": (
        ("{{context}}", "{{1 / 0}}"),
        "the task next_word cannot be loaded: division by zero",
    ),
    "choices that are no list": (('"{{choices}}"', '"[{{context}}"'), "the task next_word cannot be loaded: "),
    "an answer out of range": (("doc_to_target: answer", "doc_to_target: 7"), "the task next_word cannot be loaded: "),
    "a split": (
        ("test_split: test", "test_split: nope"),
        "lm_eval_tasks: the task next_word cannot be loaded: there is no 'nope' in its data or its file. Correct the "
        "split or key there.",
    ),
    "a metric": (
        ("metric: acc", "metric: accx"),
        "lm_eval_tasks: the task next_word must be measured by metrics and aggregations that the harness or evaluate "
        "has, got accx. Correct metric_list in its file.",
    ),
    "an aggregation": (("aggregation: mean", "aggregation: average"), "evaluate has, got acc. Correct metric_list"),
}


@needs_harness
@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_a_task_file_that_cannot_be_measured_is_refused_before_training(tasks, change, message):
    path = tasks / "next_word.yaml"
    assert path.read_text().count(change[0]) == 1
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(ConfigurationError) as raised:
        Benchmarks(["next_word"], str(tasks))
    assert message in str(raised.value) and "\n" not in str(raised.value)


@needs_harness
def test_a_task_that_measures_by_itself_may_call_its_metrics_as_it_likes(tasks):
    (tasks / "own.py").write_text("def measure(doc, results):\n    return {'mine': 0.5}\n")
    path = tasks / "next_word.yaml"
    own = path.read_text().replace("metric: acc", "metric: mine") + "process_results: !function own.measure\n"
    path.write_text(own)
    loaded = Benchmarks([str(path)])
    table = loaded.table({"student": loaded.run(tiny_llama(), tokenizer("student"), batch_size=2)})
    assert [row["scores"]["student"]["value"] for row in table["rows"]] == [0.5] and table["unscored"] == []


@needs_harness
def test_data_that_no_network_reaches_say_how_to_get_them(tasks):
    """The harness's own tasks take their data from the Hub, which the tests may not ask."""
    path = tasks / "remote.yaml"
    local = TASK.format(data="x").replace("dataset_path: json", "dataset_path: org/data")
    path.write_text(local.replace("dataset_kwargs:\n  data_files:\n    test: x\n", ""))
    with pytest.raises(ConfigurationError) as raised:
        Benchmarks([str(path)])
    assert str(raised.value).endswith(f". {OFFLINE}") and "org/data" in str(raised.value)


def test_a_task_without_any_score_is_named(monkeypatch, caplog):
    monkeypatch.setattr(benchmarks.logger, "propagate", True)
    silent = results(0.5, 0.1) | {"n-samples": {"arc": {"effective": 40}, "silent": {"effective": 3}}}
    silent["results"]["silent"] = {"alias": "silent", "sample_len": 0}
    table = Benchmarks.table(SimpleNamespace(harness="0.4.13", limit=None), {"student": silent})
    assert table["unscored"] == ["silent"] and "gave no score for silent" in caplog.text
