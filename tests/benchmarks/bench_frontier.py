"""Held-out bits per byte against time: what the router is worth where the same minutes could train for longer.

    python tests/benchmarks/bench_frontier.py [--field value ...]

Each way of mixing the experts trains for the demo's number of steps, and, where a step of it is cheaper than that of
the best row, for as many steps as take about the same time. Pair, documents, batches and flags are those of the
ablation (ablation.py beside this file).
"""

import sys

from ablation import run

STEPS = 480
ALL = "all layers, every 4th step"
TEXT = {"kl_weight": 0.0, "lm_weight": 1.0}
OWN, LAST = {"use_router": False}, {"router_layers": "last", "final_top_k": 1}
# Time of a step relative to the own gate's, as the ablation measures it with two runs at a time.
TIME = {"text alone": 0.4, "own gate": 1.0, "last layer": 1.2, ALL: 1.4}
SETTINGS = {"text alone": TEXT, "own gate": OWN, "last layer": LAST, ALL: {}}
VARIANTS = {name: settings | {"max_steps": STEPS} for name, settings in SETTINGS.items()} | {
    f"{name}, same time": settings | {"max_steps": round(STEPS * TIME[ALL] / TIME[name])}
    for name, settings in SETTINGS.items()
    # The text alone has been learned by heart by then: 3.3 bits per byte behind as many steps.
    if name not in (ALL, "text alone")
}

if __name__ == "__main__":
    changes = {"variants": VARIANTS, "reference": ALL, "output_dir": "outputs/bench_frontier"}
    sys.exit(run(__doc__, changes))
