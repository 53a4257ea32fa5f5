import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, close_session
from loopback_hub import READ_TOKEN, WRITE_TOKEN, LoopbackHub
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distill_trainer import hub as hub_module
from distill_trainer.errors import ConfigurationError, DistillationError
from distill_trainer.hub import main, push_student, write_model_card

ROOT = Path(__file__).parents[1]
REPORT = {
    "schema": 1,
    "teacher": {"name": "org/teacher", "parameters": 9000, "bits_per_byte": 1.9, "word_perplexity": 40.0},
    "student_before": {"parameters": 1234, "bits_per_byte": 3.0, "word_perplexity": 1500.0},
    "student": {"parameters": 1234, "bits_per_byte": 2.25, "word_perplexity": 60.5, "token_perplexity": 31.0},
    "baseline": {"parameters": 1234, "bits_per_byte": 2.4, "word_perplexity": None},
    "environment": {"command": "run_distillation.py demo.yaml --hub_token hf_secret --seed 1"},
}
UNPUBLISHED = (
    "distillation_modules.safetensors",
    "training_args.bin",
    "trainer_state.json",
    "optimizer.pt",
    "export.json",
    "notes.txt",
    "baseline/config.json",
    "baseline/model.safetensors",
    "checkpoint-2/config.json",
    "checkpoint-2/model.safetensors",
    "checkpoint-2/report/report.json",
    "runs/events.out",
)


def write(path: Path, text: str = "{}") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """Output folder of a run, with everything in it that a run leaves behind."""
    folder = tmp_path_factory.mktemp("runs") / "tiny-student"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    for name in (*UNPUBLISHED, "report/report.json", "report/plots/loss.png"):
        write(folder / name)
    names = {"student_name": "org/base", "teacher_name": "org/teacher", "datasets": ["Salesforce/wikitext"]}
    write_model_card(folder, REPORT, **names, repo_id="tester/tiny-student")
    return folder


@pytest.fixture
def run_folder(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "tiny-student")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A loopback Hub to which this process's `huggingface_hub` is pointed, with a write token in HF_TOKEN."""
    constants = importlib.import_module("huggingface_hub.constants")
    with LoopbackHub() as server:
        for name, value in server.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(hub_module, "RETRY_WAITS", (0, 0))
        close_session()
        yield server
        close_session()


def published(hub, repo_id="tester/tiny-student", branch="main"):
    return hub.repositories[repo_id].branches[branch]


LOAD = """
import json, re, sys
from huggingface_hub import hf_hub_download
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

card = open(hf_hub_download("tester/tiny-student", "README.md")).read()
exec(re.search("```python\\n(.*?)```", card, re.DOTALL).group(1))
model, info = AutoModelForCausalLM.from_pretrained("tester/tiny-student", output_loading_info=True)
save_file(model.state_dict(), sys.argv[1])
print(json.dumps({key: sorted(value) for key, value in info.items() if value}))
"""


def test_a_student_pushed_by_the_command_loads_from_the_hub_with_the_same_weights(finished_run, tmp_path):
    with LoopbackHub() as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "pusher"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "distill_trainer.hub", "push", str(finished_run), "tiny-student", "--private"]
        pushed = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert (pushed.returncode, pushed.stdout) == (0, f"{hub.url}/tester/tiny-student\n"), pushed.stderr
        assert hub.repositories["tester/tiny-student"].private

        environment |= hub.environment(tmp_path / "user", READ_TOKEN)
        loading = [sys.executable, "-c", LOAD, str(tmp_path / "loaded.safetensors")]
        loaded = subprocess.run(loading, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.splitlines()[-1] == "{}"
    here, there = load_file(finished_run / "model.safetensors"), load_file(tmp_path / "loaded.safetensors")
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_only_the_bare_student_its_card_and_its_report_are_published(hub, run_folder):
    assert push_student(run_folder) == f"{hub.url}/tester/tiny-student"
    everything = {path.relative_to(run_folder).as_posix() for path in run_folder.rglob("*") if path.is_file()}
    assert set(published(hub)) == everything - set(UNPUBLISHED)
    assert {"model.safetensors", "README.md", "report/plots/loss.png"} <= set(published(hub))
    assert not hub.repositories["tester/tiny-student"].private
    assert len(hub.repositories["tester/tiny-student"].messages) == 1


def test_a_second_push_updates_the_repository_and_removes_weights_that_are_gone(hub, run_folder):
    push_student(run_folder)
    (run_folder / "model.safetensors").rename(run_folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    write(run_folder / "model.safetensors.index.json", json.dumps(index))
    push_student(run_folder, "tester/tiny-student", commit_message="Shards")
    assert "model.safetensors" not in published(hub)
    assert {"model-00001-of-00001.safetensors", "model.safetensors.index.json"} <= set(published(hub))
    assert hub.repositories["tester/tiny-student"].messages[-1] == "Shards"


def test_a_revision_is_created_and_leaves_main_alone(hub, run_folder):
    assert push_student(run_folder, revision="v2") == f"{hub.url}/tester/tiny-student/tree/v2"
    assert "model.safetensors" in published(hub, branch="v2")
    assert published(hub) == {}


@pytest.mark.parametrize("path", ["/api/repos/create", "/preupload/", "/lfs/upload/", "/commit/"])
def test_one_server_error_is_survived(hub, run_folder, path):
    hub.fail(path, 500, times=1)
    push_student(run_folder)
    assert "model.safetensors" in published(hub)


def test_a_server_that_keeps_failing_is_reported_in_one_line(hub, run_folder):
    hub.fail("/api/repos/create", 503, times=100)
    with pytest.raises(DistillationError, match=r"^The Hub must accept .* got HTTP 503 \(.*503\)") as error:
        push_student(run_folder, "tester/name")
    assert "\n" not in str(error.value) and not isinstance(error.value, ConfigurationError)
    assert sum("create" in request for request in hub.requests) == 3


def test_a_hub_that_cannot_be_reached_is_reported_in_one_line(hub, run_folder):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(DistillationError, match="^The Hub must accept the upload to tester/name, got .*refused"):
        push_student(run_folder, "tester/name")


@pytest.mark.parametrize(
    "token, repo_id, message",
    [
        ("", "tester/name", "token must be set to push, got none"),
        (
            READ_TOKEN,
            "tester/name",
            r"token must have write access to tester/name, got HTTP 403 \(you must use a write",
        ),
        (READ_TOKEN, "name", "token must have write access to name, got HTTP 403"),
        (WRITE_TOKEN, "stranger/name", "token must have write access to stranger/name, got HTTP 403"),
        ("hf_unknown", "tester/name", "token must have write access to tester/name, got HTTP 401"),
        (WRITE_TOKEN, "a/b/c", "repo_id must be a valid name, got 'a/b/c'"),
        (WRITE_TOKEN, "tester/my student", "repo_id must be a valid name, got 'tester/my student'"),
    ],
)
def test_what_the_user_can_mend_ends_in_one_line_and_exit_code_2(
    hub, run_folder, monkeypatch, capsys, token, repo_id, message
):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigurationError, match=message):
        push_student(run_folder, repo_id)
    with pytest.raises(SystemExit) as ended:
        main(["push", str(run_folder), repo_id])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert hub.repositories == {}


def test_a_read_token_cannot_write_to_a_repository_that_exists(hub, run_folder):
    push_student(run_folder)
    with pytest.raises(ConfigurationError, match="token must have write access to tester/tiny-student, got HTTP 403"):
        push_student(run_folder, "tester/tiny-student", token=READ_TOKEN)


@pytest.mark.parametrize(
    "removed, added, message",
    [
        ("config.json", None, "without config.json. Give the output folder of a run"),
        ("model.safetensors", None, "without model.safetensors. Give"),
        ("model.safetensors", "adapter_config.json", "Merge its LoRA adapter with export_student first"),
    ],
)
def test_a_folder_without_a_student_is_refused_before_the_hub_is_asked(hub, run_folder, removed, added, message):
    (run_folder / removed).unlink()
    if added:
        write(run_folder / added)
    with pytest.raises(ConfigurationError, match=message):
        push_student(run_folder)
    assert hub.requests == []


def test_a_missing_shard_is_named(hub, run_folder):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    write(run_folder / "model.safetensors.index.json", json.dumps(index))
    write(run_folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ConfigurationError, match="without model-00002-of-00002.safetensors"):
        push_student(run_folder)


def test_a_report_that_holds_the_token_is_not_published(hub, run_folder):
    write(run_folder / "report" / "report.json", json.dumps({"command": f"--hub_token {WRITE_TOKEN}"}))
    with pytest.raises(ConfigurationError, match="report.json must not hold the token"):
        push_student(run_folder)
    assert hub.requests == []


def test_the_card_holds_the_metadata_and_the_figures(finished_run):
    card = ModelCard.load(finished_run / "README.md")
    metadata = card.data.to_dict()
    assert metadata["library_name"] == "transformers"
    assert metadata["base_model"] == "org/base"
    assert metadata["datasets"] == ["Salesforce/wikitext"]
    assert {"distillation", "mixture-of-experts"} <= set(metadata["tags"])
    (index,) = metadata["model-index"]
    assert index["name"] == "tiny-student"
    metrics = {metric["type"]: metric for metric in index["results"][0]["metrics"]}
    assert {name: metric["value"] for name, metric in metrics.items()} == {"bits_per_byte": 2.25, "perplexity": 60.5}
    assert all(metric["verified"] is False for metric in metrics.values())
    assert [line for line in card.text.splitlines() if line.startswith("| ")] == [
        "| | bits per byte | word perplexity | parameters |",
        "| Before training | 3.0000 | 1,500.00 | 1,234 |",
        "| Fine-tuned on the same text without a teacher | 2.4000 | - | 1,234 |",
        "| **This model** | 2.2500 | 60.50 | 1,234 |",
        "| Teacher | 1.9000 | 40.00 | 9,000 |",
    ]
    assert "[org/teacher](https://huggingface.co/org/teacher)" in card.text
    assert "run_distillation.py demo.yaml --hub_token <hidden> --seed 1" in card.text


def test_a_card_needs_no_figures_and_keeps_local_paths_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = {"student": {"bits_per_byte": None, "word_perplexity": float("inf")}, "baseline": None}
    write(tmp_path / "private" / "base" / "config.json")
    local = {"student_name": "private/base", "teacher_name": "~/private/teacher"}
    path = write_model_card(tmp_path, report, **local, datasets=["sotu", "./private/a.jsonl"], license="mit")
    card = ModelCard.load(path)
    metadata = card.data.to_dict()
    assert metadata["license"] == "mit"
    assert not {"base_model", "datasets", "model-index", "model_name"} & metadata.keys()
    assert "private" not in path.read_text()
    assert "The student `base`, trained on `sotu`, `a.jsonl` and distilled" in card.text
    assert "## Training" not in card.text and "Fine-tuned" not in card.text
