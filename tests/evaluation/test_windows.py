import copy
import math

import pytest
import torch
from builders import tiny_llama, tiny_moe, tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distill_trainer.anchors import Anchors
from distill_trainer.errors import ConfigurationError, DataError
from distill_trainer.evaluation.measure import SIDES, evaluating, forward_logits, score_logits, scored_tokens
from distill_trainer.evaluation.metrics.perplexity.perplexity import perplexity
from distill_trainer.evaluation.windows import (
    EncodedDocument,
    checked_stride,
    document_prefix,
    document_windows,
    evaluation_batches,
    plan_spans,
    texts_hash,
)

TOKENIZERS = tokenizer("student"), tokenizer("teacher")
CPU = torch.device("cpu")
LONG = (
    "In the year 1862 the war had cost 1,000,000 dollars a day, and no end was near; the Treasury paid.\r\n"
    "Größe, café: 日本語の文章 👩‍🚀 and <|endoftext|> as plain text.  It is with great satisfaction that I report."
)
TEXTS = [LONG, "A short one, at last.", "x"]


def batches_of(texts=TEXTS, max_length=16, stride=6, batch_size=3, tokenizers=TOKENIZERS):
    return evaluation_batches(texts, *tokenizers, max_length=max_length, stride=stride, batch_size=batch_size)


def without_separators(tokenizer):
    """A copy that knows no special token, so that nothing can stand before a document."""
    plain = copy.deepcopy(tokenizer)
    plain.bos_token = plain.eos_token = None
    assert document_prefix(plain) == []
    return plain


def scores(model, batches, side):
    total = {"nll": 0.0, "bytes": 0, "tokens": 0}
    with evaluating(model):
        for batch in batches:
            for key, value in score_logits(forward_logits(model, batch, side), batch, side).items():
                total[key] += value
    return total


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    first=st.integers(0, 1),
    room=st.integers(2, 20),
    stride=st.integers(1, 20),
)
@example(lengths=[9, 9, 9], first=0, room=4, stride=4)
def test_each_boundary_is_scored_once_behind_context_in_windows_that_fit(lengths, first, room, stride):
    stride = min(stride, room)
    counts = [0]
    for length in lengths:
        counts.append(counts[-1] + length)
    done = first
    for span in plan_spans(counts, first, room=room, stride=stride):
        assert counts[span.end] - counts[span.start] <= room
        # A token before the first scored one, or the document's beginning with something before it.
        assert span.start < span.scored < span.end or span.start == span.scored == first == 0
        for skipped in range(done, span.scored):
            # Only what no window can hold together with the stretch before it.
            assert counts[skipped + 1] - counts[max(skipped - 1, 0)] > room
        scored, context = counts[span.end] - counts[span.scored], counts[span.scored] - counts[span.start]
        if span.scored > first:
            assert scored <= stride or span.end == span.scored + 1
            # No cut further to the left would have served.
            if span.start and span.scored - span.start > 1:
                longer = counts[span.scored] - counts[span.start - 1]
                assert longer > room - stride or longer + scored > room
            assert context <= room - stride or span.scored - span.start == 1
        done = span.end
    for skipped in range(done, len(counts) - 1):
        assert counts[skipped + 1] - counts[max(skipped - 1, 0)] > room


def test_with_a_cut_after_every_token_the_windows_are_those_of_the_guide():
    # As https://huggingface.co/docs/transformers/perplexity slides them.
    length, room, stride, expected, done = 50, 16, 6, [], 0
    for begin in range(0, length, stride):
        end = min(begin + room, length)
        expected.append((begin, done, end))
        done = end
        if end == length:
            break
    spans = plan_spans(range(length + 1), 0, room=room, stride=stride)
    assert [(span.start, span.scored, span.end) for span in spans] == expected


@pytest.mark.parametrize(("max_length", "stride"), [(16, 6), (16, 1), (16, 16), (12, 11), (400, 200)])
def test_every_byte_is_scored_once_and_the_same_on_both_sides(max_length, stride):
    batches, counted = batches_of(max_length=max_length, stride=stride)
    texts: dict[str, bytes] = {}
    for side, loaded in zip(SIDES, TOKENIZERS, strict=True):
        pieces = []
        for batch in batches:
            assert batch["input_ids"].shape[1] <= max_length
            mask, ids = scored_tokens(batch, side, CPU), batch[SIDES[side][0]]
            found = [loaded.decode(row[kept]).encode() for row, kept in zip(ids, mask, strict=True)]
            assert [len(piece) for piece in found] == batch["scored_bytes"].tolist()
            pieces += found
        texts[side] = b"".join(pieces)
    assert texts["student"] == texts["teacher"] == "".join(TEXTS).encode()
    assert counted["scored_bytes"] == counted["eval_bytes"] == len(texts["student"])
    assert counted["eval_documents"] == 3 and set(counted["dropped"].values()) == {0}


@pytest.mark.parametrize("side", SIDES)
def test_a_token_is_scored_under_the_true_text_before_it(side):
    model = {"student": tiny_llama, "teacher": tiny_moe}[side]()
    loaded = TOKENIZERS[list(SIDES).index(side)]
    index = list(SIDES).index(side)
    total = scores(model, batches_of()[0], side)
    nll, tokens = 0.0, 0
    for text in TEXTS:
        document = EncodedDocument.of(text, *TOKENIZERS)
        ids = (document.student_ids, document.teacher_ids)[index]
        cuts = [boundary[index] for boundary in document.boundaries]
        counts = [student for student, _ in document.boundaries]
        for span in plan_spans(counts, 0, room=15, stride=6):
            before = [loaded.eos_token_id] if span.start == 0 else []
            for token in range(cuts[span.scored], cuts[span.end]):
                context = before + ids[cuts[span.start] : token]
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([context])).logits[0, -1].double()
                nll -= logits.log_softmax(dim=-1)[ids[token]].item()
                tokens += 1
    assert total["tokens"] == tokens == sum(len(loaded.tokenize(text, split_special_tokens=True)) for text in TEXTS)
    assert total["nll"] == pytest.approx(nll, rel=1e-5)


def test_the_strided_perplexity_is_that_of_the_guides_loop():
    loaded = without_separators(tokenizer("student"))
    model, max_length, stride = tiny_llama(), 16, 6
    ids = loaded("The Congress of the United States shall provide for the general welfare. " * 3)["input_ids"]
    text = loaded.decode(ids)
    nll, count, previous_end = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        window = torch.tensor([ids[begin:end]])
        labels = window.clone()
        labels[:, : previous_end - begin if begin else 0] = -100
        with torch.no_grad():
            loss = model(input_ids=window, labels=labels).loss
        # The model shifts: a window's first token has no prediction.
        predicted = int((labels[:, 1:] != -100).sum())
        nll, count, previous_end = nll + loss.item() * predicted, count + predicted, end
        if end == len(ids):
            break
    batches, counted = batches_of([text], max_length, stride, tokenizers=(loaded, loaded))
    found = scores(model, batches, "student")
    assert found["tokens"] == count == len(ids) - 1
    assert perplexity(found["nll"], found["tokens"]) == pytest.approx(math.exp(nll / count), rel=1e-5)
    # Nothing predicts the first token, so its bytes do not count either.
    assert counted["eval_bytes"] - counted["scored_bytes"] == len(loaded.decode(ids[:1]).encode())


def test_where_one_side_has_nothing_to_put_before_a_document_no_model_is_asked_for_its_first_token():
    pair = TOKENIZERS[0], without_separators(TOKENIZERS[1])
    batches, counted = batches_of([LONG], tokenizers=pair)
    for side, loaded in zip(SIDES, pair, strict=True):
        kept = [
            loaded.decode(row[mask])
            for batch in batches
            for row, mask in zip(batch[SIDES[side][0]], scored_tokens(batch, side, CPU), strict=True)
        ]
        assert "".join(kept) == LONG[2:]
        assert counted["scored_bytes"] == len(LONG[2:].encode())


def test_context_lowers_what_repeated_text_costs():
    """A model that copies: certain of a token that it has read before, ignorant of the others."""

    def bits(stride):
        counted = 0
        for batch in batches_of(["one two three four five six seven eight " * 4], 24, stride)[0]:
            mask = scored_tokens(batch, "student", CPU)
            for row, kept in zip(batch["input_ids"], mask, strict=True):
                seen = [set(row[:position].tolist()) for position in range(len(row))]
                counted += sum(row[n].item() not in seen[n] for n in kept.nonzero()[:, 0].tolist())
        return counted

    assert bits(4) < bits(12) < bits(24)


def test_each_anchor_that_a_token_follows_is_met_once():
    batches, _ = batches_of()
    anchors = sum(len(EncodedDocument.of(text, *TOKENIZERS).boundaries) - 1 for text in TEXTS)
    # Every document's beginning counts, its end does not.
    assert sum(len(Anchors.of(batch)) for batch in batches) == anchors
    for batch in batches:
        assert (batch["window_anchor_mask"] | ~batch["anchor_mask"]).all()
        assert batch["window_bytes"].ge(batch["scored_bytes"]).all()
    assert sum(int(batch["window_anchor_mask"].sum()) for batch in batches) > 2 * anchors


def test_a_tokenizers_own_beginning_stands_before_every_window():
    loaded = copy.deepcopy(tokenizer("student"))
    loaded.bos_token_id = 5
    document = EncodedDocument.of(LONG, loaded, loaded)
    counts = [student for student, _ in document.boundaries]
    rows = document_windows(document, ([5], [5], [5], [5]), plan_spans(counts, 0, room=15, stride=6))
    assert len(rows) > 3 and all(row["input_ids"][0] == row["teacher_input_ids"][0] == 5 for row in rows)
    assert rows[0]["student_positions"][0] == 0 and rows[1]["student_positions"][0] == 1
    assert document_prefix(loaded) == [5]


def test_the_hash_is_that_of_the_documents_in_their_order_and_with_their_ends():
    others = [["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"], ["ab", "d"], ["ab", "c", ""], ["\ud800"]]
    assert len({texts_hash(texts) for texts in others}) == len(others)
    assert batches_of()[1]["eval_sha256"] == texts_hash(list(TEXTS)) == batches_of(max_length=32)[1]["eval_sha256"]


def test_bytes_between_cuts_too_far_apart_are_not_scored_and_a_length_that_fits_nothing_is_to_blame():
    scored = {length: batches_of([LONG], length, 1)[1]["scored_bytes"] for length in (3, 4, 8)}
    assert 0 < scored[3] < scored[4] < scored[8] == len(LONG.encode())
    with pytest.raises(
        ConfigurationError, match="max_length must be larger to score the held-out text, got 1: no win"
    ):
        batches_of([LONG], 1, 1)
    # The same where nothing stands before a document.
    with pytest.raises(ConfigurationError, match="max_length must be larger to score"):
        batches_of([LONG], 1, 1, tokenizers=tuple(map(without_separators, TOKENIZERS)))


@pytest.mark.parametrize("stride", [0, -1, 17])
def test_a_stride_that_leaves_text_out_is_refused(stride):
    with pytest.raises(
        ConfigurationError, match=f"eval_stride must be from 1 to max_length, which is 16, got {stride}"
    ):
        checked_stride(stride, 16)
    assert [checked_stride(None, length) for length in (16, 3, 1)] == [8, 1, 1]


def test_documents_without_text_are_counted_and_texts_that_nothing_can_score_are_refused():
    assert batches_of(["", LONG])[1]["dropped"] == {"empty_documents": 1, "short_windows": 0}
    pair = tuple(map(without_separators, TOKENIZERS))
    assert batches_of(["a", LONG], tokenizers=pair)[1]["dropped"] == {"empty_documents": 0, "short_windows": 1}
    with pytest.raises(DataError, match="None of the 1 documents holds text that can be scored"):
        batches_of(["a"], tokenizers=pair)
