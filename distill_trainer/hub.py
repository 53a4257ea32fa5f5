"""The student on the Hugging Face Hub: its model card, and the upload of a run's bare student and report.

`python -m distill_trainer.hub push RUN_DIR REPO` uploads a finished run.
"""

import argparse
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill_trainer.errors import ConfigurationError, DistillationError

WEIGHT_FILES = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
# Patterns, relative to a run's folder, of all that is published. `*` also crosses `/`, as in all of huggingface_hub.
STUDENT_FILES = (
    *("config.json", "generation_config.json", *WEIGHT_FILES),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja", "README.md", "report/*"),
)
RETRY_WAITS = (1, 3)
CARD_ROWS = {
    "student_before": "Before training",
    "baseline": "Fine-tuned on the same text without a teacher",
    "student": "**This model**",
    "teacher": "Teacher",
}
CARD_COLUMNS = {"bits_per_byte": ".4f", "word_perplexity": ",.2f", "parameters": ",.0f"}
CARD = """# {title}

The student {student}, trained on {datasets} and distilled by `distill_trainer` from {teacher}.

## Results

On held-out documents, the same bytes of text for every model; lower is better.

{table}

## How to use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
model = AutoModelForCausalLM.from_pretrained("{repo_id}")
inputs = tokenizer("The history of this country", return_tensors="pt")
outputs = model.generate(**inputs, max_new_tokens=40)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))
```
{training}"""


def push_student(
    folder: str | Path,
    repo_id: str | None = None,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload the distilled student",
) -> str:
    """URL of the Hub repository that now holds the student and the report of `folder`.

    Only `STUDENT_FILES` are sent. Weight files of an earlier push that this student does not have are deleted.

    Args:
        folder: Output folder of a run, a checkpoint, or an export.
        repo_id: `name` or `namespace/name`, created if missing. None takes the folder's name.
        token: Token with write access. None takes `HF_TOKEN` or the one of `hf auth login`.
        private: Whether a repository created here is private. None leaves it to the account's default.
        revision: Branch to write, created if missing. None writes `main`.
        commit_message: First line of the commit.

    Raises:
        ConfigurationError: If the folder holds no student, or the name or the token cannot work.
        DistillationError: If the Hub fails or cannot be reached, after retries.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError, HTTPError

    folder = Path(folder)
    _check_student(folder)
    token = token or get_token()
    if not token:
        raise ConfigurationError("token must be set to push, got none. Set HF_TOKEN or run `hf auth login`.")
    for path in (folder / "README.md", *sorted((folder / "report").rglob("*"))):
        if path.is_file() and token.encode() in path.read_bytes():
            raise ConfigurationError(f"{path} must not hold the token, since it is published. Remove the token there.")
    repo_id = repo_id or folder.resolve().name
    api = HfApi(token=token, library_name="distill_trainer")
    waits = iter(RETRY_WAITS)
    while True:
        try:
            return _upload(api, folder, repo_id, private, revision, commit_message)
        except HFValidationError as error:
            raise ConfigurationError(f"repo_id must be a valid name, got {repo_id!r}. {error}") from error
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            # huggingface_hub wraps a failed weight upload in a RuntimeError; its cause says why.
            cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
            status = getattr(getattr(cause, "response", None), "status_code", None)
            transient = (status >= 500 or status in (408, 429)) if status else isinstance(cause, HTTPError)
            wait = next(waits, None) if transient else None
            if wait is None:
                raise _hub_error(cause, status, repo_id) from error
            time.sleep(wait)


def write_model_card(
    folder: str | Path,
    report: dict[str, Any],
    *,
    student_name: str,
    teacher_name: str,
    datasets: Sequence[str],
    license: str | None = None,
    command: str | None = None,
    repo_id: str | None = None,
) -> Path:
    """Path of the `README.md` written into `folder`: metadata, results, use and origin of the student.

    Nothing is looked up online. Local paths are shortened to their last part and kept out of the metadata.

    Args:
        folder: Output folder of a run; its name is the card's title.
        report: The run's report in the schema of `evaluate_models`. Values may be None or missing.
        student_name: Name or path of the model that the student was initialised from.
        teacher_name: Name or path of the teacher.
        datasets: Names or paths of the training data.
        license: Hub identifier of the licence. None leaves it out.
        command: Command that made the student, shown without its tokens. None takes the report's, if it has one.
        repo_id: Name in the usage example. None takes the folder's name.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path = Path(folder).resolve() / "README.md"
    title = path.parent.name
    # A card is public: no token of the command line may reach it.
    command = command or (report.get("environment") or {}).get("command") or ""
    command = re.sub(r"(--[\w-]*(?:token|key)[ =])\S+", r"\1<hidden>", command)
    results = _eval_results(report.get("student") or {}, datasets)
    card_data = ModelCardData(
        base_model=student_name if _is_hub_id(student_name) else None,
        datasets=[name for name in datasets if _is_hub_id(name)] or None,
        library_name="transformers",
        license=license,
        pipeline_tag="text-generation",
        tags=["distillation", "knowledge-distillation", "mixture-of-experts"],
        model_name=title if results else None,
        eval_results=results or None,
    )
    text = CARD.format(
        title=title,
        teacher=_link(teacher_name),
        student=_link(student_name),
        datasets=", ".join(_link(name, "datasets/") for name in datasets) or "unnamed text",
        table=_results_table(report),
        repo_id=repo_id or title,
        training=f"\n## Training\n\n```bash\n{command}\n```\n" if command else "",
    )
    ModelCard(f"---\n{card_data.to_yaml()}\n---\n\n{text}").save(path)
    return path


def _check_student(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    shards = set(re.findall(r"model-[^\"]+\.safetensors", index.read_text())) if index.is_file() else set()
    needed = ("config.json", *(sorted(shards) or WEIGHT_FILES[:1]))
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        adapter = (folder / "adapter_config.json").is_file()
        mend = "Merge its LoRA adapter with export_student first." if adapter else "Give the output folder of a run."
        raise ConfigurationError(f"folder must hold a student, got {folder} without {', '.join(missing)}. {mend}")


def _upload(api: Any, folder: Path, repo_id: str, private: bool | None, revision: str | None, message: str) -> str:
    if "/" not in repo_id:
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    url = str(api.create_repo(repo_id, private=private, exist_ok=True))
    if revision and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=message,
        revision=revision,
        allow_patterns=list(STUDENT_FILES),
        # from_pretrained prefers an old single file to new shards, so old weights must not stay.
        delete_patterns=list(WEIGHT_FILES),
    )
    return f"{url}/tree/{revision}" if revision else url


def _hub_error(cause: BaseException, status: int | None, repo_id: str) -> DistillationError:
    reason = " ".join((getattr(cause, "server_message", None) or str(cause)).split())
    got = f"HTTP {status} ({reason})" if status else reason
    if status in (401, 403):
        return ConfigurationError(
            f"token must have write access to {repo_id}, got {got}. Set HF_TOKEN to a write token."
        )
    return DistillationError(f"The Hub must accept the upload to {repo_id}, got {got}. Push the run again.")


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/[\w.-]*\w", name) is not None and not Path(name).exists()


def _link(name: str, kind: str = "") -> str:
    return f"[{name}](https://huggingface.co/{kind}{name})" if _is_hub_id(name) else f"`{Path(name).name}`"


def _results_table(report: dict[str, Any]) -> str:
    lines = ["| | bits per byte | word perplexity | parameters |", "|---|---|---|---|"]
    for name, label in CARD_ROWS.items():
        if figures := report.get(name):
            cells = [(figures.get(key), form) for key, form in CARD_COLUMNS.items()]
            lines.append(f"| {label} | {' | '.join('-' if v is None else format(v, form) for v, form in cells)} |")
    return "\n".join(lines)


def _eval_results(figures: dict[str, Any], datasets: Sequence[str]) -> list:
    from huggingface_hub import EvalResult

    names = [name if _is_hub_id(name) else Path(name).name for name in datasets] or ["text"]
    title = f"{', '.join(names)} (held-out documents)"
    values = {"bits_per_byte": figures.get("bits_per_byte"), "perplexity": figures.get("word_perplexity")}
    metrics = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
    return [EvalResult("text-generation", names[0], title, *metric, verified=False) for metric in metrics.items()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Ends with exit code 2 and one line on standard error if the push fails."""
    parser = argparse.ArgumentParser(prog="python -m distill_trainer.hub", description="Publish a distilled student.")
    push = parser.add_subparsers(dest="action", required=True).add_parser("push", help="Upload a finished run.")
    push.add_argument("folder", metavar="RUN_DIR", help="Output folder of a run.")
    push.add_argument("repo_id", metavar="REPO", nargs="?", help="name or namespace/name; default: the folder's name.")
    push.add_argument("--private", action="store_true", default=None, help="Make a new repository private.")
    options = parser.parse_args(arguments)
    try:
        url = push_student(options.folder, options.repo_id, private=options.private)
    except DistillationError as error:
        parser.exit(2, f"{error}\n")
    sys.stdout.write(f"{url}\n")


if __name__ == "__main__":
    main()
