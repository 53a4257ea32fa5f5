import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import RemoteEntryNotFoundError

from distill_trainer.card import declared_licence, write_model_card
from distill_trainer.evaluation.benchmarks import benchmark_rows
from distill_trainer.report import write_report
from distill_trainer.report.wording import sentences, verdict

HISTORY = [{"step": step, "eval_bits_per_byte": 3 - step / 100, "distill/loss_kl": 1.0} for step in (10, 20, 30)]
CARDS = {
    "org/base": "---\nlicense: apache-2.0\n---\n# Base\n",
    "org/teacher": "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n",
}


@pytest.fixture
def report():
    def model(name, bits, parameters):
        return {"name": name, "bits_per_byte": bits, "word_perplexity": 2 ** (6 * bits), "parameters": parameters}

    row = {"task": "arc_easy", "metric": "acc", "filter": "none", "higher_is_better": True, "num_fewshot": 0}
    row |= {"samples": 2376, "scores": {"student": {"value": 0.3127, "stderr": 0.01}}}
    return {
        "schema": 1,
        "teacher": model("org/teacher", 1.9, 9000),
        "student_before": model("base", 3.0, 1234),
        "student": model("out", 2.25, 1234),
        "baseline": model("base", 2.4, 1234) | {"word_perplexity": None},
        "retention": {"gap_closed": 0.6818, "gap_closed_baseline": 0.5454},
        "benchmarks": {
            "harness": "0.4",
            "limit": None,
            "rows": [row],
        },
        "data": {"train_documents": 40, "train_bytes": 1_912_345, "eval_documents": 12, "eval_bytes": 402_113},
        "environment": {"command": "run_distillation.py a.yaml", "processes": 2, "settings": {"max_steps": 30}},
    }


@pytest.fixture(autouse=True)
def hub_cards(monkeypatch, tmp_path):
    """The Hub's cards by the name of the model. Others cannot be read."""

    def download(repo_id, filename):
        if repo_id == "org/without":
            raise RemoteEntryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))
        if repo_id not in CARDS or filename != "README.md":
            raise OSError(f"{repo_id} has no {filename}")
        path = tmp_path / f"{repo_id.replace('/', '-')}.md"
        path.write_text(CARDS[repo_id])
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)


def written(folder: Path, report: dict, **changes) -> ModelCard:
    names = {"student_name": "org/base", "teacher_name": "org/teacher", "datasets": ["Salesforce/wikitext"]}
    return ModelCard.load(write_model_card(folder, report, **(names | changes)))


def test_a_score_that_numpy_has_summed_up_is_a_number_of_the_card(tmp_path, report):
    """As the harness returns exact_match and f1."""
    results = {"results": {"gen": {"exact_match,none": np.float64(0.25)}}, "higher_is_better": {}}
    results |= {"versions": {}, "n-shot": {}, "n-samples": {}}
    report["benchmarks"]["rows"] = benchmark_rows({"student": results})
    (tmp_path / "out").mkdir()
    values = [result.metric_value for result in written(tmp_path / "out", report).data.eval_results]
    assert values[-1] == 0.25 and type(values[-1]) is float


def test_the_metadata_are_the_origin_and_the_figures_of_the_report(tmp_path, report):
    page = write_report(report, HISTORY, tmp_path / "out")
    metadata = written(tmp_path / "out", report).data
    assert (metadata.base_model, metadata.datasets, metadata.license) == (
        "org/base",
        ["Salesforce/wikitext"],
        "apache-2.0",
    )
    assert (metadata.library_name, metadata.pipeline_tag) == ("transformers", "text-generation")
    assert {"distillation", "mixture-of-experts"} <= set(metadata.tags)
    # Read back from the model-index.
    assert metadata.model_name == "out"
    found = {(result.dataset_type, result.metric_type): result for result in metadata.eval_results}
    figures = json.loads(page.with_name("report.json").read_text())
    assert {names: result.metric_value for names, result in found.items()} == {
        ("Salesforce/wikitext", "bits_per_byte"): figures["student"]["bits_per_byte"],
        ("Salesforce/wikitext", "perplexity"): figures["student"]["word_perplexity"],
        ("arc_easy", "acc"): figures["benchmarks"]["rows"][0]["scores"]["student"]["value"],
    }
    assert all(result.verified is False and result.task_type == "text-generation" for result in found.values())
    assert found["Salesforce/wikitext", "perplexity"].metric_name == "word perplexity"


def test_the_text_holds_the_headline_the_plots_the_data_and_how_to_train_it_again(tmp_path, report):
    folder = tmp_path / "out"
    write_report(report, HISTORY, folder)
    (folder / "training_config.yaml").write_text("max_steps: 30")
    text = written(folder, report).text
    assert all(sentence in text for sentence in (verdict(report), *sentences(report)))
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert table == [line for line in (folder / "report/report.md").read_text().splitlines()[4:] if line][: len(table)]
    assert len(table) == 6 and "2.2500" in table[-2]
    drawn = re.findall(r"^!\[[^\]]+\]\((\S+)\)$", text, re.MULTILINE)
    assert {Path(name).name for name in drawn} == {path.name for path in (folder / "report").glob("*.svg")} != set()
    # Every relative link leads to a file that is pushed beside the card.
    links = re.findall(r"\]\((?!https://)([^)]+)\)", text)
    assert {"report/report.md", "report/report.html", "training_config.yaml"} <= set(links)
    assert all((folder / link).is_file() for link in links)
    assert "Training text: 40 documents (1,912,345 bytes). Scored text: 12 documents (402,113 bytes)." in text
    assert "[Salesforce/wikitext](https://huggingface.co/datasets/Salesforce/wikitext)" in text
    assert "from the teacher [org/teacher](https://huggingface.co/org/teacher)." in text
    assert "```bash\naccelerate launch --num_processes 2 run_distillation.py a.yaml\n```" in text
    again = "accelerate launch --num_processes 2 run_distillation.py training_config.yaml --output_dir outputs/again"
    assert f"```bash\n{again}\n```" in text


def test_the_licence_is_the_students_and_that_of_the_teacher_is_named(tmp_path, report):
    card = written(tmp_path, report)
    assert card.data.license == "apache-2.0"
    assert (
        "`apache-2.0`, inherited from the student [org/base](https://huggingface.co/org/base). The teacher "
        in card.text
    )
    assert "has the licence [`own`](https://huggingface.co/org/teacher/blob/main/LICENSE)." in card.text
    metadata = written(tmp_path, report, student_name="org/teacher").data
    assert (metadata.license, metadata.license_name) == ("other", "own")
    assert metadata.license_link == "https://huggingface.co/org/teacher/blob/main/LICENSE"


UNKNOWN = {
    "no card": None,
    "no metadata": "# Only text",
    "no licence": "---\ntags: [a]\n---\n",
    "a name alone": "---\nlicense_name: own\n---\n",
    "a list": "---\nlicense: [mit, gpl]\n---\n",
    "no mapping": "---\n- mit\n---\n",
}


@pytest.mark.parametrize("content", UNKNOWN.values(), ids=UNKNOWN)
def test_a_licence_that_is_not_declared_is_not_made_up(tmp_path, report, content):
    base = tmp_path / "private/base"
    base.mkdir(parents=True)
    if content is not None:
        (base / "README.md").write_text(content)
    card = written(tmp_path, report, student_name=str(base), teacher_name="org/without")
    assert card.data.license is None and "license" not in card.data.to_dict()
    assert "The card of the student `base` names no licence, so none is declared here: ask its authors." in card.text
    assert "The card of the teacher [org/without](https://huggingface.co/org/without) names no licence." in card.text


@pytest.mark.parametrize("content", [b"---\nlicense: [mit\n---\n", b"---\nlicense: \xff\n---\n"])
def test_a_licence_that_cannot_be_read_is_not_said_to_be_missing(tmp_path, report, content):
    base = tmp_path / "private/base"
    base.mkdir(parents=True)
    (base / "README.md").write_bytes(content)
    card = written(tmp_path, report, student_name=str(base), teacher_name="org/unknown")
    assert card.data.license is None
    assert "The card of the student `base` could not be read, so no licence is declared here" in card.text
    assert "The card of the teacher [org/unknown](https://huggingface.co/org/unknown) could not be read" in card.text


def test_the_licence_of_a_local_student_is_read_from_its_folder(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n")
    assert declared_licence(str(tmp_path)) == {"license": "other", "license_name": "own"}


def test_a_card_needs_no_figures_and_keeps_local_paths_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = {"student": {"bits_per_byte": None, "word_perplexity": float("inf")}, "baseline": None}
    for folder in ("private/base", "out/report"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "out/report/losses.svg").touch()  # of an earlier run
    local = {"student_name": "private/base", "teacher_name": "~/private/teacher"}
    for known in (report, {}):
        card = written(tmp_path / "out", known, **local, datasets=["sotu", "./private/a.jsonl"])
        assert not {"base_model", "datasets", "model-index", "model_name"} & card.data.to_dict().keys()
        text = (tmp_path / "out/README.md").read_text()
        assert "private" not in text
        assert "The student `base`, trained on `sotu`, `a.jsonl` and distilled by" in text
        titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        assert titles == ["out", "How to use", "Licence"]


def test_names_cannot_break_the_card(tmp_path, report):
    report["student"]["name"] = "a|b\n# c"
    report["environment"]["command"] = None
    text = written(tmp_path, report, datasets=[]).text
    assert "\n# c" not in text and "trained on unnamed text" in text and "## Training" not in text
    assert "training_config.yaml" not in text


def test_datasets_have_their_names_on_the_hub(tmp_path, report):
    card = written(tmp_path, report, datasets=["wikitext", "allenai/c4:en"])
    assert card.data.datasets == ["Salesforce/wikitext", "allenai/c4"]
    assert "[allenai/c4](https://huggingface.co/datasets/allenai/c4)" in card.text
    assert {result.dataset_type for result in card.data.eval_results} == {"Salesforce/wikitext", "arc_easy"}
