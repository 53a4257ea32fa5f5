import copy
import json
import unicodedata
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from distill_trainer.alignment import VocabularyProjection, anchor_pairs, merge_ends, window_size
from distill_trainer.demo import train_tokenizer
from distill_trainer.errors import TokenizerError
from distill_trainer.tokens import NO_BOUNDARY, _normalization_ends, encode, token_bytes

BYTE_OF_CHARACTER = {character: byte for byte, character in bytes_to_unicode().items()}
TEXTS = {
    "english": "The dog doesn't mind; it's the fox's year. Does THE DOG jump?",
    "code": "def f(x):\n    return {k: v[0] for k, v in x.items()}\n\n\n    # 3.14e-5 != 0x1F\n\tprint('ok')\n",
    "cjk": "日本語の文章、中文的文字。漢字ｶﾀｶﾅ 한국어",
    "emoji with joiners": "👩‍🚀 and 👨‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪!",
    "composed": unicodedata.normalize("NFC", "Größe café naïve Ångström ế"),
    "decomposed": unicodedata.normalize("NFD", "Größe café naïve Ångström ế x"),
    "both forms": "caf\u00e9 cafe\u0301 caf\u00e9",
    "several marks": "a\u0301\u0323 x\u0301\u0300 q\u0307\u0323\u0301! z\u0335\u0336\u0337\u0338\u0301",
    "marks alone": "\u0301a \u0301\u0301",
    "marks without a class": "\u0f40\u0f73\u0300 A\u0f73\u0300 \u0f40\u0f74\u0f73",
    "excluded compositions": "\u0958\u0915\u093c \u2126 \u212b \uf900 \u0344",
    "hangul jamo": "\u1112\u1161\u11ab\u1100\u1173\u11af \u1112\u1161 \uac00\u11a8",
    "windows line ends": "one\r\ntwo\r\n\r\nthree\rfour\n",
    "blanks": "a  b   c\t\t d \n  \n   e    ",
    "blanks alone": "     ",
    "other blanks": "a\u00a0b\u2003c\u3000d\u200be",
    "digits": "1862 1,000,000 3.14 007 ١٢٣ ½",
    "looks special": "a <|endoftext|> b<|im_start|>user<|im_end|><think>x</think> <s></s>[UNK]<pad>",
    "empty": "",
    "one token": "a",
    "one character of many tokens": "\U0001f9ff",
}
# What random text seldom has, next to each other.
PIECES = [
    "\u0301",
    "\u0323",
    "\u0307",
    "e",
    "o",
    "é",
    "ệ",
    "\u1112",
    "\u1161",
    "\u11ab",
    "\uac00",
    "\u0f73",
    "\u0344",
] + [" ", "  ", "\r\n", "\n", "\t", "12", "'s", "the", " the", "<|endoftext|>", "\u200d", "👩", "漢", "\u0958"]
# Not U+FFFD, which the reference takes for a broken character, and nothing that SmolLM's vocabulary lacks.
CHARACTERS = st.characters(
    max_codepoint=0x3FFFF, exclude_categories=["Cs", "Cc"], exclude_characters="\ufffd", include_characters="\t\n\r"
)
RANDOM_TEXT = st.lists(st.sampled_from(PIECES) | CHARACTERS, max_size=14).map("".join)
PAIRS = [("student_tokenizer", "teacher_tokenizer"), ("teacher_tokenizer", "student_tokenizer")]
PAIRS += [("smollm_tokenizer", "qwen_tokenizer"), ("qwen_tokenizer", "smollm_tokenizer")]


@pytest.fixture(params=PAIRS, ids=lambda pair: "-".join(name.removesuffix("_tokenizer") for name in pair))
def pair(request):
    return tuple(request.getfixturevalue(name) for name in request.param)


def normalized(tokenizer, text):
    return text if tokenizer.backend_tokenizer.normalizer is None else unicodedata.normalize("NFC", text)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def prefixes(tokenizer, ids):
    """Decoded text of each prefix -> its last position."""
    return {tokenizer.decode(ids[: i + 1], clean_up_tokenization_spaces=False): i for i in range(len(ids))}


def expected_pairs(student, teacher, text):
    """Both sides have a prefix that decodes to the text up to a place where the text can be cut."""
    found = []
    student_prefixes, teacher_prefixes = (prefixes(side, ids_of(side, text)) for side in (student, teacher))
    for cut in range(1, len(text) + 1):
        head, tail = text[:cut], text[cut:]
        if all(
            normalized(side, head) + normalized(side, tail) == normalized(side, text) for side in (student, teacher)
        ):
            places = student_prefixes.get(normalized(student, head)), teacher_prefixes.get(normalized(teacher, head))
            if None not in places:
                found.append(places)
    return found


def assert_anchors_are_right(student, teacher, text):
    pairs = anchor_pairs(student, teacher, text)
    student_ids, teacher_ids = ids_of(student, text), ids_of(teacher, text)
    for i, j in pairs:
        student_text = student.decode(student_ids[: i + 1], clean_up_tokenization_spaces=False)
        teacher_text = teacher.decode(teacher_ids[: j + 1], clean_up_tokenization_spaces=False)
        assert unicodedata.normalize("NFC", student_text) == unicodedata.normalize("NFC", teacher_text)
    assert pairs == expected_pairs(student, teacher, text)
    if text:
        assert pairs[-1] == (len(student_ids) - 1, len(teacher_ids) - 1)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_every_anchor_pairs_equal_prefixes_and_none_is_missed(pair, text):
    assert_anchors_are_right(pair[0], pair[1], text)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=RANDOM_TEXT)
def test_anchors_of_random_unicode_are_right(pair, text):
    assert_anchors_are_right(pair[0], pair[1], text)


def test_most_positions_of_english_prose_are_anchors(smollm_tokenizer, qwen_tokenizer):
    text = "The committee will meet on Thursday to discuss the new budget, which nobody has read yet. " * 3
    pairs = anchor_pairs(smollm_tokenizer, qwen_tokenizer, text)
    assert len(pairs) > 0.9 * len(ids_of(smollm_tokenizer, text))


def ends_of_characters(tokenizer, text):
    """Positions up to which the tokens' own bytes are a prefix of the text, as far as a prefix can be cut off."""
    cuts = set()
    for cut in range(1, len(text) + 1):
        head, tail = normalized(tokenizer, text[:cut]), normalized(tokenizer, text[cut:])
        if head + tail == normalized(tokenizer, text):
            cuts.add(head.encode())
    contents = [bytes_of(token) for token in tokenizer.convert_ids_to_tokens(ids_of(tokenizer, text))]
    return [i for i in range(len(contents)) if b"".join(contents[: i + 1]) in cuts]


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("name", ["teacher_tokenizer", "student_tokenizer", "qwen_tokenizer", "smollm_tokenizer"])
def test_equal_tokenizers_pair_every_position_that_ends_a_character_with_itself(name, text, request):
    tokenizer = request.getfixturevalue(name)
    expected = ends_of_characters(tokenizer, text)
    assert anchor_pairs(tokenizer, tokenizer, text) == [(i, i) for i in expected]
    if text.isascii():
        assert len(expected) == len(ids_of(tokenizer, text))


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_ends_rise_and_close_with_the_text(pair, text):
    for tokenizer in pair:
        ids, ends = encode(tokenizer, text)
        inside = [end for end in ends if end != NO_BOUNDARY]
        assert len(ids) == len(ends)
        assert inside == sorted(set(inside))
        assert not text or ends[-1] == len(text)


def test_max_length_keeps_the_anchors_of_the_first_window(student_tokenizer, teacher_tokenizer):
    text = TEXTS["english"] + TEXTS["emoji with joiners"]
    ids, ends = encode(student_tokenizer, text)
    for max_length in (1, 5, len(ids) - 8, len(ids) - 1, len(ids), 10_000):
        size = window_size(ends, max_length)
        pairs = anchor_pairs(student_tokenizer, teacher_tokenizer, text, max_length)
        assert pairs == anchor_pairs(student_tokenizer, teacher_tokenizer, text[: ends[size - 1]])
        assert pairs[-1][0] == size - 1 < max_length


def test_a_window_ends_at_a_character():
    ends = [1, NO_BOUNDARY, NO_BOUNDARY, 2, 3]
    assert [window_size(ends, max_length) for max_length in (0, 1, 2, 3, 4, 5, 9)] == [0, 1, 1, 1, 4, 5, 5]
    assert window_size([NO_BOUNDARY, NO_BOUNDARY, 1], 2) == 0


def test_characters_that_the_vocabulary_lacks_belong_to_the_next_token(smollm_tokenizer, qwen_tokenizer):
    text = "one\x04 two\U00040000 three\x1d"
    ids, ends = encode(smollm_tokenizer, text)
    assert smollm_tokenizer.decode(ids[:1]) == "one"
    assert ends[0] == 3
    pairs = anchor_pairs(smollm_tokenizer, qwen_tokenizer, text)
    teacher_ids = ids_of(qwen_tokenizer, text)
    lost = str.maketrans("", "", "\x04\x1d\U00040000\ufffd")
    for i, j in pairs:
        assert smollm_tokenizer.decode(ids[: i + 1]).translate(lost) == qwen_tokenizer.decode(
            teacher_ids[: j + 1]
        ).translate(lost)
    assert len(pairs) >= 3
    assert encode(smollm_tokenizer, "\x04") == ([], [])


class CountingList(list):
    """A list that counts how often an element is read."""

    reads = 0

    def __getitem__(self, index):
        CountingList.reads += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("student_stride, teacher_stride", [(1, 1), (3, 2), (1, 50), (50, 1)])
def test_the_merge_reads_each_end_a_bounded_number_of_times(student_stride, teacher_stride):
    length = 3000
    student = CountingList(range(0, length, student_stride))
    teacher = CountingList(range(0, length, teacher_stride))
    CountingList.reads = 0
    pairs = merge_ends(student, teacher)
    assert 0 < CountingList.reads <= 2 * (len(student) + len(teacher))
    assert [student_stride * i for i, _ in pairs] == sorted(set(student) & set(teacher))


@pytest.mark.parametrize("unit", ["e\u0301", "é\u1112\u1161", "漢\u0344", "e" + "\u0301\u0323" * 2000])
def test_the_characters_that_are_normalised_grow_with_the_text_alone(unit):
    characters = 0

    def normalize(text):
        nonlocal characters
        characters += len(text)
        return unicodedata.normalize("NFC", text)

    normalizer = SimpleNamespace(normalize_str=normalize)
    tokenizer = SimpleNamespace(backend_tokenizer=SimpleNamespace(normalizer=normalizer))
    text = (unit * 4000)[:4000]
    composed, ends = _normalization_ends(tokenizer, text)
    assert composed == unicodedata.normalize("NFC", text)
    assert ends[len(composed)] == len(text)
    assert 0 < characters <= 12 * len(text)


def test_a_slow_tokenizer_is_refused_in_one_line(teacher_tokenizer):
    with pytest.raises(TokenizerError, match="Use a fast tokenizer") as error:
        anchor_pairs(ByT5Tokenizer(), teacher_tokenizer, "text")
    assert "\n" not in str(error.value)


def trained(model, trainer, *, pre_tokenizer=None, normalizer=None, decoder):
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    tokenizer.train_from_iterator(["the quick brown fox", "the lazy dog", "the other thing"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=trainer.special_tokens[0].content)


BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def sentence_piece_unigram():
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    pieces = pre_tokenizers.Metaspace()
    return trained(models.Unigram(), trainer, pre_tokenizer=pieces, decoder=decoders.Metaspace())


def sentence_piece_bpe():
    """Bars for blanks from the pre-tokenizer, bytes for what the vocabulary lacks."""
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<unk>", *BYTE_TOKENS], show_progress=False)
    decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    model = models.BPE(unk_token="<unk>", byte_fallback=True)
    return trained(model, trainer, pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoder)


def llama_2_bpe():
    """Bars for blanks from the normaliser, bytes for what the vocabulary lacks."""
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<unk>", *BYTE_TOKENS], show_progress=False)
    normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    model = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    return trained(model, trainer, normalizer=normalizer, decoder=decoder)


def word_piece():
    trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=["[UNK]"], show_progress=False)
    return trained(
        models.WordPiece(unk_token="[UNK]"),
        trainer,
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(prefix="##"),
    )


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("use", ["anchors", "projection"])
@pytest.mark.parametrize(
    "train, mark",
    [(sentence_piece_unigram, "\u2581"), (sentence_piece_bpe, "\u2581"), (llama_2_bpe, "\u2581"), (word_piece, "##")],
)
def test_a_tokenizer_that_is_not_byte_level_is_refused_in_one_line(train, mark, use, side, teacher_tokenizer):
    tokenizer = train()
    # It is of its kind, and works.
    assert any(token.startswith(mark) and len(token) > len(mark) for token in tokenizer.get_vocab())
    assert tokenizer.decode(ids_of(tokenizer, "the dog")) == "the dog"
    student, teacher = (tokenizer, teacher_tokenizer) if side == "student" else (teacher_tokenizer, tokenizer)
    with pytest.raises(TokenizerError, match="Only byte-level tokenizers can be aligned") as error:
        if use == "anchors":
            anchor_pairs(student, teacher, "text")
        else:
            VocabularyProjection.from_tokenizers(teacher, student, 500, 500)
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_changes_the_text_is_refused_in_one_line(student_tokenizer):
    changing = copy.deepcopy(student_tokenizer)
    changing.backend_tokenizer.normalizer = normalizers.Prepend("xy")
    with pytest.raises(TokenizerError, match="does not keep the bytes of the text") as error:
        encode(changing, "one two")
    assert "\n" not in str(error.value)


def bytes_of(token):
    return bytes(BYTE_OF_CHARACTER[character] for character in token)


def test_the_bytes_of_a_token_are_those_of_its_alphabet_or_its_own_text():
    assert token_bytes("Ġthe") == b" the"
    assert token_bytes("Ã©") == "é".encode()
    assert token_bytes("<a b>") == b"<a b>"


@pytest.fixture(scope="module")
def real_projection(qwen_tokenizer, smollm_tokenizer):
    return VocabularyProjection.from_tokenizers(qwen_tokenizer, smollm_tokenizer, 151_936, 49_152)


def byte_pair_encoding(tokenizer):
    """First token of a string of the byte alphabet, by the definition of the algorithm: lowest rank first."""
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    rank = {tuple(merge): i for i, merge in enumerate(merges)}
    vocabulary = tokenizer.get_vocab()

    def first(word):
        parts = [character for character in word if character in vocabulary]
        while len(parts) > 1:
            best = min(range(len(parts) - 1), key=lambda i: rank.get((parts[i], parts[i + 1]), len(rank)))
            if (parts[best], parts[best + 1]) not in rank:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        return vocabulary[parts[0]] if parts else -1

    return first


def test_every_real_token_maps_to_its_twin_and_to_the_first_token_of_its_own_encoding(
    real_projection, qwen_tokenizer, smollm_tokenizer
):
    mapped = real_projection.student_ids.tolist()
    special = {index for index, token in smollm_tokenizer.added_tokens_decoder.items() if token.special}
    twins = {bytes_of(t): i for t, i in smollm_tokenizer.get_vocab().items() if i not in special}
    first_of = byte_pair_encoding(smollm_tokenizer)
    texts, indices, counts = [], [], {"twin": 0, "piece": 0, "special": 0}
    for token, index in qwen_tokenizer.get_vocab().items():
        added = qwen_tokenizer.added_tokens_decoder.get(index)
        if added is not None and added.special:
            counts["special"] += 1
            continue
        content = bytes_of(token)
        if content in twins:
            counts["twin"] += 1
            assert mapped[index] == twins[content], token
        try:
            texts.append(content.decode())
            indices.append(index)
        except UnicodeDecodeError:
            counts["piece"] += 1
            assert mapped[index] == first_of(token), token
    encoded = smollm_tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for index, ids in zip(indices, encoded, strict=True):
        assert mapped[index] == (ids[0] if ids else -1)
    assert len(texts) + counts["piece"] + counts["special"] == len(qwen_tokenizer) == 151_669
    # 79.8 % of the student's tokens stand in the teacher's vocabulary.
    assert counts["special"] == 14 and counts["piece"] > 1000 and counts["twin"] > 0.79 * 49_152


def test_a_real_token_begins_with_the_token_that_it_maps_to(real_projection, qwen_tokenizer, smollm_tokenizer):
    mapped = real_projection.student_ids.tolist()
    student_tokens = smollm_tokenizer.convert_ids_to_tokens(list(range(49_152)))
    without = []
    for token, index in qwen_tokenizer.get_vocab().items():
        if index in qwen_tokenizer.all_special_ids:
            continue
        if mapped[index] < 0:
            without.append(bytes_of(token))
        else:
            assert bytes_of(token).startswith(bytes_of(student_tokens[mapped[index]]))
    # Bytes of no text and a few control characters are all that SmolLM cannot write.
    assert 0 < len(without) < 30
    assert all(len(content) == 1 for content in without)


def test_real_special_tokens_map_to_their_counterparts_and_rows_past_the_vocabulary_to_nothing(
    real_projection, qwen_tokenizer, smollm_tokenizer
):
    mapped = real_projection.student_ids
    # Qwen pads with end-of-text: the token of that name, not the other side's padding.
    assert qwen_tokenizer.pad_token == "<|endoftext|>" != smollm_tokenizer.pad_token
    shared = {"<|im_start|>", "<|im_end|>", "<|endoftext|>"}
    assert {qwen_tokenizer.eos_token, qwen_tokenizer.pad_token} <= shared
    assert mapped[qwen_tokenizer.eos_token_id] == smollm_tokenizer.eos_token_id
    for index, token in qwen_tokenizer.added_tokens_decoder.items():
        if token.special:
            own_name = smollm_tokenizer.convert_tokens_to_ids(token.content)
            assert mapped[index] == (own_name if token.content in shared else -1), token.content
    assert (mapped[len(qwen_tokenizer) :] == -1).all()
    assert len(mapped) == 151_936


ROLE_NAMES = {"eos_token": "<end>", "bos_token": "<start>", "pad_token": "<blank>", "unk_token": "<none>"}


def with_special_tokens(tokenizer, names):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens(names)
    return tokenizer


def test_special_tokens_of_other_names_map_by_role(teacher_tokenizer, student_tokenizer):
    teacher = with_special_tokens(teacher_tokenizer, ROLE_NAMES)
    student = with_special_tokens(student_tokenizer, {role: name.upper() for role, name in ROLE_NAMES.items()})
    mapped = VocabularyProjection.from_tokenizers(teacher, student, len(teacher), len(student)).student_ids
    for role, name in ROLE_NAMES.items():
        assert mapped[getattr(teacher, f"{role}_id")] == student.convert_tokens_to_ids(name.upper()), role


def test_end_of_text_maps_by_role_even_where_the_student_has_its_name_for_something_else(
    teacher_tokenizer, student_tokenizer
):
    teacher = with_special_tokens(teacher_tokenizer, {"eos_token": "<end>", "pad_token": "<blank>"})
    student = with_special_tokens(student_tokenizer, {"eos_token": "<blank>", "pad_token": "<end>"})
    mapped = VocabularyProjection.from_tokenizers(teacher, student, len(teacher), len(student)).student_ids
    assert mapped[teacher.eos_token_id] == student.eos_token_id
    # Any other goes by its name first.
    assert mapped[teacher.pad_token_id] == student.convert_tokens_to_ids("<blank>")


def test_the_projection_keeps_the_mass_of_real_tokens(real_projection, qwen_tokenizer):
    logits = torch.randn(3, 151_936, generator=torch.Generator().manual_seed(0)) * 4
    probs = logits.masked_fill(real_projection.student_ids < 0, -torch.inf).softmax(-1)
    projected = real_projection(probs)
    assert projected.shape == (3, 49_152)
    torch.testing.assert_close(projected.double().sum(-1), probs.double().sum(-1), atol=1e-6, rtol=0)
    # Padding rows may hold any logit: they get nothing, and change nothing.
    logits[:, len(qwen_tokenizer) :] = 50.0
    # Even where untrained padding holds nearly everything, only rounding is lost.
    torch.testing.assert_close(real_projection.log_probs(logits).exp(), projected, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def tiny_projection(teacher_tokenizer, student_tokenizer):
    return VocabularyProjection.from_tokenizers(
        teacher_tokenizer, student_tokenizer, len(teacher_tokenizer) + 7, len(student_tokenizer) + 3
    )


@pytest.mark.parametrize("name", ["teacher_tokenizer", "student_tokenizer", "qwen_tokenizer", "smollm_tokenizer"])
def test_equal_tokenizers_project_to_the_same_beliefs(name, request):
    tokenizer = request.getfixturevalue(name)
    size, rows = len(tokenizer), len(tokenizer) + 5
    projection = VocabularyProjection.from_tokenizers(tokenizer, tokenizer, rows, rows)
    assert projection.student_ids.tolist() == [*range(size), *[-1] * 5]
    probs = torch.rand(2, rows, generator=torch.Generator().manual_seed(3))
    probs[:, size:] = 0
    assert torch.equal(projection(probs), probs)
    assert projection.reachable.tolist() == [True] * size + [False] * 5


def test_rows_without_a_student_token_give_their_mass_to_none(tiny_projection):
    rows, real = len(tiny_projection.student_ids), tiny_projection.student_ids >= 0
    assert 0 < real.sum() == rows - 7
    projected = tiny_projection(torch.ones(rows))
    assert projected.tolist() == torch.bincount(tiny_projection.student_ids[real], minlength=len(projected)).tolist()


def test_log_probs_and_their_gradient_match_the_definition(tiny_projection):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 5, len(tiny_projection.student_ids), generator=generator)
    weights = torch.rand(2, 5, tiny_projection.student_vocab_size, generator=generator) * tiny_projection.reachable
    ours, reference = logits.clone().requires_grad_(), logits.double().requires_grad_()
    result = tiny_projection.log_probs(ours)
    (result * weights).sum().backward()
    probs = reference.exp() * (tiny_projection.student_ids >= 0)
    probs = probs / probs.sum(-1, keepdim=True)
    expected = torch.zeros((), dtype=torch.float64)
    for s in tiny_projection.reachable.nonzero()[:, 0].tolist():
        log_q = probs[..., tiny_projection.student_ids == s].sum(-1).log()
        torch.testing.assert_close(result[..., s].double(), log_q, atol=1e-5, rtol=1e-5)
        expected = expected + (log_q * weights[..., s]).sum()
    expected.backward()
    torch.testing.assert_close(ours.grad.double(), reference.grad, atol=1e-5, rtol=1e-4)
    assert ours.grad.abs().sum() > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_log_probs_and_gradients_stay_finite_for_extreme_logits(tiny_projection, dtype):
    logits = torch.randn(4, len(tiny_projection.student_ids), generator=torch.Generator().manual_seed(2)) * 3e3
    logits = logits.to(dtype).requires_grad_()
    result = tiny_projection.log_probs(logits)
    assert result.dtype == torch.float32
    assert result.isfinite().all()
    result.mean().backward()
    assert logits.grad.isfinite().all()
    assert (result[:, ~tiny_projection.reachable] == result.min()).all()


def test_special_tokens_never_stand_for_text_that_looks_like_them(teacher_tokenizer, student_tokenizer):
    teacher, student = copy.deepcopy(teacher_tokenizer), copy.deepcopy(student_tokenizer)
    teacher.add_tokens([AddedToken("<tool>", special=False, normalized=False), "plain"])
    teacher.add_tokens([AddedToken("<both>", special=True), AddedToken("<only>", special=True)], special_tokens=True)
    student.add_tokens([AddedToken("<tool>", special=True), AddedToken("<both>", special=True)], special_tokens=True)
    projection = VocabularyProjection.from_tokenizers(teacher, student, len(teacher), len(student))
    mapped = {t: int(projection.student_ids[i]) for t, i in teacher.get_vocab().items()}
    assert mapped["<tool>"] == student.convert_tokens_to_ids("<")
    assert mapped["plain"] == ids_of(student, "plain")[0]
    assert mapped["<both>"] == student.convert_tokens_to_ids("<both>")
    assert mapped["<only>"] == -1
    assert mapped["<|endoftext|>"] == student.eos_token_id


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_a_tokenizer_with_more_tokens_than_its_model_has_rows_is_refused(side, teacher_tokenizer, student_tokenizer):
    sizes = {"teacher": len(teacher_tokenizer), "student": len(student_tokenizer)}
    sizes[side] -= 1
    with pytest.raises(TokenizerError, match=f"The {side}'s tokenizer has .* Use the tokenizer that the") as error:
        VocabularyProjection.from_tokenizers(teacher_tokenizer, student_tokenizer, *sizes.values())
    assert "\n" not in str(error.value)


def test_an_added_token_that_repeats_another_maps_the_same_in_every_process():
    """Two tokens of the same bytes: the one of that spelling, else the one that the tokenizer itself would choose."""
    plain = train_tokenizer(["the the the then"], 300, like_qwen=False)
    doubled = train_tokenizer(["the the the then"], 300, like_qwen=False)
    doubled.add_tokens([AddedToken(" the", special=False)])
    added, regular = doubled.convert_tokens_to_ids(" the"), doubled.convert_tokens_to_ids("\u0120the")
    assert added != regular and added >= len(plain)
    sizes = len(doubled), len(doubled)
    same = VocabularyProjection.from_tokenizers(doubled, doubled, *sizes)
    assert torch.equal(same.student_ids, torch.arange(len(doubled)))
    other = VocabularyProjection.from_tokenizers(plain, doubled, *sizes).student_ids
    assert int(other[plain.convert_tokens_to_ids("\u0120the")]) == regular
