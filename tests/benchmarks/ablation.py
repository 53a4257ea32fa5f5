"""Held-out bits per byte of the demo's student under each way of mixing the teacher's experts.

    python tests/benchmarks/ablation.py [--field value ...]

The same as `python run_distillation.py configs/ablation.yaml`; flags are settings of every run. Results are files in
the output folder: what is there is not run again. The numbers of experts in the file are those of the demo's teacher,
so for another one change the file; bench_native.py beside this one asks about a teacher whose gate was learned.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from run_distillation import main

CONFIG = Path(__file__).parents[2] / "configs" / "ablation.yaml"


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
