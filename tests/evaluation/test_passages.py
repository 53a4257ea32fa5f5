import math

import pytest
import torch
from builders import TEXTS, tokenizer
from datasets import Dataset

from distill_trainer.data import DistillationCollator, prepare_dataset
from distill_trainer.documents import load_sotu
from distill_trainer.evaluation.measure import scored_tokens
from distill_trainer.evaluation.passages import NUM_PASSAGES, PASSAGE_BYTES, ROLES, best_and_worst

CPU = torch.device("cpu")
SIDES = tokenizer("student"), tokenizer("teacher")


def batches_of(texts, max_length=512, padding_side="right"):
    sides = [tokenizer(side, padding_side) for side in ("student", "teacher")]
    windows = list(prepare_dataset(Dataset.from_dict({"text": texts}), *sides, max_length=max_length)[0])
    collator = DistillationCollator(*sides)
    return [collator(windows[start : start + 2]) for start in range(0, len(windows), 2)]


def nats_of(batches, side, value):
    """Nats by token id at the scored tokens, 0 elsewhere."""
    ids = "input_ids" if side == "student" else "teacher_input_ids"
    return [value(batch[ids]).double() * scored_tokens(batch, side, CPU) for batch in batches]


@pytest.fixture(scope="module", params=["left", "right"])
def found(request):
    texts = [text[:3000] for text in load_sotu("unseen")[:3]]
    batches = batches_of(texts, padding_side=request.param)
    nats = {
        # As many bits as bytes, so that every passage has one bit per byte.
        "teacher": nats_of(batches, "teacher", byte_lengths(SIDES[1])),
        "student": nats_of(batches, "student", lambda ids: (ids % 7).double()),
        "student_before": nats_of(batches, "student", lambda ids: torch.full(ids.shape, 2.0)),
    }
    return texts, batches, nats, best_and_worst(nats, batches, SIDES[0])


def byte_lengths(own):
    def lengths(ids):
        sizes = [[len(own.decode([token]).encode()) for token in row] for row in ids.tolist()]
        return math.log(2) * torch.tensor(sizes, dtype=torch.float64)

    return lengths


def test_every_passage_is_the_text_with_the_bits_of_its_own_tokens(found):
    texts, _, _, passages = found
    shown = passages["best"] + passages["worst"]
    assert len(shown) == 2 * NUM_PASSAGES <= passages["compared"]
    for passage in shown:
        assert any(passage["text"] in text for text in texts)
        assert passage["bytes"] == len(passage["text"].encode()) and passage["baseline"] is None
        # Text in plain ASCII: each of the teacher's tokens has as many bits as bytes.
        assert passage["teacher"] == pytest.approx(1.0)
        ids = SIDES[0](passage["text"], add_special_tokens=False)["input_ids"]
        bits = [sum(values) / math.log(2) / passage["bytes"] for values in ([i % 7 for i in ids], [2] * len(ids))]
        assert (passage["student"], passage["student_before"]) == pytest.approx(tuple(bits), rel=0.02)


def test_passages_cover_the_scored_text_once_in_about_equal_parts(found, monkeypatch):
    texts, batches, nats, _ = found
    monkeypatch.setattr("distill_trainer.evaluation.passages.NUM_PASSAGES", 10**6)
    everything = best_and_worst(nats, batches, SIDES[0])["best"]
    assert sum(passage["bytes"] for passage in everything) == sum(int(b["scored_bytes"].sum()) for b in batches)
    assert len({passage["text"] for passage in everything}) == len(everything)
    sizes = [passage["bytes"] for passage in everything]
    assert PASSAGE_BYTES - 20 <= min(sizes) and max(sizes) < 2 * PASSAGE_BYTES + 20
    for role in ("student", "student_before"):
        total = sum(batch.sum().item() for batch in nats[role]) / math.log(2)
        assert sum(passage["bytes"] * passage[role] for passage in everything) == pytest.approx(total)


def test_best_is_where_the_student_is_nearest_to_its_teacher(found):
    passages = found[3]
    distances = [passage["student"] - passage["teacher"] for passage in (*passages["best"], *passages["worst"][::-1])]
    assert distances == sorted(distances) and distances[0] < distances[-1]
    assert passages["worst"][0]["student"] - passages["worst"][0]["teacher"] == distances[-1]


def test_few_passages_are_shown_once():
    batches = batches_of(TEXTS[:2])
    nats = {role: nats_of(batches, "student", lambda ids: ids.double()) for role in ROLES[:3]}
    nats["teacher"] = nats_of(batches, "teacher", lambda ids: ids.double())
    passages = best_and_worst(nats, batches, SIDES[0])
    assert passages["compared"] == len(passages["best"]) == 2 and passages["worst"] == []


def test_short_ends_of_text_do_not_win():
    batches = batches_of(["A b c.", load_sotu("unseen")[0][:600]])
    nats = {"student": nats_of(batches, "student", lambda ids: ids.double())}
    nats["teacher"] = nats_of(batches, "teacher", lambda ids: ids.double())
    passages = best_and_worst(nats, batches, SIDES[0])
    assert passages["compared"] == 2 and all(passage["bytes"] > 200 for passage in passages["best"])


def test_text_that_is_short_throughout_is_shown_all_the_same():
    batches = batches_of(["It was a day.", "So it was then."])
    nats = {"student": nats_of(batches, "student", lambda ids: ids.double())}
    nats["teacher"] = nats_of(batches, "teacher", lambda ids: ids.double())
    assert best_and_worst(nats, batches, SIDES[0])["compared"] == 2
