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
        nats, counts = datasets.Value("float64"), (datasets.Value("string"), datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="https://huggingface.co/papers/2101.00027 (section 3.1)",
            inputs_description=_INPUTS,
            features=[datasets.Features({"predictions": nats, "references": count}) for count in counts],
        )

    def _compute(self, predictions, references):
        num_bytes = sum(len(text.encode("utf-8")) if isinstance(text, str) else text for text in references)
        return {"bits_per_byte": bits_per_byte(sum(predictions), num_bytes)}
