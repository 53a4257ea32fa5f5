import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
from read_page import Page

from distill_trainer.report.compare import HEADER, OTHER_TEXT, SAME_TEXT, UNKNOWN_TEXT, main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def runs(report, tmp_path, monkeypatch):
    """Two finished runs in the current folder; the second without a baseline."""
    monkeypatch.chdir(tmp_path)
    other = copy.deepcopy(report)
    other["baseline"] = None
    other["student"]["bits_per_byte"] = 2.1111
    other["environment"]["command"] = "run_distillation.py other.yaml"
    for name, found in (("first", report), ("second", other)):
        (tmp_path / name / "report").mkdir(parents=True)
        (tmp_path / name / "report/report.json").write_text(json.dumps(found))
    return tmp_path


def printed(capsys, *arguments):
    main(["compare", *arguments])
    return capsys.readouterr().out


def test_runs_stand_side_by_side(runs, capsys):
    lines = printed(capsys, "first", "second").splitlines()
    assert lines[0].split()[:2] == ["run", "before"] and len({len(line) for line in lines[:4]}) == 1
    assert lines[2].split()[:5] == ["first", "2.8311", "2.3225", "2.2758", "1.7203"]
    assert lines[3].split()[:5] == ["second", "2.8311", "-", "2.1111", "1.7203"]
    assert lines[5] == SAME_TEXT
    assert lines[6:] == [
        "first: python run_distillation.py configs/demo.yaml --seed 0",
        "second: python run_distillation.py other.yaml",
    ]


def test_the_report_folder_and_the_file_are_runs_as_well(runs, capsys):
    rows = printed(capsys, "first/report", "second/report/report.json").splitlines()[2:4]
    assert [row.split()[3] for row in rows] == ["2.2758", "2.1111"]


@pytest.fixture
def scope_with(runs, capsys):
    """The sentence on what compares, with other values in the data of some of the runs."""

    def scope_with(changes, names=("second",)):
        for name in names:
            path = runs / name / "report/report.json"
            changed = json.loads(path.read_text())
            changed["data"] |= changes
            path.write_text(json.dumps(changed))
        return printed(capsys, "first", "second").splitlines()[5]

    return scope_with


@pytest.mark.parametrize(
    "change", [{"eval_sha256": "a0" * 32}, {"scored_bytes": 402_112}, {"eval_max_length": 64}, {"eval_stride": 1}]
)
def test_runs_on_other_text_or_in_other_windows_are_said_not_to_compare(scope_with, change):
    assert scope_with(change) == OTHER_TEXT


@pytest.mark.parametrize("key", ["eval_sha256", "scored_bytes", "eval_max_length", "eval_stride"])
@pytest.mark.parametrize("names", [("second",), ("first", "second")])
def test_a_report_that_does_not_say_what_was_scored_leaves_it_open(scope_with, key, names):
    assert scope_with({key: None}, names) == UNKNOWN_TEXT


def test_a_report_without_the_texts_hash_but_of_other_length_is_of_other_text(scope_with):
    assert scope_with({"eval_sha256": None, "scored_bytes": 1}) == OTHER_TEXT


def test_a_page_is_written_when_asked_for(runs, capsys):
    printed(capsys, "first", "second", "--output", "runs.html")
    page = Page((runs / "runs.html").read_text())
    assert all(name in page.text for name in (*HEADER, "first", "second", "2.1111", "other.yaml"))
    assert "script" not in {tag for tag, _ in page.tags}


REFUSED = {
    "one run": (["first"], "Two runs or more are needed to compare, got first alone."),
    "no run": ([], "the following arguments are required: RUN"),
    "a missing folder": (["first", "nowhere"], "nowhere has no report: there is no nowhere/report/report.json."),
    "no JSON": (["first", "broken.json"], "broken.json cannot be read as a report"),
    "another JSON": (["first", "other.json"], "other.json is no report of schema 1."),
    "text for a number": (["first", "text.json"], "text.json is damaged: "),
    "a list for a number": (["first", "bytes.json"], "bytes.json is damaged: "),
    "a list for a mapping": (["first", "data.json"], "data.json is damaged: "),
    "an empty list for a mapping": (
        ["first", "environment.json"],
        "environment.json is damaged: environment is no map",
    ),
    "no model": (["first", "baseline.json"], "baseline.json is damaged: baseline is no mapping."),
    "a student without figures": (["first", "empty.json"], "empty.json is damaged: its student has no bits_per_byte."),
    "a list": (["first", "list.json"], "list.json is no report of schema 1."),
    "not a page": (["first", "second", "--output", "runs.pdf"], "--output must end in .html, got runs.pdf."),
    "no such place": (["first", "second", "--output", "no/x.html"], "--output cannot be written to no/x.html"),
    "an unknown flag": (["first", "second", "--wide"], "unrecognized arguments: --wide"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_compared_is_refused_in_one_line(runs, capsys, arguments, message):
    good = '{"schema": 1, "student": {"bits_per_byte": 2.0}, '
    damaged = {
        "text": '"student": {"bits_per_byte": "a"}}',
        "bytes": '"data": {"scored_bytes": [1]}}',
        "data": '"data": [1]}',
        "environment": '"environment": []}',
        "baseline": '"baseline": 0}',
        "empty": '"student": {}}',
    }
    contents = {"broken": '{"schema', "other": '{"schema": 2}', "list": "[1]"}
    contents |= {name: good + content for name, content in damaged.items()}
    for name, content in contents.items():
        (runs / f"{name}.json").write_text(content)
    before = sorted(runs.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main(["compare", *arguments])
    output = capsys.readouterr()
    assert ended.value.code == 2 and output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1 and message in output.err
    assert sorted(runs.rglob("*")) == before


def test_the_module_itself_can_be_started(runs):
    command = [sys.executable, "-m", "distill_trainer.report", "compare", "first", "nowhere"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=runs, env={"PYTHONPATH": str(ROOT)}, timeout=300
    )
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: nowhere has no report")
