"""Held-out bits per byte of the demo's student under each way of comparing the logits, against the text alone.

    python tests/benchmarks/bench_kl_methods.py [--field value ...]

Pair, documents, batches, steps and flags are those of the ablation (ablation.py beside this file): KL and LM with the
full router of it, so that nothing else blurs the comparison. All methods have the weight 0.7 and the temperature
1, which were chosen for the first of them. The demo's student has the smaller vocabulary, so that the correction of
spans touches 0.06 % of its anchors: it cannot show here.
"""

import sys

from ablation import run

TEXT_ALONE = "text alone"
VARIANTS = {
    TEXT_ALONE: {"kl_weight": 0.0, "lm_weight": 1.0},
    "projected": {},
    "projected, no spans": {"span_correction": False},
    "projected, weighted by the gap": {"gap_weighting": True},
    "projected, reverse": {"kl_direction": "reverse"},
    "projected, js": {"kl_direction": "js"},
    "topk": {"kl_method": "topk"},
    "uld": {"kl_method": "uld"},
    "hybrid": {"kl_method": "hybrid"},
    "alm": {"kl_method": "alm"},
}

if __name__ == "__main__":
    changes = {"variants": VARIANTS, "reference": TEXT_ALONE, "output_dir": "outputs/bench_kl_methods"}
    sys.exit(run(__doc__, changes))
