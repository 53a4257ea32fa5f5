"""What the router makes of a teacher whose gate was learned with its experts, and of that teacher's student.

    python tests/benchmarks/bench_native.py [--field value ...]

The teacher is that of native_teacher.py beside this file (8 experts, 2 per token), which runs first. Student,
documents, batches and steps are those of the ablation (ablation.py). Such a gate leaves little to win: the router
should harm neither the teacher nor the student.
"""

import sys
from pathlib import Path

from ablation import run

TEACHER = Path("outputs/native_teacher")
OWN = "teacher's own gate"
GATES_K = {"initial_top_k": 2, "final_top_k": 2}
LAST = {"router_layers": "last"}
VARIANTS = {
    OWN: {"use_router": False},
    "last layer": LAST | GATES_K,
    "last layer, k 1 to 3": LAST,
    "all layers": GATES_K,
}


def main() -> int:
    if not (TEACHER / "config.json").is_file() and not {"-h", "--help"} & set(sys.argv):
        print(f"error: {TEACHER} has no model. Run python tests/benchmarks/native_teacher.py first.", file=sys.stderr)
        return 2
    changes = {"variants": VARIANTS, "reference": OWN, "output_dir": "outputs/bench_native"}
    return run(__doc__, {"teacher_model_name_or_path": str(TEACHER)} | changes)


if __name__ == "__main__":
    sys.exit(main())
