import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loopback_hub import LIMITED_TOKEN, READ_TOKEN, WRITE_TOKEN, LoopbackHub, Repository
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distill_trainer.card import write_model_card
from distill_trainer.errors import ConfigurationError, DistillationError
from distill_trainer.hub import check_access, main, push_student
from distill_trainer.parsing import parse_arguments

ROOT = Path(__file__).parents[1]
REPORT = {"student": {"bits_per_byte": 2.25, "word_perplexity": 60.5}}
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


def write_base(folder: Path) -> str:
    write(folder / "README.md", "---\nlicense: mit\n---\n")
    return str(folder)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """Output folder of a run, with everything in it that a run leaves behind."""
    folder = tmp_path_factory.mktemp("runs") / "tiny-student"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    student = LlamaForCausalLM(config)
    student.generation_config.update(do_sample=True, top_k=7)
    student.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    for name in (*UNPUBLISHED, "report/report.json", "report/report.html", "report/bits_per_byte.svg"):
        write(folder / name)
    write(folder / "training_config.yaml", "max_steps: 2")
    sources = {role: write_base(folder.parent / role) for role in ("student_name", "teacher_name")}
    write_model_card(folder, REPORT, **sources, datasets=["Salesforce/wikitext"])
    return folder


@pytest.fixture
def run_folder(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "tiny-student")


def published(hub, repo_id="tester/tiny-student", branch="main"):
    return hub.repositories[repo_id].branches[branch]


LOAD = """
import json, re, sys
from huggingface_hub import hf_hub_download
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GenerationConfig

card = open(hf_hub_download("tester/tiny-student", "README.md")).read()
exec(re.search("```python\\n(.*?)```", card, re.DOTALL).group(1))
model, info = AutoModelForCausalLM.from_pretrained("tester/tiny-student", output_loading_info=True)
save_file(model.state_dict(), sys.argv[1])
assert GenerationConfig.from_pretrained("tester/tiny-student").top_k == 7
print(json.dumps({key: sorted(value) for key, value in info.items() if value}))
"""


def test_a_student_pushed_by_the_command_loads_from_the_hub_with_the_same_weights(finished_run, tmp_path):
    with LoopbackHub() as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "pusher")}
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
    files = published(hub)
    assert all(files[name] == (run_folder / name).read_bytes() for name in files if name != "README.md")
    wanted = {"generation_config.json", "tokenizer.json", "training_config.yaml", "README.md"}
    assert wanted | {"report/report.html", "report/report.json", "report/bits_per_byte.svg"} <= files.keys()
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


def test_the_pushed_card_names_the_repository_and_the_folders_own_stays(hub, run_folder):
    card = (run_folder / "README.md").read_text()
    assert card.count("tiny-student") == 4
    for repo_id in ("other-name", "team/third"):
        push_student(run_folder, repo_id)
        full = repo_id if "/" in repo_id else f"tester/{repo_id}"
        pushed = published(hub, full)["README.md"].decode()
        assert pushed.count(f'from_pretrained("{full}")') == 2 and "tiny-student" not in pushed
        assert f"\n# {full.split('/')[1]}\n" in pushed and f"- name: {full.split('/')[1]}\n" in pushed
    assert (run_folder / "README.md").read_text() == card


def test_a_folder_without_card_report_and_settings_is_pushed_all_the_same(hub, run_folder, tmp_path):
    for name in ("README.md", "training_config.yaml"):
        (run_folder / name).unlink()
    shutil.rmtree(run_folder / "report")
    push_student(run_folder)
    assert {"model.safetensors", "tokenizer.json"} <= published(hub).keys()
    # In place of the settings stands what the next push knows the repository by; it is no config file.
    assert published(hub)["training_config.yaml"].startswith(b"# distill_trainer pushed this student without")
    (tmp_path / "no.yaml").write_bytes(published(hub)["training_config.yaml"])
    with pytest.raises(ConfigurationError, match="must hold `field: value` pairs"):
        parse_arguments([str(tmp_path / "no.yaml")])
    write(run_folder / "training_config.yaml", "max_steps: 2")
    push_student(run_folder)
    assert published(hub)["training_config.yaml"] == b"max_steps: 2"


@pytest.mark.parametrize("path", ["/api/whoami-v2", "/api/repos/create", "/preupload/", "/lfs/upload/", "/commit/"])
def test_one_server_error_is_survived(hub, run_folder, path):
    hub.fail(path, 500, times=1)
    push_student(run_folder)
    assert "model.safetensors" in published(hub)


@pytest.mark.parametrize("status", [408, 429])
def test_a_server_that_asks_to_come_again_is_asked_again(hub, run_folder, status):
    hub.fail("/api/repos/create", status, times=2)
    push_student(run_folder)
    assert "model.safetensors" in published(hub) and sum("create" in request for request in hub.requests) == 3


def test_a_server_that_keeps_failing_is_reported_in_one_line_with_the_command_for_later(hub, run_folder):
    hub.fail("/api/repos/create", 503, times=100)
    with pytest.raises(DistillationError, match=r"^The Hub must accept .* got HTTP 503 \(.*503\)") as error:
        push_student(run_folder, "tester/name", private=True, revision="v2")
    command = f"python -m distill_trainer.hub push {run_folder} tester/name --private --revision v2"
    assert str(error.value).endswith(f"). Push the run again: {command}")
    assert "\n" not in str(error.value) and not isinstance(error.value, ConfigurationError)
    assert sum("create" in request for request in hub.requests) == 3
    hub.failures.clear()
    main(command.split()[3:])
    assert hub.repositories["tester/name"].private and "model.safetensors" in published(hub, "tester/name", "v2")
    assert published(hub, "tester/name") == {}


def test_a_hub_that_cannot_be_reached_is_reported_in_one_line(hub, run_folder):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(DistillationError, match="^The Hub must accept the upload to tester/name, got .*refused"):
        push_student(run_folder, "tester/name")


@pytest.mark.parametrize("path", ["/lfs/upload/", "/commit/"])
def test_a_push_that_is_killed_leaves_the_repository_as_it_was_and_the_next_one_fills_it(hub, run_folder, path):
    push_student(run_folder)
    before = dict(published(hub))
    weights = load_file(run_folder / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, run_folder / "model.safetensors", {"format": "pt"})
    write(run_folder / "config.json", (run_folder / "config.json").read_text() + "\n")
    arrived = hub.hold(path)
    command = [sys.executable, "-m", "distill_trainer.hub", "push", str(run_folder), "tiny-student"]
    # `hub` has pointed the environment at itself.
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        assert arrived.wait(100)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert published(hub) == before
    hub.holds.clear()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (again.returncode, again.stdout) == (0, f"{hub.url}/tester/tiny-student\n"), again.stderr
    assert published(hub).keys() == before.keys()
    for name in ("model.safetensors", "config.json"):
        assert published(hub)[name] == (run_folder / name).read_bytes() != before[name]


@pytest.mark.parametrize(
    "token, repo_id, message",
    [
        ("", "tester/name", "A token must be set to push to tester/name, got none. Set HF_TOKEN"),
        (
            READ_TOKEN,
            "name",
            "The token must have write access to tester/name, got a read-only token of tester. Set HF_TOKEN .* to one",
        ),
        (
            LIMITED_TOKEN,
            "name",
            r"The token must have write access to tester/name, got HTTP 403 \(you must use a write",
        ),
        ("hf_unknown", "tester/name", "The token must have write access to tester/name, got HTTP 401"),
        (
            WRITE_TOKEN,
            "stranger/name",
            "The repository must be under tester or team, where the token may write, got stranger/name. Give another",
        ),
        (WRITE_TOKEN, "library/name", "The repository must be under tester or team, where .* got library/name"),
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
    printed = capsys.readouterr()
    assert printed.out == "" and re.fullmatch(f"error: .*{message}.*\n", printed.err)
    assert hub.repositories == {}
    if token != LIMITED_TOKEN:  # whose rights show at the first write only
        with pytest.raises(ConfigurationError, match=message):
            check_access(repo_id)


@pytest.mark.parametrize("owner", ["tester", "stranger"])
def test_a_repository_that_exists_and_may_not_be_written_to_is_left_alone(hub, run_folder, owner):
    hub.repositories[f"{owner}/taken"] = taken = Repository()
    taken.branches["main"]["config.json"] = b"another model"
    token, words = {
        "tester": (READ_TOKEN, "The token must have write access to tester/taken"),
        "stranger": (WRITE_TOKEN, "The repository must be under tester or team"),
    }[owner]
    with pytest.raises(ConfigurationError, match=words):
        push_student(run_folder, f"{owner}/taken", token=token)
    assert taken.branches == {"main": {"config.json": b"another model"}}


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_a_repository_that_holds_another_model_is_refused_and_left_alone(hub, run_folder, name):
    files = {name: b"another model", "model.safetensors": b"x", "README.md": b"mine", "notes.txt": b"y"}
    hub.repositories["tester/taken"] = taken = Repository(branches={"main": dict(files)})
    message = (
        "tester/taken must not hold a model that this package has not pushed, but it has "
        f"{name} without training_config.yaml. Choose another name, or delete it there."
    )
    for refuse in (check_access, lambda repo_id: push_student(run_folder, repo_id)):
        with pytest.raises(ConfigurationError) as error:
            refuse("taken")
        assert str(error.value) == message
    assert taken.branches == {"main": files} and taken.messages == []
    # A branch of its own takes nothing away from the other model, also if its first upload fails.
    hub.fail("/commit/", 503, times=1)
    assert check_access("taken", revision="distilled") == "tester/taken"
    push_student(run_folder, "taken", revision="distilled")
    assert published(hub, "tester/taken") == files
    assert published(hub, "tester/taken", "distilled")["model.safetensors"] != b"x"
    push_student(run_folder, "taken", revision="distilled")


@pytest.mark.parametrize("name", ["4bit.gguf", "model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_weights_alone_tell_another_model(hub, name):
    hub.repositories["tester/taken"] = Repository(branches={"main": {name: b"weights", "README.md": b"mine"}})
    with pytest.raises(ConfigurationError, match=f"it has {name} without training_config.yaml. Choose another name"):
        check_access("taken")


def test_a_branch_that_a_failed_push_has_made_beside_another_model_takes_the_next_push(hub, run_folder):
    files = {"config.json": b"another model"}
    hub.repositories["tester/taken"] = taken = Repository(branches={"main": dict(files)})
    hub.fail("/commit/", 503, times=3)
    with pytest.raises(DistillationError, match="Push the run again"):
        push_student(run_folder, "taken", revision="distilled")
    assert taken.branches == {"main": files, "distilled": files}
    push_student(run_folder, "taken", revision="distilled")
    assert "training_config.yaml" in published(hub, "tester/taken", "distilled")
    taken.branches["theirs"] = {"config.json": b"a third model"}
    for revision in ("main", "theirs"):
        with pytest.raises(ConfigurationError, match="must not hold a model that this package has not pushed"):
            push_student(run_folder, "taken", revision=revision)


def test_a_repository_without_a_model_is_filled(hub, run_folder):
    hub.repositories["tester/new"] = Repository(branches={"main": {"README.md": b"mine", ".gitattributes": b""}})
    push_student(run_folder, "new")
    assert {".gitattributes", "model.safetensors"} <= published(hub, "tester/new").keys()


def test_what_shall_be_private_is_not_pushed_to_a_public_repository(hub, run_folder):
    push_student(run_folder, "name", private=True)
    push_student(run_folder, "name", private=True)
    assert hub.repositories["tester/name"].private
    hub.repositories["tester/name"] = Repository()
    with pytest.raises(ConfigurationError, match="tester/name must be private or new .* but it exists and is public"):
        push_student(run_folder, "name", private=True)
    assert published(hub, "tester/name") == {}
    push_student(run_folder, "name", private=False)
    assert "model.safetensors" in published(hub, "tester/name")


def test_asking_for_access_completes_the_name_and_writes_nothing(hub):
    assert check_access("name") == "tester/name" and check_access("team/name", private=True) == "team/name"
    assert hub.repositories == {} and all(request.startswith("GET ") for request in hub.requests)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["push"], "the following arguments are required: RUN_DIR"),
        (["pull", "out"], "invalid choice: 'pull'"),
        (["push", "nowhere", "name"], "folder must be one that exists, got nowhere. Give the output folder of a run."),
        (["push", __file__, "name"], "folder must be one that exists, got .*test_hub.py"),
    ],
)
def test_a_command_that_cannot_work_ends_in_one_line_and_exit_code_2(hub, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and re.fullmatch(f"error: .*{message}.*\n", capsys.readouterr().err)
    assert hub.requests == []


@pytest.mark.parametrize(
    "removed, added, message",
    [
        ("config.json", None, "without config.json. Give the output folder of a run"),
        ("model.safetensors", None, "without model.safetensors. Give"),
        ("tokenizer_config.json", None, "without tokenizer_config.json. Give"),
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


def test_the_process_itself_prints_one_line(tmp_path):
    command = [sys.executable, "-m", "distill_trainer.hub", "push", "nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: folder must be one that exists, got nowhere. Give the output folder of a run.\n"


@pytest.mark.parametrize("name", ["report/report.json", "training_config.yaml", "README.md"])
def test_a_file_that_holds_the_token_is_not_published(hub, run_folder, name):
    write(run_folder / name, json.dumps({"command": f"--hub_token {WRITE_TOKEN}"}))
    with pytest.raises(ConfigurationError, match=f"{name} must not hold the token"):
        push_student(run_folder)
    assert hub.requests == []


def test_what_would_change_how_the_student_loads_leaves_the_repository(hub, run_folder):
    push_student(run_folder)
    foreign = {"adapter_config.json", "chat_template.jinja", "added_tokens.json", "report/old.svg"}
    kept = {"LICENSE", "notes/plan.md", "README.md"}
    published(hub).update({name: b"{}" for name in foreign | kept})
    (run_folder / "README.md").unlink()
    push_student(run_folder)
    assert not foreign & published(hub).keys() and kept <= published(hub).keys()


def test_a_folder_that_was_renamed_still_gives_the_card_the_repositorys_name(hub, run_folder):
    push_student(run_folder.rename(run_folder.parent / "moved"), "other-name")
    pushed = published(hub, "tester/other-name")["README.md"].decode()
    assert pushed.count('from_pretrained("tester/other-name")') == 2 and "tiny-student" not in pushed


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer_config.json", "README.md"])
def test_a_damaged_file_is_named_before_the_hub_is_asked(hub, run_folder, name):
    content = (run_folder / name).read_bytes()
    (run_folder / name).write_bytes(b"\xff" + content if name == "README.md" else content[: len(content) // 2])
    with pytest.raises(ConfigurationError, match=f"{name} is damaged: .* Train again, or give another folder."):
        push_student(run_folder)
    assert hub.requests == []
