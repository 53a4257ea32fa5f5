"""The model card of a run's student: metadata for the Hub, figures, plots, use, origin and licences."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from distill_trainer.documents import HUB_NAMES
from distill_trainer.parsing import SETTINGS_FILE
from distill_trainer.report.markdown import headline, plain
from distill_trainer.report.plots import ALL_PLOTS
from distill_trainer.report.wording import command_again, command_line, number, sentences, verdict

LICENCE_FIELDS = ("license", "license_name", "license_link")
USE = """## How to use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
inputs = tokenizer("The history of this country", return_tensors="pt")
outputs = model.generate(**inputs, max_new_tokens=40)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))
```"""


def write_model_card(
    folder: str | Path, report: dict[str, Any], *, student_name: str, teacher_name: str, datasets: Sequence[str]
) -> Path:
    """Path of the `README.md` written into `folder`; `push_student` puts the repository's name into it.

    Local paths are shortened to their last part and kept out of the metadata. The licences are those that the models'
    own cards declare, read from their folder or the Hub.

    Args:
        folder: Output folder of a run, with its report. Its name is the card's title.
        report: The run's report in the schema of `evaluate_models`. Values may be None or missing.
        student_name: Name or path of the model that the student was initialised from.
        teacher_name: Name or path of the teacher.
        datasets: Names or paths of the training data.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path = Path(folder).resolve() / "README.md"
    # As they are called on the Hub: short names in full, and without the configuration.
    datasets = [HUB_NAMES.get(name, (name,))[0] for name in datasets]
    datasets = [name if Path(name).exists() else name.split(":")[0] for name in datasets]
    title, results = path.parent.name, _eval_results(report, datasets)
    licences = {name: declared_licence(name) for name in (student_name, teacher_name)}
    card_data = ModelCardData(
        base_model=student_name if _is_hub_id(student_name) else None,
        datasets=[name for name in datasets if _is_hub_id(name)] or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["distillation", "knowledge-distillation", "mixture-of-experts"],
        model_name=title if results else None,
        eval_results=results or None,
        **(licences[student_name] or {}),
    )
    source = ", ".join(_link(name, "datasets/") for name in datasets) or "unnamed text"
    parts = [
        f"# {title}",
        f"The student {_link(student_name)}, trained on {source} and distilled by `distill_trainer` from the teacher "
        f"{_link(teacher_name)}.",
        *_results(report, path.parent / "report"),
        USE.format(name=title),
        *_data(report),
        *_training(report, path.parent / SETTINGS_FILE),
        "## Licence",
        f"{_inherited(student_name, licences[student_name])} {_of_teacher(teacher_name, licences[teacher_name])}",
    ]
    ModelCard(f"---\n{card_data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n").save(path)
    return path


def declared_licence(name: str) -> dict[str, str] | None:
    """The licence in the metadata of a model's own card; empty if it declares none, None if it cannot be read."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError, RemoteEntryNotFoundError

    local = Path(name).is_dir()
    try:
        card = Path(name) / "README.md" if local else Path(hf_hub_download(name, "README.md"))
    except RemoteEntryNotFoundError:
        return {}  # a repository without a card
    except (HTTPError, OSError, ValueError):
        return None
    try:
        header = re.match(r"---\s*\n(.*?)\n---\s*\n", card.read_text(encoding="utf-8-sig"), re.DOTALL)
        metadata = yaml.safe_load(header.group(1)) if header else None
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError):
        return None
    known = metadata.items() if isinstance(metadata, dict) else ()
    found = {key: value for key, value in known if key in LICENCE_FIELDS and isinstance(value, str)}
    if "license" not in found:
        return {}
    link = found.get("license_link", "")
    if link and not link.startswith("https://"):
        # A file beside that card, which is not beside this one.
        found |= {"license_link": f"https://huggingface.co/{name}/blob/main/{link}"}
        if local:
            del found["license_link"]
    return found


def _inherited(name: str, licence: dict[str, str] | None) -> str:
    if licence is None:
        return f"The card of the student {_link(name)} could not be read, so no licence is declared here: look there."
    if not licence:
        return f"The card of the student {_link(name)} names no licence, so none is declared here: ask its authors."
    return f"{_licence_text(licence)}, inherited from the student {_link(name)}."


def _of_teacher(name: str, licence: dict[str, str] | None) -> str:
    if licence is None:
        return f"The card of the teacher {_link(name)} could not be read: look there for its licence."
    if not licence:
        return f"The card of the teacher {_link(name)} names no licence."
    return f"The teacher {_link(name)} has the licence {_licence_text(licence)}."


def _licence_text(licence: dict[str, str]) -> str:
    name = f"`{licence.get('license_name') or licence.get('license')}`"
    return f"[{name}]({licence['license_link']})" if "license_link" in licence else name


def _results(report: dict[str, Any], folder: Path) -> list[str]:
    if not (report.get("student") or {}).get("bits_per_byte"):
        return []
    plots = [
        f"**{plot.title}**\n\n![{plot.alt}](report/{plot.name}.svg)"
        for plot in ALL_PLOTS
        if (folder / f"{plot.name}.svg").is_file()
    ]
    return [
        "## Results",
        f"**{plain(verdict(report))}**",
        *map(plain, sentences(report)),
        "Measured on held-out documents, the same bytes of text for every model; fewer bits are better.",
        headline(report),
        "All figures are in [the report](report/report.md), which is also a page to download, "
        "[report.html](report/report.html).",
        *(["## Plots", *plots] if plots else []),
    ]


def _data(report: dict[str, Any]) -> list[str]:
    data = report.get("data") or {}
    parts = []
    for use, part in (("Training text", "train"), ("Scored text", "eval")):
        documents, size = data.get(f"{part}_documents"), data.get(f"{part}_bytes")
        if documents is not None and size is not None:
            parts.append(f"{use}: {number(documents)} documents ({number(size)} bytes).")
    return ["## Data", " ".join([*parts, "No document is in both."])] if len(parts) == 2 else []


def _training(report: dict[str, Any], settings: Path) -> list[str]:
    parts = []
    if command := command_line(report):
        parts.append(f"Command:\n\n```bash\n{command}\n```")
    if settings.is_file():
        parts.append(
            f"[{settings.name}]({settings.name}) holds the settings of the file and of the flags in one. In a copy of "
            "`distill_trainer` with this file, and with the models and texts that it names by a path, this trains the "
            f"same student again:\n\n```bash\n{command_again(report)}\n```"
        )
    return ["## Training", *parts] if parts else []


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/[\w.-]*\w", name) is not None and not Path(name).exists()


def _link(name: str, kind: str = "") -> str:
    return f"[{name}](https://huggingface.co/{kind}{name})" if _is_hub_id(name) else f"`{Path(name).name}`"


def _eval_results(report: dict[str, Any], datasets: Sequence[str]) -> list:
    from huggingface_hub import EvalResult

    figures = report.get("student") or {}
    names = [name if _is_hub_id(name) else Path(name).name for name in datasets] or ["text"]
    title = f"{', '.join(names)} (held-out documents)"
    found: list[tuple[str, str, str, str, Any]] = [
        (names[0], title, "bits_per_byte", "bits per byte", figures.get("bits_per_byte")),
        (names[0], title, "perplexity", "word perplexity", figures.get("word_perplexity")),
    ]
    for row in (report.get("benchmarks") or {}).get("rows") or []:
        score = row["scores"].get("student") or {}
        found.append((row["task"], row["task"], row["metric"], row["metric"], score.get("value")))
    return [
        EvalResult("text-generation", kind, text, metric, value, metric_name=label, verified=False)
        for kind, text, metric, label, value in found
        if value is not None and math.isfinite(value)
    ]
