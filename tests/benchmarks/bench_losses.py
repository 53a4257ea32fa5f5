"""Held-out bits per byte of the demo's student with each of the losses beside KL and LM, against KL and LM alone.

    python tests/benchmarks/bench_losses.py [--field value ...]

Pair, documents, batches, steps and flags are those of the ablation (ablation.py beside this file), the router is its
full one. Each loss has its weight of configs/reference_losses.yaml, and trains from the start unless the
variant says otherwise.
"""

import sys

from ablation import run

KL_AND_LM = "KL and LM"
WEIGHTS = {"feature_weight": 0.1, "attention_weight": 0.1, "layerwise_weight": 0.05, "contrastive_weight": 0.05}
PHASES = {"phase_boundaries": [0.1, 0.2]}
VARIANTS = {
    "text alone": {"kl_weight": 0.0, "lm_weight": 1.0},
    KL_AND_LM: {},
    **{f"with {name.removesuffix('_weight')}": {name: weight} for name, weight in WEIGHTS.items()},
    "all five": WEIGHTS,
    "all but feature": WEIGHTS | {"feature_weight": 0.0},
    "all five, in phases": WEIGHTS | PHASES,
    "all five, ema": WEIGHTS | {"loss_balancing": "ema"},
    "all five, gradient norms": WEIGHTS | {"loss_balancing": "gradient-norm"},
    "all five, in phases, ema": WEIGHTS | PHASES | {"loss_balancing": "ema"},
}

if __name__ == "__main__":
    changes = {"variants": VARIANTS, "reference": KL_AND_LM, "output_dir": "outputs/bench_losses"}
    sys.exit(run(__doc__, changes))
