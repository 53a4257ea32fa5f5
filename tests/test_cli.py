import errno
import html
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from builders import ASSETS, tiny_llama
from datasets import Dataset
from huggingface_hub import constants
from loopback_hub import READ_TOKEN, WRITE_TOKEN, LoopbackHub, Repository
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    JetMoeConfig,
    JetMoeForCausalLM,
    PreTrainedTokenizerFast,
)

import run_distillation
from distill_trainer.documents import load_sotu
from distill_trainer.evaluation import benchmarks
from distill_trainer.hub import main

ROOT = Path(__file__).parents[1]
NUM_DOCUMENTS = 8
REPORT_KEYS = {
    *("schema", "teacher", "student_before", "student", "student_aware_teacher", "baseline", "compression"),
    *("retention", "attention", "router", "gap", "benchmarks", "passages", "samples", "data", "environment"),
}
TINY_RUN = {
    "teacher_model_name_or_path": ASSETS / "teacher",
    "student_model_name_or_path": ASSETS / "student",
    "teacher_dtype": "float32",
    "validation_fraction": 0.25,
    "max_length": 32,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "router_learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": "true",
    "output_dir": "out",
}


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return [text[:500] for text in load_sotu("unseen")[:NUM_DOCUMENTS]]


@pytest.fixture(scope="session")
def texts(documents, tmp_path_factory) -> Path:
    """A folder of short text files."""
    folder = tmp_path_factory.mktemp("texts")
    for index, text in enumerate(documents):
        (folder / f"{index}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def offline_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def flags(texts: Path, **changes) -> list[str]:
    """The command line of a run of two steps; a list gives several values."""
    words = []
    for name, value in (TINY_RUN | {"datasets": texts} | changes).items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def refused(capfd, arguments: list[str], *, silent: bool = False) -> str:
    """The message of a run that cannot be, after a check that it is one line and that no file was written.

    `silent`: nothing else stands on standard error, no progress bar either.
    """
    before = files_below(Path.cwd())
    assert run_distillation.main(arguments) == 2
    output = capfd.readouterr()
    lines = output.err.splitlines()
    messages = [line for line in lines if "error: " in line]
    assert len(messages) == 1 and messages == lines[-1:] and messages[0].startswith("error: ")
    assert "Traceback" not in output.err and output.out == ""
    assert not silent or len(lines) == 1
    assert files_below(Path.cwd()) == before
    return messages[0]


CONFIG_FILES = {
    "missing": ("nowhere.yaml", None, "nowhere.yaml: the config file cannot be read"),
    "malformed YAML": ("run.yaml", "datasets: [a, b", "run.yaml: the config file is no valid YAML"),
    "a name twice in YAML": ("run.yaml", "seed: 1\nseed: 2", "no valid YAML (seed is given twice)"),
    "a name twice in JSON": ("run.json", '{"seed": 1, "seed": 2}', "no valid JSON (seed is given twice)"),
    "malformed JSON": ("run.json", '{"seed": 1', "run.json: the config file is no valid JSON"),
    "empty": ("run.yaml", "", "run.yaml: the config file must hold"),
    "unknown key": ("run.yaml", "temperatur: 2.0", "temperatur is not a known setting. The nearest is temperature."),
    "wrong type": ("run.json", '{"max_length": "long"}', "max_length must be of type int, got long"),
    "no top-k": ("run.json", '{"initial_top_k": 0}', "initial_top_k must be 1 or above, got 0"),
}


@pytest.mark.parametrize(("name", "content", "message"), CONFIG_FILES.values(), ids=CONFIG_FILES)
def test_a_config_file_that_cannot_be_used_is_refused(capfd, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    assert message in refused(capfd, [name], silent=True)


SETTINGS = {
    "unknown flag": ({"alpha_kdd": 0.5}, "alpha_kdd is not a known setting. The nearest is alpha_kd."),
    "no initial top-k": ({"initial_top_k": 0}, "initial_top_k must be 1 or above, got 0."),
    "negative final top-k": ({"final_top_k": -2}, "final_top_k must be 1 or above, got -2."),
    "negative temperature": ({"temperature": -1}, "temperature must be above 0, got -1.0."),
    "zero final temperature": ({"final_temperature": 0}, "final_temperature must be above 0, got 0.0."),
    "all weights 0": (
        {f"{name}_weight": 0 for name in ("kl", "feature", "attention", "layerwise", "contrastive", "lm")},
        "must not all be 0",
    ),
    "unknown way to compare": (
        {"kl_method": "sorted"},
        "kl_method must be one of projected, topk, uld, hybrid, alm, got sorted.",
    ),
    "unknown direction": ({"kl_direction": "back"}, "kl_direction must be one of forward, reverse, js, got back."),
    "a direction of what has none": (
        {"kl_method": "uld", "kl_direction": "js"},
        "kl_direction must be forward with kl_method uld, got js: it has no direction.",
    ),
    "no token apart": ({"kl_top_k": 0}, "kl_top_k must be 1 or above, got 0."),
    "no memory": ({"logit_chunk_mb": 0}, "logit_chunk_mb must be above 0, got 0.0."),
    "fp16 without a GPU": ({"fp16": "true"}, "fp16 must be false without a GPU, got true."),
    "a stride that leaves text out": (
        {"eval_stride": 33},
        "eval_stride must be at most max_length, which is 32, got 33.",
    ),
    "no stride": ({"eval_stride": 0}, "eval_stride must be 1 or above, got 0."),
    "no examples": ({"lm_eval_tasks": "arc", "lm_eval_limit": 0}, "lm_eval_limit must be 1 or above, got 0."),
    "benchmarks without a report": (
        {"lm_eval_tasks": ["arc", "boolq"], "skip_eval": "true"},
        "lm_eval_tasks must be left out with skip_eval, got arc boolq.",
    ),
    "a folder for no tasks": (
        {"lm_eval_include_path": "tasks"},
        "lm_eval_include_path must be left out without lm_eval_tasks, got tasks.",
    ),
    "a file as the output folder": ({"output_dir": "file/out"}, "output_dir must be a folder that can be written"),
}


@pytest.mark.parametrize(("changes", "message"), SETTINGS.values(), ids=SETTINGS)
def test_a_setting_that_cannot_work_is_refused(capfd, tmp_path, texts, changes, message):
    (tmp_path / "file").write_text("")
    assert message in refused(capfd, flags(texts, **changes), silent=True)


def test_benchmarks_without_the_harness_are_refused_before_anything_is_loaded(capfd, monkeypatch, texts):
    monkeypatch.setattr(benchmarks, "MINIMUM_VERSION", "1000.0")
    message = refused(capfd, flags(texts, lm_eval_tasks="arc_easy"), silent=True)
    assert message.startswith("error: lm_eval_tasks needs lm_eval 1000.0 or newer, got ")


MODELS = {
    "a missing folder": ("./nowhere", "from ./nowhere: there is no such folder"),
    "an unknown name": ("nobody/nothing", "from nobody/nothing, neither as a folder nor from the Hub"),
    "an empty folder": ("empty", "from the folder empty"),
}


@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize(("model", "message"), MODELS.values(), ids=MODELS)
def test_a_model_that_does_not_exist_is_refused(capfd, tmp_path, texts, side, model, message):
    (tmp_path / "empty").mkdir()
    assert message in refused(capfd, flags(texts, **{f"{side}_model_name_or_path": model}))


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_a_model_with_cut_weights_is_refused(capfd, tmp_path, texts, side):
    folder = shutil.copytree(ASSETS / side, tmp_path / "cut")
    os.truncate(folder / "model.safetensors", 100_000)
    message = refused(capfd, flags(texts, **{f"{side}_model_name_or_path": folder}))
    assert f"No model could be loaded from the folder {folder}" in message


DATASETS = {
    "a missing file": ("nowhere.txt", "nowhere.txt does not exist"),
    "a missing folder": ("./nowhere", "./nowhere cannot be loaded"),
    "an unknown name": ("nobody/nothing", "nobody/nothing cannot be loaded"),
    "an empty file": ("empty.txt", "empty.txt is empty"),
    "a file without rows": ("blank.jsonl", "blank.jsonl cannot be loaded"),
    "a folder without text": ("folder", "got no file"),
    "one document": ("one.txt", "need at least 3"),
    "another column": ("other.jsonl", "text_column must be a column of the dataset other.jsonl (title), got text."),
    "a broken file": ("broken.jsonl", "broken.jsonl cannot be loaded"),
    "documents of one token": ("letters.jsonl", "holds two anchors"),
}


@pytest.mark.parametrize(("dataset", "message"), DATASETS.values(), ids=DATASETS)
def test_a_dataset_that_cannot_be_used_is_refused(capfd, tmp_path, dataset, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n")
    (tmp_path / "one.txt").write_text("The only document.")
    (tmp_path / "other.jsonl").write_text('{"title": "A"}\n' * 9)
    (tmp_path / "broken.jsonl").write_text('{"text": "A"}\n{"text"')
    (tmp_path / "letters.jsonl").write_text('{"text": "A"}\n' * 9)
    assert message in refused(capfd, flags(Path("."), datasets=dataset))


def slow_tokenizer(folder: Path) -> None:
    ByT5Tokenizer().save_pretrained(folder)


def word_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "people": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize(
    ("save_tokenizer", "message"),
    [(slow_tokenizer, "ByT5Tokenizer"), (word_tokenizer, "byte-level")],
    ids=["no offsets", "words"],
)
def test_a_tokenizer_that_cannot_be_aligned_is_refused(capfd, tmp_path, texts, side, save_tokenizer, message):
    folder = shutil.copytree(ASSETS / side, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    save_tokenizer(folder)
    assert message in refused(capfd, flags(texts, **{f"{side}_model_name_or_path": folder}))


def test_a_mixture_whose_experts_cannot_be_found_is_refused(capfd, tmp_path, texts):
    config = JetMoeConfig(
        vocab_size=4096,
        hidden_size=16,
        num_hidden_layers=1,
        num_key_value_heads=2,
        kv_channels=8,
        intermediate_size=16,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    JetMoeForCausalLM(config).save_pretrained(tmp_path / "jetmoe")
    AutoTokenizer.from_pretrained(ASSETS / "teacher").save_pretrained(tmp_path / "jetmoe")
    message = refused(capfd, flags(texts, teacher_model_name_or_path=tmp_path / "jetmoe"))
    assert "The experts of the teacher JetMoeForCausalLM cannot be found" in message


@pytest.mark.parametrize("folder", ["nowhere", str(ASSETS / "student")])
def test_resuming_from_what_is_no_checkpoint_is_refused(capfd, texts, folder):
    message = refused(capfd, flags(texts, resume=folder), silent=True)
    assert f"{folder} is no checkpoint of this trainer" in message


@pytest.mark.parametrize("file", ["distillation_modules.safetensors", "model.safetensors"])
def test_resuming_from_a_damaged_checkpoint_is_refused(capfd, tmp_path, texts, saving_run, file):
    shutil.copytree(saving_run, tmp_path / "out")
    os.truncate(tmp_path / "out/checkpoint-1" / file, 100)
    message = refused(capfd, flags(texts, resume="out/checkpoint-1"))
    assert "The checkpoint out/checkpoint-1 cannot be loaded" in message


@pytest.mark.parametrize("file", ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_damaged_state_of_the_trainer_is_refused_before_a_model_is_loaded(capfd, tmp_path, texts, saving_run, file):
    shutil.copytree(saving_run, tmp_path / "out")
    os.truncate(tmp_path / "out/checkpoint-1" / file, 100)
    message = refused(capfd, flags(texts, resume="out/checkpoint-1"), silent=True)
    assert f"The checkpoint out/checkpoint-1 is damaged: {file}." in message


def test_a_checkpoint_of_a_run_without_adapters_is_refused_with_them(capfd, tmp_path, texts, saving_run):
    shutil.copytree(saving_run, tmp_path / "out")
    message = refused(capfd, flags(texts, resume="out/checkpoint-1", use_peft="true"))
    assert "out/checkpoint-1 was written without use_peft" in message


def test_an_unknown_reporter_is_refused(capfd, texts):
    message = refused(capfd, flags(texts, report_to="nosuch"), silent=True)
    assert "report_to must name integrations that work here, got nosuch" in message


def test_wandb_without_a_login_is_refused(capfd, monkeypatch, texts):
    wandb = pytest.importorskip("wandb")

    def not_logged_in():
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "login", not_logged_in)
    message = refused(capfd, flags(texts, report_to="wandb"))
    assert "report_to must not be wandb without a login" in message


def test_a_negative_seed_is_refused(capfd, texts):
    assert "seed must be 0 or above, got -1" in refused(capfd, flags(texts, seed=-1), silent=True)


NOT_TO_PUSH = {
    "no token": ("", {}, "A token must be set to push to out, got none. Set HF_TOKEN or hub_token"),
    "a read-only token": (READ_TOKEN, {}, "The token must have write access to tester/out, got a read-only token"),
    "an unknown token": ("hf_unknown", {}, "The token must have write access to out, got HTTP 401"),
    "another's name": (WRITE_TOKEN, {"hub_model_id": "stranger/a"}, "The repository must be under tester or team"),
    "no name": (WRITE_TOKEN, {"hub_model_id": "a b"}, "repo_id must be a valid name, got 'a b'"),
    "a public repository": (
        WRITE_TOKEN,
        {"hub_model_id": "team/public", "hub_private_repo": "true"},
        "team/public must be private or new to push to it privately",
    ),
    "another model": (
        WRITE_TOKEN,
        {"hub_model_id": "team/public", "hub_revision": "taken"},
        "team/public must not hold a model that this package has not pushed, but it has config.json without",
    ),
}


@pytest.mark.parametrize(("token", "settings", "message"), NOT_TO_PUSH.values(), ids=NOT_TO_PUSH)
def test_what_could_not_be_pushed_is_refused_before_training(hub, capfd, monkeypatch, texts, token, settings, message):
    monkeypatch.setenv("HF_TOKEN", token)
    hub.repositories["team/public"] = Repository(branches={"main": {}, "taken": {"config.json": b"{}"}})
    assert message in refused(capfd, flags(texts, push_to_hub="true", **settings))
    assert hub.repositories.keys() == {"team/public"}


def test_a_hub_that_is_down_is_told_before_training(hub, capfd, texts):
    hub.fail("/api/whoami-v2", 503, times=3)
    message = refused(capfd, flags(texts, push_to_hub="true"))
    assert message.endswith("Try later, or train without push_to_hub and push the run afterwards.")


def test_a_hub_that_fails_while_training_does_not_end_it(hub, tmp_path, texts):
    hub.fail("/commit/", 503, times=3)
    saving = {"save_strategy": "steps", "save_steps": 1, "hub_strategy": "every_save", "skip_eval": "true"}
    assert run_distillation.main(flags(texts, push_to_hub="true", **saving)) == 0
    repository = hub.repositories["tester/out"]
    assert repository.messages == ["Training in progress, step 2", "Upload the distilled student"]
    assert repository.branches["main"]["model.safetensors"] == (tmp_path / "out/model.safetensors").read_bytes()


def test_a_hub_that_fails_after_training_ends_in_the_command_for_later(hub, capfd, texts):
    hub.fail("/commit/", 503, times=3)
    assert run_distillation.main(flags(texts, push_to_hub="true", hub_private_repo="true", skip_eval="true")) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: The Hub must accept the upload to tester/out, got HTTP 503")
    words = shlex.split(last.partition("Push the run again: python -m distill_trainer.hub ")[2])
    assert words == ["push", "out", "tester/out", "--private"]
    main(words)
    assert {"model.safetensors", "README.md", "training_config.yaml"} <= hub.repositories["tester/out"].branches[
        "main"
    ].keys()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "The disk is full"),
        (torch.OutOfMemoryError("CUDA out of memory."), "The GPU is out of memory. Lower per_device_train_batch_size"),
    ],
    ids=["disk", "GPU"],
)
def test_running_out_of_disk_or_memory_is_told_in_one_line(capfd, monkeypatch, texts, error, message):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(run_distillation, "run", fail)
    assert message in refused(capfd, flags(texts), silent=True)


def test_an_error_of_our_own_is_not_hidden(monkeypatch, texts):
    def fail(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(run_distillation, "run", fail)
    with pytest.raises(OSError, match="Input/output"):
        run_distillation.main(flags(texts))


def test_the_process_itself_ends_with_code_2_and_one_line():
    command = [sys.executable, str(ROOT / "run_distillation.py"), "--max_length", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: max_length must be 2 or above, got 1.\n"


@pytest.fixture(scope="module")
def reported_run(tmp_path_factory, texts):
    """Output folder, report and printed text of a run with a baseline and `configs/custom.json` under the flags."""
    output = tmp_path_factory.mktemp("reported") / "student"
    arguments = [str(ROOT / "configs/custom.json"), *flags(texts, output_dir=output, run_baseline="true")]
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *words, **options: printed.append(" ".join(map(str, words))))
        arguments += ["--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "steps", "--eval_steps", "1"]
        assert run_distillation.main(arguments) == 0
    return output, json.loads((output / "report/report.json").read_text()), "\n".join(printed)


def test_the_report_has_all_keys_and_figures_of_every_model(reported_run):
    output, report, _ = reported_run
    assert report.keys() == REPORT_KEYS and report["schema"] == 1
    for role in ("teacher", "student_before", "student", "baseline"):
        assert all(value is not None for value in report[role].values()), role
    assert report["teacher"]["parameters"] > report["student"]["parameters"] == report["baseline"]["parameters"]
    assert report["student"]["bits_per_byte"] != report["student_before"]["bits_per_byte"]
    assert report["student_aware_teacher"]["bits_per_byte"] > 0
    assert report["data"]["train_documents"] == NUM_DOCUMENTS - 2 and report["data"]["eval_documents"] == 1
    assert {"report.json", "report.md", "report.html"} <= {path.name for path in (output / "report").iterdir()}
    assert list((output / "report").glob("*.svg"))


def test_the_headline_and_the_reports_path_are_printed(reported_run):
    output, report, printed = reported_run
    for role in ("teacher", "student_before", "student", "baseline"):
        assert f"{report[role]['bits_per_byte']:.4f}" in printed
    assert printed.endswith(f"Report: {output / 'report/report.html'}")


def test_the_settings_that_a_run_wrote_train_the_same_student(reported_run):
    output, report, _ = reported_run
    config = output / "training_config.yaml"
    changes = ["--output_dir", "again", "--skip_eval", "true", "--run_baseline", "false"]
    # What an earlier run there said of its student does not stay beside this one.
    shutil.copytree(output / "report", "again/report")
    assert run_distillation.main([str(config), *changes]) == 0
    assert not Path("again/report").exists() and "bits per byte" not in Path("again/README.md").read_text()
    assert equal(weights("again"), weights(output))
    assert yaml.safe_load(config.read_text()) == report["environment"]["settings"]
    for page in ("report.html", "report.md"):
        # What the command's file held, and a flag that won over it.
        text = html.unescape((output / "report" / page).read_text())
        assert "temperature: 5.0\n" in text and "per_device_train_batch_size: 2\n" in text


def test_the_output_folder_is_a_plain_student_that_trained(reported_run, documents):
    output, report, _ = reported_run
    student = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    inputs = tokenizer(documents[0], return_tensors="pt")
    assert torch.isfinite(student(**inputs).logits).all()
    before, after, alone = (weights(folder) for folder in (ASSETS / "student", output, output / "baseline"))
    assert not equal({name: value.float() for name, value in before.items()}, after)
    assert not equal(after, alone)
    router = load_file(output / "distillation_modules.safetensors")
    assert router["routing.routers.3.query.weight"].abs().max() > 0


def test_a_config_file_and_flags_apply_together(reported_run):
    output, *_ = reported_run
    history = json.loads((output / "checkpoint-2/trainer_state.json").read_text())["log_history"]
    first = next(entry for entry in history if "distill/top_k" in entry)
    # 2 and 5.0 are the file's, the batch size is a flag's.
    assert (first["distill/top_k"], first["distill/temperature"]) == (2, 5.0)
    assert first["distill/weight_kl"] == pytest.approx(0.8)
    assert [entry["step"] for entry in history if "eval_bits_per_byte" in entry] == [1, 2]
    settings = torch.load(output / "training_args.bin", weights_only=False)
    assert (settings.learning_rate, settings.final_top_k, settings.per_device_train_batch_size) == (1e-4, 6, 2)


@pytest.fixture(scope="module")
def saving_run(tmp_path_factory, texts):
    """Output folder of a run that saved a checkpoint after each of its two steps."""
    output = tmp_path_factory.mktemp("saved") / "student"
    saving = {"save_strategy": "steps", "save_steps": 1, "skip_eval": "true"}
    assert run_distillation.main(flags(texts, output_dir=output, **saving)) == 0
    return output


def test_a_run_without_evaluation_writes_a_student_and_no_report(saving_run):
    assert (saving_run / "model.safetensors").exists() and not (saving_run / "report").exists()
    assert "## Results" not in (saving_run / "README.md").read_text()
    assert "max_steps: 2\n" in (saving_run / "training_config.yaml").read_text()


def test_a_resumed_command_ends_where_the_uninterrupted_one_ended(tmp_path, texts, saving_run):
    shutil.copytree(saving_run / "checkpoint-1", tmp_path / "out/checkpoint-1")
    # The weights it would start with are others, so only the checkpoint can lead to the same end.
    other_start = {"student_init": "random", "skip_eval": "true"}
    assert run_distillation.main(flags(texts, resume="out/checkpoint-1", **other_start)) == 0
    assert equal(weights("out"), weights(saving_run))
    modules = "distillation_modules.safetensors"
    assert equal(load_file(f"out/{modules}"), load_file(saving_run / modules))
    assert not equal(weights("out"), weights("out/checkpoint-1"))


def test_adapters_train_are_saved_and_resumed(tmp_path, texts):
    # A rate at which even the adapters' second matrix, zero at first, moves in float32.
    settings = {"use_peft": "true", "learning_rate": 1e-2, "skip_eval": "true"}
    saving = {"save_strategy": "steps", "save_steps": 1}
    assert run_distillation.main(flags(texts, output_dir="whole", **settings, **saving)) == 0
    assert (tmp_path / "whole/checkpoint-1/adapter_model.safetensors").exists()
    shutil.copytree("whole/checkpoint-1", "out/checkpoint-1")
    saved_at = (tmp_path / "out/checkpoint-1/trainer_state.json").stat().st_mtime_ns
    assert run_distillation.main(flags(texts, resume="out/checkpoint-1", **settings, **saving)) == 0
    # A run from the start would have saved its first step again.
    assert (tmp_path / "out/checkpoint-1/trainer_state.json").stat().st_mtime_ns == saved_at
    assert equal(weights("out"), weights("whole"))
    # A plain model: the adapters are merged.
    before = {name: value.float() for name, value in weights(ASSETS / "student").items()}
    assert weights("whole").keys() == before.keys() and not equal(weights("whole"), before)


ALONE = {f"{name}_weight": 0 for name in ("kl", "feature", "attention", "layerwise", "contrastive")}
OTHER_RUNS = {
    "a dense teacher": {"teacher_model_name_or_path": ASSETS / "student"},
    "no router, JSONL": {"use_router": "false", "datasets": "rows.jsonl", "text_column": "body"},
    "no teacher, Parquet": ALONE | {"lm_weight": 1, "datasets": "rows.parquet", "text_column": "body"},
    "streamed text": {"streaming": "true", "validation_fraction": 0.002},
    "windows by length": {"use_dynamic_batching": "true"},
    "likelihoods of spans": {"kl_method": "alm", "logit_chunk_mb": 0.5},
    "an adapter of the head": {"use_peft": "true", "lora_target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.parametrize(("kind", "changes"), OTHER_RUNS.items(), ids=OTHER_RUNS)
def test_every_kind_of_run_ends_with_its_report(tmp_path, documents, texts, kind, changes):
    rows = Dataset.from_dict({"number": list(range(NUM_DOCUMENTS)), "body": documents})
    rows.to_json(tmp_path / "rows.jsonl")
    rows.to_parquet(tmp_path / "rows.parquet")
    assert run_distillation.main(flags(texts, **changes)) == 0
    report = json.loads((tmp_path / "out/report/report.json").read_text())
    routed = kind not in ("a dense teacher", "no router, JSONL", "no teacher, Parquet")
    assert (report["student_aware_teacher"]["bits_per_byte"] is not None) == routed
    assert {value is not None for value in report["router"].values()} == {routed}
    # Nobody counts a stream before it is read.
    count = None if kind == "streamed text" else NUM_DOCUMENTS - 2
    assert (report["data"]["train_documents"], report["data"]["eval_documents"]) == (count, 1)
    assert count is None or report["data"]["train_bytes"] >= 500 * count
    assert report["student"]["bits_per_byte"] != report["student_before"]["bits_per_byte"]


def test_a_student_may_start_from_random_weights(tmp_path, texts):
    tiny_llama().save_pretrained(tmp_path / "student")
    AutoTokenizer.from_pretrained(ASSETS / "student").save_pretrained(tmp_path / "student")
    own = flags(texts, student_model_name_or_path="student", student_init="random", learning_rate=0, skip_eval="true")
    assert run_distillation.main(own) == 0
    assert not equal(weights("out"), weights("student"))


def test_the_process_itself_trains_reports_and_publishes_the_bare_student(tmp_path, texts):
    with LoopbackHub() as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "home")}
        command = [sys.executable, str(ROOT / "run_distillation.py"), *flags(texts, push_to_hub="true")]
        command += ["--hub_model_id", "tester/tiny", "--max_steps", "1", "--disable_tqdm", "true"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "Report: out/report/report.html" in done.stdout
        assert done.stdout.endswith(f"Pushed to {hub.url}/tester/tiny\n")
        published = hub.repositories["tester/tiny"].branches["main"]
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "README.md", "report/report.html"}
    wanted |= {"generation_config.json", "tokenizer_config.json", "report/report.json", "training_config.yaml"}
    assert wanted <= published.keys()
    assert not {name for name in published if "distillation_modules" in name or "training_args" in name}
    assert b'from_pretrained("tester/tiny")' in published["README.md"]
    assert published["model.safetensors"] == (tmp_path / "out/model.safetensors").read_bytes()
