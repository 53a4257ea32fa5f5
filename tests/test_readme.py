import configparser
import dataclasses
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import run_distillation
from distill_trainer import losses
from distill_trainer.ablation_file import read_ablation
from distill_trainer.alignment import anchor_pairs
from distill_trainer.arguments import DistillationArguments
from distill_trainer.demo import ASSETS
from distill_trainer.documents import load_sotu
from distill_trainer.evaluation_arguments import EvaluationArguments
from distill_trainer.hub import push
from distill_trainer.input_arguments import DataArguments, ModelArguments
from distill_trainer.parsing import SettingsParser, parse_arguments
from distill_trainer.schedules import LOSS_NAMES

ROOT = Path(__file__).parents[1]
PATH = ROOT / "README.md"
README = PATH.read_text(encoding="utf-8")
CONFIGURATION = ("<!-- configuration-table -->\n", "<!-- /configuration-table -->")
DEMO = ("<!-- demo-table -->\n", "<!-- /demo-table -->")
REFERENCE_TEACHER, REFERENCE_STUDENT = (
    ModelArguments().teacher_model_name_or_path,
    ModelArguments().student_model_name_or_path,
)


def between(markers: tuple[str, str]) -> str:
    return README.split(markers[0])[1].split(markers[1])[0]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """Words of every shell command of the README."""
    lines = [line for block in blocks("bash") for line in block.replace(" && ", "\n").splitlines()]
    return [shlex.split(line) for line in lines if line]


def starts() -> list[list[str]]:
    """Arguments of every `python run_distillation.py`."""
    return [words[2:] for words in commands() if words[:2] == ["python", "run_distillation.py"]]


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def table_of(header: str) -> list[list[str]]:
    """Cells of the rows of the README's table with this first line."""
    rows = README.split(header)[1].split("\n\n")[0].strip().splitlines()[1:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def configuration_table() -> str:
    """The table of our own settings, made from the help texts."""
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for kind in (ModelArguments, DataArguments, DistillationArguments, EvaluationArguments):
        fields = {field.name: field for field in dataclasses.fields(kind)}
        for name in kind.__annotations__:
            field, factory = fields[name], fields[name].default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            aliases = ", ".join(f"`{alias[2:]}`" for alias in field.metadata.get("aliases", []))
            title = f"`{name}`" + (f" ({aliases})" if aliases else "")
            meaning = field.metadata["help"].replace("%%", "%").replace("|", "\\|")
            lines.append(f"| {title} | `{shown(default)}` | {meaning} |")
    return "\n".join(lines) + "\n"


def shown(value) -> str:
    if isinstance(value, list):
        return " ".join(map(shown, value))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def test_the_configuration_table_is_made_from_the_help_texts():
    assert between(CONFIGURATION) == configuration_table()


def test_the_loss_table_names_every_loss_with_its_weight_and_function():
    rows = table_of("| key | default weight | function | what | paper |\n")
    assert [row[0] for row in rows] == [f"`{name}`" for name in LOSS_NAMES]
    defaults = {field.name: field.default for field in dataclasses.fields(DistillationArguments)}
    sources = "\n".join(path.read_text() for path in (ROOT / "distill_trainer/losses").iterdir() if path.is_file())
    for name, (_, weight, function, _, papers) in zip(LOSS_NAMES, rows, strict=True):
        assert weight == shown(defaults[f"{name}_weight"])
        assert callable(getattr(losses, function.strip("`")))
        assert all(link in sources for link in re.findall(r"\((https.*?)\)", papers))
        assert papers or name == "lm"


def test_every_block_is_a_command_python_or_the_demos_output():
    found = re.findall(r"^```(\w*)$", README, re.MULTILINE)[::2]
    assert set(found) <= {"bash", "python", "text"}
    assert found.count("text") == len(re.findall(r"^```text$", between(DEMO), re.MULTILINE))


def test_every_command_is_one_that_these_tests_know():
    known = [
        r"pip install (-e|--force-reinstall) .*",
        r"python run_distillation\.py .*",
        r"python -m distill_trainer\.\w+.*",
        r"python -c .*",
        r"python tests/test_readme\.py",
        r"python tests/benchmarks/(bench_\w+|ablation|native_teacher)\.py( --\w+ \S+)*",
        r"pytest|ruff check \.|ruff format --check \.|mypy distill_trainer run_distillation\.py",
        r"export CUDA_VISIBLE_DEVICES=0",
    ]
    for words in commands():
        line = " ".join(words).removeprefix("PYTHONPATH=. ")
        assert any(re.fullmatch(pattern, line) for pattern in known), line


BENCHMARKS = [
    *("ablation", "bench_kl_methods", "bench_logit_loss", "bench_losses", "bench_router", "bench_when_it_pays"),
    *("bench_frontier", "bench_native", "bench_step", "native_teacher"),
]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_benchmarks_of_the_tables_start(name):
    done = subprocess.run(
        [sys.executable, ROOT / f"tests/benchmarks/{name}.py", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        # As a user starts it: what it imports must come with the installed package.
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr
    assert f"tests/benchmarks/{name}.py" in done.stdout
    assert f"python tests/benchmarks/{name}.py" in README


def test_the_first_two_commands_are_the_demo_and_the_tests():
    demo, tests = blocks("bash")[:2]
    assert demo == 'pip install -e ".[demo]" && python run_distillation.py configs/demo.yaml\n'
    assert tests == 'pip install -e ".[demo,test]" && pytest\n'


def test_what_pip_is_asked_for_exists():
    extras, required = setup()["options.extras_require"], setup()["options"]["install_requires"].split()
    asked = [word for words in commands() if words[:2] == ["pip", "install"] for word in words[2:]]
    for extra in (name for word in asked for group in re.findall(r"\[(.*)\]", word) for name in group.split(",")):
        assert extra in extras
    assert {word for word in asked if word.startswith("torch>")} == {
        word for word in required if word.startswith("torch>")
    }
    assert {"ruff", "mypy"} <= set(extras["dev"].split()) and "pytest" in extras["test"].split()


# Without a GPU fp16 is refused, with an old one bf16 is; both flags are checked by name below.
PRECISION = re.compile(r" --(?:fp16|bf16) true")


@pytest.mark.parametrize("arguments", starts(), ids=" ".join)
def test_every_start_of_a_run_parses(monkeypatch, arguments):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_PROJECT", "")
    argv = PRECISION.sub("", " ".join(arguments)).split()
    if read_ablation(argv) is None:
        parse_arguments(argv)


def test_every_flag_is_a_setting_or_belongs_to_its_own_command():
    parser = SettingsParser([ModelArguments, DataArguments, DistillationArguments])
    own = {option for action in parser._actions for option in action.option_strings} | {"--use_wandb"}
    foreign = {"--force-reinstall", "--index-url", "--check", "--private"}
    flags = set(re.findall(r"(?<!\S|-)`?(--[a-z][\w-]*)", README))
    assert {flag for flag in flags if flag.replace("-", "_").replace("__", "--", 1) not in own} == foreign
    assert {"--fp16", "--bf16"} <= flags


def test_the_demo_command_trains_a_baseline_and_writes_its_report(monkeypatch, capsys, tmp_path, texts):
    monkeypatch.chdir(ROOT)
    tiny = {"datasets": texts, "max_length": 32, "max_steps": 2, "eval_steps": 1, "use_cpu": "true"}
    tiny |= {"output_dir": tmp_path / "out", "per_device_train_batch_size": 2}
    arguments = [word for name, value in tiny.items() for word in (f"--{name}", str(value))]
    assert starts()[0] == ["configs/demo.yaml"]
    assert run_distillation.main([*starts()[0], *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith(f"Report: {tmp_path / 'out/report/report.html'}\n")
    header = next(line for line in printed.splitlines() if line.startswith("held-out text"))
    for word in ("bits/byte", "text/s"):
        assert word in header and f"`{word}`" in README
    if table := between(DEMO).strip():
        assert header.split() == next(line for line in table.splitlines() if line.startswith("held-out text")).split()


@pytest.fixture
def texts(tmp_path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for index, text in enumerate(load_sotu("unseen")[:6]):
        (folder / f"{index}.txt").write_text(text[:400], encoding="utf-8")
    return folder


def test_the_python_blocks_run_on_the_demos_models(monkeypatch, capsys, tmp_path, texts):
    monkeypatch.chdir(tmp_path)
    source = "\n".join(blocks("python"))
    substitutes = {
        f'"{REFERENCE_TEACHER}"': repr(str(ASSETS / "teacher")),
        f'"{REFERENCE_STUDENT}"': repr(str(ASSETS / "student")),
        "max_steps=1000": "max_steps=1, max_length=32, per_device_train_batch_size=2, use_cpu=True",
    }
    for old, new in substitutes.items():
        assert old in source
        source = source.replace(old, new)
    names: dict = {}
    exec(compile(source, "README.md", "exec"), names)
    bits = [names["report"][role]["bits_per_byte"] for role in ("student", "teacher")]
    assert f"{bits[0]} {bits[1]}" in capsys.readouterr().out
    assert isinstance(names["student"], type(AutoModelForCausalLM.from_pretrained(ASSETS / "student")))


def test_the_modules_that_are_started_exist_and_the_push_passes_its_arguments_on(monkeypatch, capsys):
    started = [words[2:] for words in commands() if words[:2] == ["python", "-m"]]
    assert {words[0] for words in started} == {"distill_trainer.hub", "distill_trainer.demo", "distill_trainer.report"}
    assert all(hasattr(importlib.import_module(words[0]), "main") for words in started)
    pushed = []
    monkeypatch.setattr(push, "push_student", lambda *words, **options: pushed.append((words, options)) or "the URL")
    push.main(next(words[1:] for words in started if words[0] == "distill_trainer.hub"))
    assert pushed == [(("outputs/recommended", "my-student"), {"private": True, "revision": None})]
    assert capsys.readouterr().out == "the URL\n"


def test_the_check_of_the_torch_build_answers_true_or_false(capsys):
    code = next(words[2] for words in commands() if words[:2] == ["python", "-c"])
    exec(code, {})
    assert capsys.readouterr().out in ("True\n", "False\n")


def test_every_file_that_is_named_exists():
    named = re.findall(
        r"(?<![\w./])((?:configs|assets|tests|distill_trainer|\.ci)/[\w./]*\w|run_distillation\.py)", README
    )
    assert {"assets/idea.svg", "configs/demo.yaml", "configs/recommended.yaml", ".ci/run"} <= set(named)
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert all((ROOT / link).exists() for link in re.findall(r"\]\((?!http)([^)]+)\)", README))


def test_every_name_in_backticks_exists_in_the_code():
    files = [*ROOT.glob("distill_trainer/**/*.py"), *ROOT.glob("*.py"), ROOT / "setup.cfg", *ROOT.glob("configs/*")]
    parser = SettingsParser([ModelArguments, DataArguments, DistillationArguments])
    options = " ".join(option for action in parser._actions for option in action.option_strings)
    code = options + "\n".join(path.read_text(encoding="utf-8") for path in files)
    # Words of torch's and of CUDA's, checked by the test of the build.
    names = set(re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)`", README)) - {"sm_60"}
    assert len(names) > 50
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", code)] == []


def test_the_trials_in_the_settings_comments_are_the_tables():
    comments = (ROOT / "configs/recommended.yaml").read_text()
    figures = set(re.findall(r"\b\d\.\d{4}\b", comments))
    assert figures and figures <= set(re.findall(r"\b\d\.\d{4}\b", README))


def test_the_picture_shows_the_demos_own_tokens_and_their_anchors():
    picture = ElementTree.parse(ROOT / "assets/idea.svg").getroot()
    tokens, ends = {}, {}
    for side in ("teacher", "student"):
        texts = [node for node in picture.iter() if node.get("class") == f"token {side}-token"]
        tokens[side] = [node.text.replace("␣", " ") for node in texts]
        boxes = [node for node in picture.iter() if node.get("class") == side][: len(texts)]
        ends[side] = [float(box.get("x")) + float(box.get("width")) + 1 for box in boxes]
    text = "".join(tokens["student"])
    tokenizers = {side: AutoTokenizer.from_pretrained(ASSETS / side) for side in tokens}
    for side, tokenizer in tokenizers.items():
        assert [tokenizer.decode(token) for token in tokenizer(text)["input_ids"]] == tokens[side]
    pairs = anchor_pairs(tokenizers["student"], tokenizers["teacher"], text)
    drawn = [float(node.get("x1")) for node in picture.iter() if node.get("class") == "anchor"]
    assert drawn == [ends["student"][student] for student, _ in pairs] == [ends["teacher"][j] for _, j in pairs]


if __name__ == "__main__":
    PATH.write_text(
        README.replace(CONFIGURATION[0] + between(CONFIGURATION), CONFIGURATION[0] + configuration_table()),
        encoding="utf-8",
    )
