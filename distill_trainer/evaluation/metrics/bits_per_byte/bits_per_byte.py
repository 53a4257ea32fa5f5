"""Bits per byte: the figure that compares language models with different tokenizers."""

import math

import datasets
import evaluate

_DESCRIPTION = """Negative log2-likelihood of a text over its length in UTF-8 bytes.

bits_per_byte = sum(nll) / (ln 2 * sum(bytes))

Every model that is compared must be scored on the same bytes. Lower is better."""

_INPUTS = """
Args:
    predictions (list of float): negative log-likelihood of each text, summed over its tokens, in nats.
    references (list of str, or of int): the text that each of these likelihoods covers, or its UTF-8 bytes.
Returns:
    bits_per_byte (float)
"""


def bits_per_byte(nll: float, num_bytes: int) -> float:
    """Negative log-likelihood in nats over `num_bytes` bytes, as bits per byte.

    Raises:
        ValueError: If there are no bytes.
    """
    if num_bytes < 1:
        raise ValueError(f"num_bytes must be at least 1, got {num_bytes}. Score at least one non-empty text.")
    return nll / (math.log(2) * num_bytes)


class BitsPerByte(evaluate.Metric):
    """`bits_per_byte` over all added texts."""

    def _info(self):
        # As int64 a fraction of a byte would be cut off before anyone sees it.
        nats, counts = datasets.Value("float64"), (datasets.Value("string"), datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="https://huggingface.co/papers/2101.00027 (section 3.1)",
            inputs_description=_INPUTS,
            features=[datasets.Features({"predictions": nats, "references": count}) for count in counts],
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """As `evaluate` does, which fails on a first batch without a row."""
        if predictions is not None and len(predictions) == 0:
            raise ValueError("predictions must hold the likelihood of at least one text, got none.")
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def _compute(self, predictions, references):
        sizes = [len(text.encode("utf-8")) if isinstance(text, str) else text for text in references]
        for number, (nats, size) in enumerate(zip(predictions, sizes, strict=True)):
            if not nats >= 0:
                raise ValueError(f"Row {number} of predictions must be 0 nats or more, got {nats}.")
            if not (size >= 0 and size % 1 == 0):
                raise ValueError(f"Row {number} of references must be a number of bytes, 0 or more, got {size}.")
        return {"bits_per_byte": bits_per_byte(sum(predictions), int(sum(sizes)))}
