"""Held-out bits per byte of the demo's student under each way of mixing the teacher's experts.

    python tests/benchmarks/ablation.py [--field value ...]

The same as `python run_distillation.py configs/ablation.yaml`; flags are settings of every run. Results are files in
the output folder: what is there is not run again. A teacher whose gate was learned with its experts is made by
native_teacher.py beside this file, and used as in `--teacher_model_name_or_path outputs/native_teacher --output_dir
outputs/native`.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from run_distillation import main

CONFIG = Path(__file__).parents[2] / "configs" / "ablation.yaml"
# What this table found to be best, for the tables that ask about something else.
BEST = {"gap_weighting": False, "router_interval": 4}


def run(document: str, changes: dict[str, Any]) -> int:
    """Run the ablation with some keys of its file changed, and the flags of the command line; gives the exit code."""
    if {"-h", "--help"} & set(sys.argv):
        print(document)
        return 0
    # Plain text, as the ablation reads it, so that a number stays spelled as in the file.
    content = yaml.load(CONFIG.read_text(encoding="utf-8"), Loader=yaml.BaseLoader) | changes
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG.name
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return main([str(path), *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(run(__doc__, {}))
