"""Whether the gap schedule finds out when distillation pays: against the text alone and against a fixed KL weight.

    python tests/benchmarks/bench_when_it_pays.py [--field value ...]

Three cases of the demo's student: the demo's teacher with much text that is read once; a teacher that knows little
more than the student, with the same; and that teacher with little text that is read many times. The schedule should
be never worse than the better of the others by more than noise. The weak teacher is made at the first run. Settings
and flags are those of the ablation (ablation.py beside this file), the router is its full one.
"""

import sys
from pathlib import Path

import torch
from ablation import run
from saving import CONFIG, save_whole
from transformers import AutoTokenizer, set_seed
from transformers.utils import logging

from distill_trainer.demo import ASSETS, dense_teacher, token_windows, train_language_model
from distill_trainer.documents import load_sotu

FOLDER = Path("outputs/bench_when_it_pays")
WEAK = FOLDER / "weak_teacher"
MUCH = {"dataset_subset_size": "null", "validation_fraction": 0.4, "max_steps": -1, "num_train_epochs": 1}
CASES = {
    "strong teacher, fresh text": MUCH,
    "weak teacher, fresh text": {"teacher_model_name_or_path": str(WEAK), **MUCH},
    "weak teacher, little text": {"teacher_model_name_or_path": str(WEAK), "max_steps": 480},
}
SCHEDULE = "gap schedule"
VARIANTS = {
    "text alone": {"kl_weight": 0.0, "lm_weight": 1.0},
    "fixed KL weight": {"gap_schedule": False},
    SCHEDULE: {},
}


def make_weak_teacher() -> None:
    """A dense model that reads a quarter of the addresses once, as the demo's student did."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "teacher")
    teacher = dense_teacher(len(tokenizer))
    windows = token_windows(tokenizer, load_sotu("teacher")[::4])
    train_language_model(teacher, windows, epochs=1, learning_rate=3e-3)
    save_whole(WEAK, teacher.to(torch.float16), tokenizer)


def main() -> int:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return 0
    if not (WEAK / CONFIG).is_file():
        logging.set_verbosity_warning()
        make_weak_teacher()
    for case, settings in CASES.items():
        print(f"\n{case}", flush=True)
        folder = FOLDER / case.replace(", ", "-").replace(" ", "_")
        changes = settings | {"variants": VARIANTS, "reference": SCHEDULE, "output_dir": str(folder)}
        if code := run(__doc__, changes):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
