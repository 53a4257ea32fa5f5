"""Held-out bits per byte of the demo's student with each of the losses beside KL and LM, against KL and LM alone.

    python tests/benchmarks/bench_losses.py [--field value ...]

Pair, documents, batches, steps and flags are those of the ablation (ablation.py beside this file), the router is that
of its best row. Each loss has its default weight, and trains from the start unless the variant says otherwise.
"""

import sys

from ablation import BEST, run

KL_AND_LM = "KL and LM"
DEFAULTS = {"feature_weight": 0.1, "attention_weight": 0.1, "layerwise_weight": 0.05, "contrastive_weight": 0.05}
FROM_THE_START = {"phase_boundaries": [0.0, 0.0]}
ALL = DEFAULTS | FROM_THE_START
VARIANTS = {
    "text alone": {"kl_weight": 0.0, "lm_weight": 1.0},
    KL_AND_LM: {},
    **{f"with {name.removesuffix('_weight')}": {name: DEFAULTS[name], **FROM_THE_START} for name in DEFAULTS},
    "all five": ALL,
    "all five, in phases": DEFAULTS,
    "all five, ema": ALL | {"loss_balancing": "ema"},
    "all five, gradient norms": ALL | {"loss_balancing": "gradient-norm"},
    "all five, in phases, ema": DEFAULTS | {"loss_balancing": "ema"},
}

if __name__ == "__main__":
    changes = BEST | {"variants": VARIANTS, "reference": KL_AND_LM, "output_dir": "outputs/bench_losses"}
    sys.exit(run(__doc__, changes))
