import copy
import itertools
import json
import unicodedata

import datasets
import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, ByT5Tokenizer

from distill_trainer.alignment import encode
from distill_trainer.data import IGNORE_INDEX, DistillationCollator, _cut, prepare_dataset
from distill_trainer.documents import load_splits
from distill_trainer.errors import ConfigurationError, DataError, TokenizerError

COLUMNS = {"input_ids", "teacher_input_ids", "student_positions", "teacher_positions", "scored_bytes", "length"}
DOCUMENTS = [
    "The quick brown fox jumps over the lazy dog; the dog doesn't mind. " * 3,
    "日本語の文章と 👩‍🚀 and 👨‍👩‍👧‍👦 cafe\u0301 ế é \u1112\u1161\u11ab.",
    "def f(x):\r\n    return x[0]\r\n\r\n\t# 1,000,000 <|endoftext|> (a)",
]


def dataset_of(texts):
    return Dataset.from_dict({"text": texts}, features=datasets.Features(text=datasets.Value("string")))


def with_bos(tokenizer):
    """A tokenizer that puts a special token before each text."""
    changed = copy.deepcopy(tokenizer)
    bos = changed.eos_token
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, changed.eos_token_id)]
    )
    assert changed("a")["input_ids"][0] == changed.eos_token_id
    return changed


def padded_on(tokenizer, side):
    changed = copy.deepcopy(tokenizer)
    changed.padding_side = side
    return changed


def encoding(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def decode(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.fixture
def prepare(student_tokenizer, teacher_tokenizer):
    def prepare(texts, max_length=12, student=None, teacher=None, **options):
        documents = dataset_of(texts) if isinstance(texts, list) else texts
        sides = student or student_tokenizer, teacher or teacher_tokenizer
        return prepare_dataset(documents, *sides, max_length=max_length, **options)

    return prepare


@pytest.mark.parametrize("bos", ["none", "student", "teacher", "both"])
def test_windows_hold_the_bytes_of_a_document_once(prepare, student_tokenizer, teacher_tokenizer, bos):
    student = with_bos(student_tokenizer) if bos in ("student", "both") else student_tokenizer
    teacher = with_bos(teacher_tokenizer) if bos in ("teacher", "both") else teacher_tokenizer
    for text in DOCUMENTS:
        windows, statistics = prepare([text], 20, student=student, teacher=teacher)
        assert set(windows.column_names) == COLUMNS
        assert statistics["dropped"] == {"empty_documents": 0, "short_windows": 0}
        texts = []
        for window in windows:
            ids, teacher_ids = window["input_ids"], window["teacher_input_ids"]
            assert len(ids) == window["length"] <= 20
            for found, tokenizer, has in (
                (ids, student, ("student", "both")),
                (teacher_ids, teacher, ("teacher", "both")),
            ):
                assert (found[0] == tokenizer.eos_token_id) is (bos in has)
                assert tokenizer.eos_token_id not in found[1:]
            ids, teacher_ids = (x[1:] if x[0] == student.eos_token_id else x for x in (ids, teacher_ids))
            texts.append(decode(student, ids))
            assert "\ufffd" not in texts[-1]
            assert decode(teacher, teacher_ids) == unicodedata.normalize("NFC", texts[-1])
        assert "".join(texts) == text
        assert len(texts) > 1


@pytest.mark.parametrize("bos", [None, "student", "teacher"])
def test_positions_point_at_the_anchors_of_the_window_behind_special_tokens(
    prepare, student_tokenizer, teacher_tokenizer, bos
):
    student = with_bos(student_tokenizer) if bos == "student" else student_tokenizer
    teacher = with_bos(teacher_tokenizer) if bos == "teacher" else teacher_tokenizer
    for window in prepare(DOCUMENTS, student=student, teacher=teacher)[0]:
        shift, teacher_shift = int(bos == "student"), int(bos == "teacher")
        ids, teacher_ids = window["input_ids"][shift:], window["teacher_input_ids"][teacher_shift:]
        teacher_texts = [decode(teacher, teacher_ids[: j + 1]) for j in range(len(teacher_ids))]
        expected = []
        for i in range(len(ids)):
            text = unicodedata.normalize("NFC", decode(student, ids[: i + 1]))
            if text in teacher_texts and "\ufffd" not in text:
                expected.append((i + shift, teacher_texts.index(text) + teacher_shift))
        assert list(zip(window["student_positions"], window["teacher_positions"], strict=True)) == expected
        assert len(expected) >= 2
        first, last = (
            len(decode(student, window["input_ids"][shift : window["student_positions"][i] + 1]).encode())
            for i in (0, -1)
        )
        assert window["scored_bytes"] == last - first > 0


def test_scored_bytes_are_those_of_the_original_text_when_the_student_normalises(
    prepare, student_tokenizer, teacher_tokenizer
):
    text = "a cafe\u0301 in a cafe\u0301"
    windows, _ = prepare([text], 64, student=teacher_tokenizer, teacher=student_tokenizer)
    first = encode(teacher_tokenizer, text)[1][windows[0]["student_positions"][0]]
    assert windows[0]["scored_bytes"] == len(text[first:].encode())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), min_size=1, max_size=30))
@pytest.mark.parametrize("max_length", [4, 9])
def test_windows_of_random_unicode_join_to_the_document(student_tokenizer, teacher_tokenizer, max_length, text):
    windows = list(_cut(text, student_tokenizer, teacher_tokenizer, max_length))
    assert "".join(decode(student_tokenizer, window["input_ids"]) for window in windows) == text
    for window in windows:
        assert 0 < window["length"] == len(window["input_ids"]) <= max_length
        assert bool(window["dropped"]) is (len(window["student_positions"]) < 2)
        part = decode(student_tokenizer, window["input_ids"])
        assert decode(teacher_tokenizer, window["teacher_input_ids"]) == unicodedata.normalize("NFC", part)


def test_a_character_longer_than_a_window_is_left_out_and_the_rest_is_kept(prepare, student_tokenizer):
    windows, statistics = prepare(["xq\U0001f9ffzk\U0001f9ff"], 2)
    assert [decode(student_tokenizer, window["input_ids"]) for window in windows] == ["xq", "zk"]
    assert statistics["dropped"] == {"empty_documents": 0, "short_windows": 2}


def test_a_document_of_two_tokens_is_scored_on_its_second(prepare, student_tokenizer):
    assert len(encoding(student_tokenizer, "xé")) == 3
    windows, _ = prepare(["xq", "xé"])
    assert windows["student_positions"][:] == [[0, 1], [0, 2]]
    assert windows["scored_bytes"][:] == [1, 2]


def test_what_is_left_out_is_counted_and_the_rest_summed(prepare):
    texts = ["", None, "x", *DOCUMENTS, "é"]
    windows, statistics = prepare(texts)
    assert statistics["dropped"] == {"empty_documents": 2, "short_windows": 2}
    assert statistics["documents"] == len(texts)
    assert statistics["windows"] == len(windows) == len(list(windows))
    assert statistics["bytes"] == sum(len((text or "").encode()) for text in texts)
    assert statistics["student_tokens"] == sum(len(window["input_ids"]) for window in windows)
    assert statistics["teacher_tokens"] == sum(len(window["teacher_input_ids"]) for window in windows)
    assert statistics["anchors"] == sum(len(window["teacher_positions"]) for window in windows)
    assert statistics["anchor_fraction"] == statistics["anchors"] / statistics["student_tokens"]


@pytest.mark.parametrize("texts", [["", None], ["x", ""]])
def test_documents_without_two_anchors_are_an_error(prepare, texts):
    with pytest.raises(DataError, match="None of the 2 documents holds two anchors") as error:
        prepare(texts)
    assert "\n" not in str(error.value)


def test_windows_too_short_for_two_anchors_blame_max_length_and_not_the_documents(prepare):
    with pytest.raises(
        ConfigurationError, match="max_length must be larger to cut the documents into windows, got 1:"
    ):
        prepare(DOCUMENTS, max_length=1)


@pytest.mark.parametrize("streaming", [False, True])
def test_windows_that_need_more_positions_than_the_teacher_has_are_refused(prepare, streaming):
    documents = dataset_of(DOCUMENTS)
    longest = max(map(len, prepare(documents)[0]["teacher_input_ids"]))

    def read(positions):
        source = documents.to_iterable_dataset() if streaming else documents
        return list(prepare(source, teacher_positions=positions)[0])

    assert len(read(longest)) == len(read(None))
    with pytest.raises(
        ConfigurationError, match=rf"max_length must be smaller, got 12: a window .* has {longest} of the"
    ):
        read(longest - 1)


def test_a_window_that_is_left_out_needs_no_positions_of_the_teacher(prepare, teacher_tokenizer):
    texts = ["xq", "\U0001f9ff"]
    assert [len(encoding(teacher_tokenizer, text)) for text in texts] == [2, 3]
    assert len(prepare(texts, teacher_positions=2)[0]) == 1


def unknown_columns(texts):
    return IterableDataset.from_generator(lambda: ({"text": text, "id": 1} for text in texts))


def known_columns(texts):
    return dataset_of(texts).to_iterable_dataset()


@pytest.mark.parametrize("stream", [known_columns, unknown_columns])
def test_a_stream_gives_the_same_windows(prepare, stream):
    texts = ["", *DOCUMENTS, "x"]
    windows, statistics = prepare(stream(texts))
    assert statistics is None
    windows = list(windows)
    assert windows == list(prepare(texts)[0])
    assert set(windows[0]) == COLUMNS


def test_several_processes_give_the_same_windows(prepare):
    assert list(prepare(DOCUMENTS, num_proc=2)[0]) == list(prepare(DOCUMENTS)[0])
    assert list(prepare(DOCUMENTS[:1], num_proc=4)[0]) == list(prepare(DOCUMENTS[:1])[0])


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_tokenizer_that_cannot_be_aligned_is_refused_before_anything_is_read(prepare, side):
    def documents():
        raise AssertionError("read")
        yield

    with pytest.raises(TokenizerError, match="Use a fast tokenizer"):
        prepare(IterableDataset.from_generator(documents), **{side: ByT5Tokenizer()})


@pytest.fixture
def texts_seen(monkeypatch):
    """Texts that are really cut, not read from the cache."""
    seen = []

    def cut(text, *arguments):
        seen.append(text)
        return _cut(text, *arguments)

    monkeypatch.setattr("distill_trainer.data._cut", cut)
    return seen


def test_the_second_run_reads_the_cache(tmp_path, texts_seen, student_tokenizer, teacher_tokenizer):
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i} of a few, in a caf\u00e9"}) + "\n" for i in range(10)))
    sides = student_tokenizer, teacher_tokenizer

    def run(max_length=8, sides=sides):
        texts_seen.clear()
        return prepare_dataset(load_splits([str(path)])["train"], *sides, max_length=max_length)

    first, statistics = run()
    assert len(texts_seen) == 8
    # Tokenizers that were used, or read anew, are the same tokenizers.
    teacher_tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=3)
    for tokenizer, folder in zip(sides, ("student", "teacher"), strict=True):
        tokenizer.save_pretrained(tmp_path / folder)
    again = [AutoTokenizer.from_pretrained(tmp_path / folder) for folder in ("student", "teacher")]
    for repeated in (run(), run(sides=again)):
        assert not texts_seen
        assert list(repeated[0]) == list(first)
        assert repeated[1] == statistics
        assert repeated[0].cache_files == first.cache_files != []
    for changed in ({"max_length": 9}, {"sides": sides[::-1]}, {"sides": (with_bos(sides[0]), sides[1])}):
        assert list(run(**changed)[0]) != list(first)
        assert len(texts_seen) == 8


SIDES = list(itertools.product(["left", "right"], repeat=2))


@pytest.mark.parametrize("student_side, teacher_side", SIDES)
def test_every_anchor_points_at_the_same_token_under_any_padding(
    prepare, student_tokenizer, teacher_tokenizer, student_side, teacher_side
):
    sides = padded_on(student_tokenizer, student_side), padded_on(teacher_tokenizer, teacher_side)
    windows = list(prepare([*DOCUMENTS, "xq"], 20, student=with_bos(student_tokenizer))[0])
    assert len({window["length"] for window in windows}) > 2
    batch = DistillationCollator(*sides)(windows)
    for row, window in enumerate(windows):
        for prefix, name in (("", "student"), ("teacher_", "teacher")):
            ids, mask = batch[f"{prefix}input_ids"][row], batch[f"{prefix}attention_mask"][row]
            assert ids[mask.bool()].tolist() == window[f"{prefix}input_ids"]
            padding = len(mask) - int(mask.sum())
            assert mask[0 if sides[name == "teacher"].padding_side == "left" else -1] == (0 if padding else 1)
            positions = batch[f"{name}_positions"][row]
            stored = window[f"{name}_positions"]
            assert ids[positions[batch["anchor_mask"][row]]].tolist() == [
                window[f"{prefix}input_ids"][i] for i in stored
            ]
            assert mask[positions[batch["anchor_mask"][row]]].all()
            assert not positions[~batch["anchor_mask"][row]].any()
        assert batch["anchor_mask"][row].sum() == len(window["student_positions"])
        assert batch["scored_bytes"][row] == window["scored_bytes"]
    assert batch["anchor_mask"].dtype == torch.bool
    assert {name: tensor.shape[0] for name, tensor in batch.items()} == dict.fromkeys(batch, len(windows))
    assert all(batch[name].dtype == torch.long for name in batch if name != "anchor_mask")


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_leave_out_padding_and_the_first_token_but_no_token_that_equals_the_padding(
    student_tokenizer, teacher_tokenizer, side
):
    pad = student_tokenizer.pad_token_id
    rows = [[5, pad, 7, pad], [8, 9], [pad, 6, 5]]
    window = {"teacher_input_ids": [1, 2], "student_positions": [0, 1], "teacher_positions": [0, 1], "scored_bytes": 1}
    collator = DistillationCollator(padded_on(student_tokenizer, side), teacher_tokenizer)
    batch = collator([window | {"input_ids": row} for row in rows])
    for row, labels, mask in zip(rows, batch["labels"], batch["attention_mask"], strict=True):
        assert labels[mask.bool()].tolist() == [IGNORE_INDEX, *row[1:]]
        assert (labels[~mask.bool()] == IGNORE_INDEX).all()
    padding = batch["input_ids"][batch["attention_mask"] == 0]
    assert padding.tolist() == [pad] * 3


def test_without_a_padding_token_the_end_of_text_fills_the_rows(student_tokenizer, teacher_tokenizer):
    student, teacher = copy.deepcopy(student_tokenizer), copy.deepcopy(teacher_tokenizer)
    student.pad_token, student.eos_token = None, "a"
    teacher.pad_token = teacher.eos_token = None
    window = {"student_positions": [0, 1], "teacher_positions": [0, 1], "scored_bytes": 1}
    rows = [window | {"input_ids": [5, 6, 7], "teacher_input_ids": [5, 6]}]
    rows += [window | {"input_ids": [5, 6], "teacher_input_ids": [5, 6, 7]}]
    batch = DistillationCollator(student, teacher)(rows)
    assert batch["input_ids"][1, 2] == student.convert_tokens_to_ids("a")
    assert batch["teacher_input_ids"][0, 2] == 0


def test_models_see_the_same_at_the_anchors_under_any_padding(
    prepare, student_tokenizer, teacher_tokenizer, tiny_student, tiny_moe_teacher
):
    windows = list(prepare([DOCUMENTS[0], "the dog jumps"], 20)[0])
    seen = []
    for student_side, teacher_side in SIDES:
        sides = padded_on(student_tokenizer, student_side), padded_on(teacher_tokenizer, teacher_side)
        batch = DistillationCollator(*sides)(windows)
        row = torch.arange(len(windows))[:, None]
        with torch.no_grad():
            student = tiny_student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            teacher = tiny_moe_teacher(
                input_ids=batch["teacher_input_ids"], attention_mask=batch["teacher_attention_mask"]
            ).logits
        seen.append(
            (
                student[row, batch["student_positions"]][batch["anchor_mask"]],
                teacher[row, batch["teacher_positions"]][batch["anchor_mask"]],
            )
        )
    for student, teacher in seen[1:]:
        torch.testing.assert_close(student, seen[0][0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(teacher, seen[0][1], atol=1e-5, rtol=1e-4)
