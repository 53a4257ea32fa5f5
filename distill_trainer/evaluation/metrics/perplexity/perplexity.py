"""Perplexity from likelihoods that were already summed, per token or per word."""

import math

import datasets
import evaluate

_DESCRIPTION = """Exponential of the mean negative log-likelihood per unit.

perplexity = exp(sum(nll) / sum(units))

With tokens as the unit the figure depends on the tokenizer and does not compare models with different ones;
with words as the unit it does, when the models are scored on the same text. Lower is better."""

_INPUTS = """
Args:
    predictions (list of float): negative log-likelihood of each text, summed over its tokens, in nats.
    references (list of float): units (tokens or words) of each text. May be fractional.
Returns:
    perplexity (float)
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
        features = {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references):
        return {"perplexity": perplexity(sum(predictions), sum(references))}
