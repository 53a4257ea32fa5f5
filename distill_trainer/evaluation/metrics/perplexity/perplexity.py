"""Perplexity from likelihoods that were already summed, per token or per word."""

import math

import datasets
import evaluate

_DESCRIPTION = """Exponential of the mean negative log-likelihood per unit.

perplexity      = exp(sum(nll) / sum(units)), where the units are counted by the caller: tokens, as a rule
word_perplexity = exp(sum(nll) / sum(words)), where the texts are given; words are what white space separates

With tokens as the unit the figure depends on the tokenizer and does not compare models with different ones;
with words as the unit it does, when the models are scored on the same text. Lower is better."""

_INPUTS = """
Args:
    predictions (list of float): negative log-likelihood of each text, summed over its tokens, in nats.
    references (list of float, or of str): units of each text, which may be fractional; or the texts.
Returns:
    perplexity (float); with texts word_perplexity (float)
"""


def perplexity(nll: float, num_units: float) -> float:
    """Exponential of `nll` nats over `num_units` units, infinite where a float cannot hold it.

    Raises:
        ValueError: If there are no units.
    """
    if num_units <= 0:
        raise ValueError(f"num_units must be above 0, got {num_units}. Score at least one non-empty text.")
    try:
        return math.exp(nll / num_units)
    except OverflowError:
        return math.inf


class Perplexity(evaluate.Metric):
    """`perplexity` over all added texts."""

    def _info(self):
        nats, units = datasets.Value("float64"), (datasets.Value("string"), datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=[datasets.Features({"predictions": nats, "references": unit}) for unit in units],
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """As `evaluate` does, which fails on a first batch without a row."""
        if predictions is not None and len(predictions) == 0:
            raise ValueError("predictions must hold the likelihood of at least one text, got none.")
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def _compute(self, predictions, references):
        words = isinstance(references[0], str)
        units = [len(text.split()) for text in references] if words else references
        for number, (nats, count) in enumerate(zip(predictions, units, strict=True)):
            if not nats >= 0:
                raise ValueError(f"Row {number} of predictions must be 0 nats or more, got {nats}.")
            if not count >= 0:
                raise ValueError(f"Row {number} of references must be 0 units or more, got {count}.")
        return {"word_perplexity" if words else "perplexity": perplexity(sum(predictions), sum(units))}
