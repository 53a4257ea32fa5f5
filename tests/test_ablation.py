import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from builders import ASSETS

from distill_trainer.ablation import RESULT, StepClock, read_result, table
from distill_trainer.ablation_file import Ablation, read_ablation, settings_of
from run_distillation import main

ROOT = Path(__file__).parents[1]
TEXT = "The Union of these States was made by their people, and it is kept by them. " * 12


def content(tmp_path, **changes):
    """An ablation of two short runs over a small text."""
    (tmp_path / "texts").mkdir(exist_ok=True)
    for number in range(4):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"Message {number}. {TEXT}")
    settings = {
        "teacher_model_name_or_path": str(ASSETS / "teacher"),
        "student_model_name_or_path": str(ASSETS / "student"),
        "teacher_dtype": "float32",
        "datasets": [str(tmp_path / "texts")],
        "validation_fraction": 0.5,
        "max_length": 32,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "use_cpu": True,
        "output_dir": str(tmp_path / "out"),
        "seeds": [0],
        "reference": "gate",
        "variants": {
            "text": {"kl_weight": 0, "lm_weight": 1, **{f"{n}_weight": 0 for n in NAMES}},
            "gate": {"use_router": False},
            "router, all": {"router_layers": "all"},
        },
    }
    return settings | changes


NAMES = ("feature", "attention", "layerwise", "contrastive")


def written(tmp_path, settings):
    path = tmp_path / "ablation.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return str(path)


def test_every_variant_is_trained_scored_and_tabled_and_kept_when_run_again(tmp_path, capfd):
    path = written(tmp_path, content(tmp_path))
    assert main([path]) == 0
    shown = capfd.readouterr().out
    found = {p.parent.name: json.loads(p.read_text()) for p in (tmp_path / "out").glob(f"*/{RESULT}")}
    assert set(found) == {"text-0", "gate-0", "router__all-0"}
    assert found["text-0"]["teacher"] is None and found["gate-0"]["aware"] is None
    router = found["router__all-0"]
    assert router["teacher"] == pytest.approx(found["gate-0"]["teacher"])
    assert router["aware"] != router["teacher"] and 0 < router["aware"] < 10
    values = [result["bits_per_byte"] for result in found.values()]
    assert len(set(values)) == 3 and all(0 < value < 10 for value in values)
    row = next(line for line in shown.splitlines() if line.startswith("| router, all |"))
    difference = router["bits_per_byte"] - found["gate-0"]["bits_per_byte"]
    assert f"{router['bits_per_byte']:.4f}" in row and f"{difference:+.4f}" in row
    assert (tmp_path / "out" / "ablation.md").read_text() in shown
    assert "train_runtime" not in shown

    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob(f"*/{RESULT}")}
    (tmp_path / "out" / "text-0" / RESULT).unlink()
    assert main([path]) == 0
    for p, changed in before.items():
        assert (p.stat().st_mtime_ns == changed) is (p.parent.name != "text-0")
    again = json.loads((tmp_path / "out" / "text-0" / RESULT).read_text())
    assert again["bits_per_byte"] == found["text-0"]["bits_per_byte"], "a run is the same when it is repeated"

    assert main([path, "--max_steps", "3"]) == 2
    assert "was made with other settings" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"variants": []}, "variants must be a mapping"),
        ({"variants": {}}, "variants must be a mapping"),
        ({"variants": {"gate": 3}}, "variants must be a mapping"),
        ({"reference": ["gate"]}, "reference must be one of the variants, got ['gate']"),
        ({"output_dir": ["a"]}, "output_dir must name a folder, got ['a']"),
        ({"output_dir": None}, "output_dir must name a folder, got null"),
        ({"variants": {"gate": {"output_dir": "a"}}}, "output_dir must be left out, since an ablation"),
        ({"seeds": [2**40]}, "seeds must be a list of whole numbers from 0 to 999,999,999, got ['1099511627776']"),
        ({"reference": "none of them"}, "reference must be one of the variants, got none of them"),
        ({"seeds": []}, "seeds must be a list of whole numbers"),
        ({"seeds": ["x"]}, "seeds must be a list of whole numbers"),
        ({"jobs": 0}, "jobs must be from 1 to 9999, got 0"),
        ({"jobs": "²"}, "jobs must be from 1 to 9999, got ²"),
        ({"variants": {"gate": {}, "x" * 300: {}}}, "at most 255 bytes, got 302. Shorten it."),
        ({"variants": {"gate": {}, " ": {}}}, "the name of a variant must not be empty"),
        ({"variants": {"gate": {}, "語" * 100: {}}}, "must make a folder's name of at most 255 bytes, got 302"),
        ({"variants": {"gate": {}, " " * 290 + "x": {}}}, "must make a folder's name of at most 255 bytes, got 293"),
        ({"lm_eval_tasks": ["arc_easy"]}, "lm_eval_tasks must be left out, since an ablation"),
        ({"seeds": [1, 1]}, "two runs would share the folder"),
        ({"variants": {"gate": {}, "a b": {}, "a-b": {}}}, "two runs would share the folder"),
        ({"seed": 3}, "seed must be left out, since an ablation trains and scores its runs itself."),
        ({"variants": {"gate": {"eval_strategy": "steps"}}}, "eval_strategy must be left out, since an ablation"),
        ({"learning_rte": 1}, "learning_rte is not a known setting"),
        ({"variants": {"gate": {"top_k": 2}}}, "top_k is not a known setting"),
        ({"variants": {"gate": {"kl_weight": -1}}}, "kl_weight must be"),
    ],
)
def test_a_wrong_file_is_one_line_and_nothing_runs(tmp_path, capfd, changes, part):
    assert main([written(tmp_path, content(tmp_path, **changes))]) == 2
    error = capfd.readouterr().err.strip()
    assert part in error and error.count("\n") == 0
    assert not list(tmp_path.glob("out/*"))


def test_a_variant_given_twice_is_one_line(tmp_path, capfd):
    path = tmp_path / "ablation.yaml"
    path.write_text("reference: gate\nvariants:\n  gate: {use_router: false}\n  gate: {kl_weight: 0.5}\n")
    assert main([str(path)]) == 2
    assert "no valid YAML (gate is given twice)" in capfd.readouterr().err


def test_every_seed_and_variant_has_settings_of_its_own():
    ablation = Ablation({"a": {"kl_weight": "1"}, "b": {"kl_weight": "0"}}, {"max_steps": "2"}, "a", [3, 5])
    found = [settings_of(ablation, name, seed) for name in "ab" for seed in ablation.seeds]
    assert [(run["kl_weight"], run["seed"]) for run in found] == [("1", "3"), ("1", "5"), ("0", "3"), ("0", "5")]
    assert len({run["output_dir"] for run in found}) == 4 and {run["max_steps"] for run in found} == {"2"}


def heed_interrupts():
    """A shell that starts a command in the background has it ignore interrupts, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_an_interrupt_is_one_line_and_keeps_what_is_done(tmp_path):
    path = written(tmp_path, content(tmp_path, seeds=list(range(8))))
    command = [sys.executable, str(ROOT / "run_distillation.py"), path]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen(command, **pipes, start_new_session=True, preexec_fn=heed_interrupts)
    try:
        first = run.stdout.readline()
        time.sleep(1)  # a signal in the instant in which Python begins to wait is heard only when the wait ends
        run.send_signal(signal.SIGINT)
        _, error = run.communicate(timeout=120)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert "bits per byte" in first and run.returncode == 130
    assert "Traceback" not in error and error.splitlines()[-1].startswith("error: interrupted. An ablation goes on")
    done = list((tmp_path / "out").glob(f"*/{RESULT}"))
    assert 1 <= len(done) < 24 and all(read_result(result)["bits_per_byte"] > 0 for result in done)


def test_other_files_are_no_ablation(tmp_path):
    plain = tmp_path / "plain.yaml"
    plain.write_text("max_steps: 3\n")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    for argv in ([], ["--seed", "1"], [str(plain)], [str(broken)], [str(tmp_path / "missing.yaml")]):
        assert read_ablation(argv) is None


@pytest.mark.parametrize("flag", [["--output_dir", "{}"], ["--output-dir", "{}"], ["--output_dir={}"]])
@pytest.mark.parametrize("named", [[], ["--config"]])
def test_the_output_folder_can_be_given_by_a_flag(tmp_path, flag, named):
    path = written(tmp_path, content(tmp_path))
    given = [part.format(tmp_path / "other") for part in flag]
    ablation = read_ablation([*named, path, *given, "--learning_rate", "1"])
    assert ablation.folder == tmp_path / "other" and ablation.flags == ["--learning_rate", "1"]


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--output_dir"], "--output_dir must name a folder"),
        (["--seed", "1"], "seed must be left out, since an ablation"),
        (["--eval-strategy=steps"], "eval_strategy must be left out, since an ablation"),
        (["--resume", "somewhere"], "resume_from_checkpoint must be left out, since an ablation"),
        (["--alpha-kd", "1"], "--kl_weight must be left out, since the variant"),
    ],
)
def test_a_wrong_flag_is_one_line_and_nothing_runs(tmp_path, capfd, flags, part):
    assert main([written(tmp_path, content(tmp_path)), *flags]) == 2
    error = capfd.readouterr().err.strip()
    assert part in error and error.count("\n") == 0
    assert not list(tmp_path.glob("out/*"))


def test_a_run_that_fails_and_a_damaged_result_are_named(tmp_path, capfd):
    settings = content(tmp_path, variants={"gate": {}, "no text": {"datasets": [str(tmp_path / "nowhere")]}})
    path = written(tmp_path, settings)
    assert main([path]) == 2
    assert "error: variant no text, seed 0: " in capfd.readouterr().err
    (tmp_path / "out" / "gate-0").mkdir(exist_ok=True)
    (tmp_path / "out" / "gate-0" / RESULT).write_text('{"bits_per_byte": ')
    assert main([path]) == 2
    assert f"{tmp_path / 'out' / 'gate-0' / RESULT} is damaged. Delete it" in capfd.readouterr().err


def test_the_time_of_a_step_is_without_the_start():
    clock = StepClock()
    assert clock.mean() is None
    clock.ends = [100.0, 101.0, 103.0, 103.5]
    assert clock.mean() == pytest.approx(3.5 / 3)


def test_differences_are_paired_by_seed(tmp_path):
    ablation = Ablation({"a": {}, "b": {}}, {}, "a", [0, 1, 2], folder=tmp_path)
    figures = {"a": (2.0, 3.0, 4.0), "b": (1.9, 2.8, 3.7)}
    for name, values in figures.items():
        for seed, value in enumerate(values):
            (tmp_path / f"{name}-{seed}").mkdir()
            result = {"bits_per_byte": value, "teacher": 1.0, "aware": None, "seconds_per_step": 0.5, "made_with": {}}
            (tmp_path / f"{name}-{seed}" / RESULT).write_text(json.dumps(result))
    rows = table(ablation).splitlines()
    # Differences -0.1, -0.2, -0.3: mean -0.2, standard deviation 0.1, error 0.1 / sqrt(3).
    assert rows[-1] == "| b | 3 | 2.8000 | 0.9000 | -0.2000 | 0.0577 | 1.0000 | 0.500 |"
    (tmp_path / "b-2" / RESULT).unlink()
    assert table(ablation).splitlines()[-1].startswith("| b | 2 | 2.3500 |")
