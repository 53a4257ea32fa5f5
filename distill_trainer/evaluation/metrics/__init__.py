"""Metrics as `evaluate` modules: `evaluate.load(str(METRICS / name))` works offline, and each file stands alone."""

from pathlib import Path

METRICS = Path(__file__).parent
