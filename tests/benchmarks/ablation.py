"""Held-out bits per byte of the demo's student under each way of mixing the teacher's experts.

    python tests/benchmarks/ablation.py [--field value ...]

The same as `python run_distillation.py configs/ablation.yaml`; flags are settings of every run. Results are files in
the output folder: what is there is not run again. Other teachers are made by native_teacher.py and merged_teacher.py
beside this file, and used as in `--teacher_model_name_or_path outputs/native_teacher --output_dir outputs/native`.
"""

import sys
from pathlib import Path

from run_distillation import main

if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(print(__doc__))
    sys.exit(main([str(Path(__file__).parents[2] / "configs" / "ablation.yaml"), *sys.argv[1:]]))
