"""The tokens of a byte-level tokenizer: which bytes they stand for, and where in a text each of them ends."""

import unicodedata

from tokenizers.normalizers import Normalizer
from transformers import PreTrainedTokenizerBase

from distill_trainer.errors import TokenizerError

# The alphabet of byte-level vocabularies (GPT-2): printable Latin-1 bytes are themselves, the rest follow from 256.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
CHARACTER_OF_BYTE = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(OTHERS)}
BYTE_OF_CHARACTER = {character: byte for byte, character in CHARACTER_OF_BYTE.items()}
NO_BOUNDARY = -1
# More marks than any language puts on one character (Stream-Safe Text Format, Unicode Standard Annex 15).
LONGEST_GROUP = 31


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Token ids of a text, and where in the text each token ends.

    No special tokens are added, and text that looks like one is plain text. Ends are counted in characters of the
    original text, whatever the tokenizer normalises. They come from the tokens' own bytes, because reported offsets
    leave out characters that a normaliser composed, and blanks that a post-processor trims.

    Args:
        tokenizer: A fast tokenizer with a byte-level vocabulary.
        text: Any text.

    Returns:
        Ids and ends, equally long. An end is -1 where the tokens up to there do not hold exactly a prefix of the text:
        inside a character, or inside characters that the tokenizer normalises together. A character that the
        tokenizer leaves out, because its vocabulary lacks the byte (0x04 in SmolLM's), belongs to the next token.

    Raises:
        TokenizerError: If the tokenizer gives no offsets, is not byte-level, or changes the text.
    """
    check_byte_level(tokenizer)
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    normalized, ends = _normalization_ends(tokenizer, text)
    # Byte offset in the normalised text -> character offset in the original.
    end_at_byte: dict[int, int] = {}
    position, lost = 0, _lost_bytes(tokenizer)
    for index, character in enumerate(normalized, 1):
        position += len(character.encode("utf-8").translate(None, lost))
        if index in ends:
            end_at_byte.setdefault(position, ends[index])
    token_ends, consumed = [], 0
    for token in tokenizer.convert_ids_to_tokens(ids):
        consumed += len(token_bytes(token))
        token_ends.append(end_at_byte.get(consumed, NO_BOUNDARY))
    if consumed != position:
        raise TokenizerError(
            f"The tokenizer {type(tokenizer).__name__} does not keep the bytes of the text: {position} bytes went in, "
            f"{consumed} came out. Use a tokenizer that decodes to what it encoded."
        )
    return ids, token_ends


def token_bytes(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary stands for. An added token stands for its own text."""
    if all(character in BYTE_OF_CHARACTER for character in token):
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    return token.encode("utf-8")


def _lost_bytes(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """Bytes without a token, which the tokenizer silently leaves out of a text."""
    find = tokenizer.backend_tokenizer.token_to_id
    return bytes(byte for byte, character in CHARACTER_OF_BYTE.items() if find(character) is None)


def check_byte_level(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a `TokenizerError` unless it is a fast tokenizer whose tokens are written in the byte-level alphabet."""
    name = type(tokenizer).__name__
    if not tokenizer.is_fast:
        raise TokenizerError(
            f"The tokenizer {name} gives no offsets, so its tokens cannot be aligned with text. Use a fast tokenizer "
            "(one with a tokenizer.json)."
        )
    decoder = tokenizer.backend_tokenizer.decoder
    if decoder is None or b'"ByteLevel"' not in decoder.__getstate__():
        raise TokenizerError(
            f"The tokenizer {name} is not byte-level (as those of GPT-2, Llama 3, Qwen and SmolLM are). "
            "Only byte-level tokenizers can be aligned."
        )


def _normalization_ends(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, dict[int, int]]:
    """The text as the tokenizer normalises it, and which of its prefixes are those of which original prefixes.

    Returns:
        The normalised text, and a map from lengths of its prefixes to lengths of the original's, in characters.
    """
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is None or normalizer.normalize_str(text) == text:
        return text, {length: length for length in range(1, len(text) + 1)}
    ends, pieces, length, start = {}, [], 0, 0
    for stop in range(1, len(text) + 1):
        group = text[start:stop]
        if stop < len(text) and _joins(normalizer, group, text[stop]):
            continue
        pieces.append(normalizer.normalize_str(group))
        for cut in range(1, len(group)) if len(group) <= LONGEST_GROUP else ():
            head = normalizer.normalize_str(group[:cut])
            if head + normalizer.normalize_str(group[cut:]) == pieces[-1]:
                ends[length + len(head)] = start + cut
        length += len(pieces[-1])
        ends[length] = stop
        start = stop
    return "".join(pieces), ends


def _joins(normalizer: Normalizer, group: str, following: str) -> bool:
    """Whether a character combines with the ones before it, or normalises differently behind them."""
    if following.isascii():
        return False
    if unicodedata.combining(unicodedata.normalize("NFD", following)[0]):
        return True
    normalize = normalizer.normalize_str
    return normalize(group + following) != normalize(group) + normalize(following)
