"""The run's report as JSON, Markdown and HTML. It formats figures and computes none."""

from distill_trainer.report.build import write_report
from distill_trainer.report.compare import main
from distill_trainer.report.terminal import headline_table

__all__ = ["headline_table", "main", "write_report"]
