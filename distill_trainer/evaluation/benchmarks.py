"""Benchmarks that people know, or tasks from local files, by EleutherAI's evaluation harness, `lm_eval`.

https://github.com/EleutherAI/lm-evaluation-harness
"""

import copy
import difflib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import yaml
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from packaging.version import Version
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from distill_trainer.errors import ConfigurationError
from distill_trainer.evaluation.measure import evaluating

logger = logging.get_logger(__name__)

MINIMUM_VERSION = "0.4.13"
# What a task file or its data can fail with, read by the harness.
TASK_ERRORS = (
    *(LookupError, OSError, ValueError, TypeError, AttributeError, ImportError, SyntaxError),
    *(RuntimeError, ArithmeticError, AssertionError, yaml.YAMLError, TemplateError, DatasetsError),
)
OFFLINE = "Connect once, so that its data are kept, or name a task whose data are local files."


class Benchmarks:
    """Tasks of the harness, loaded with their data, so that what cannot run fails before anything is trained.

    Args:
        tasks: Names of tasks, groups or tags of the harness (`lm-eval ls tasks` lists them), or paths of YAML files.
        include_path: Folder with YAML files of further tasks. None: no further ones.
        limit: Examples of each task, the first ones; None takes all, as published figures do.

    Raises:
        ConfigurationError: If `lm_eval` is missing or too old, the folder does not exist, or a task cannot be loaded.
    """

    def __init__(self, tasks: Sequence[str], include_path: str | None = None, limit: int | None = None):
        try:
            self.harness = version("lm_eval")
        except PackageNotFoundError:
            self.harness = ""
        if not self.harness or Version(self.harness) < Version(MINIMUM_VERSION):
            raise ConfigurationError(
                f"lm_eval_tasks needs lm_eval {MINIMUM_VERSION} or newer, got {self.harness or 'none installed'}. "
                'Install it with pip install "distill_trainer[lm_eval]", or leave lm_eval_tasks out.'
            )
        if include_path is not None and not Path(include_path).is_dir():
            raise ConfigurationError(f"lm_eval_include_path must be a folder with task files, got {include_path}.")
        from lm_eval.tasks import TaskManager

        self.tasks, self.limit = list(tasks), limit
        self.manager = TaskManager(include_path=include_path)
        for task in self.tasks:
            self._check(task)

    def _check(self, task: str) -> None:
        if task not in self.manager.all_tasks and not Path(task).is_file():
            nearest = difflib.get_close_matches(task, self.manager.all_tasks, n=1, cutoff=0.0)[0]
            raise ConfigurationError(
                f"lm_eval_tasks must name tasks of the harness or of lm_eval_include_path, got {task}. "
                f"The nearest is {nearest}."
            )
        try:
            # With its data, of which the harness fills the first document into the templates.
            loaded = self.manager.load([task])["tasks"]
        except TASK_ERRORS as error:
            raise ConfigurationError(f"lm_eval_tasks: the task {task} cannot be loaded: {_reason(error)}") from error
        for name, found in loaded.items():
            if unknown := _unknown_metrics(found):
                raise ConfigurationError(
                    f"lm_eval_tasks: the task {name} must be measured by metrics and aggregations that the harness or "
                    f"evaluate has, got {', '.join(unknown)}. Correct metric_list in its file."
                )

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> dict[str, Any]:
        """What the harness returns for one model, on the device and in the dtype that the model has."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with evaluating(model):
            # The harness gives a tokenizer without one a padding token.
            wrapped = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
            # Without its seeds, which would be those of the whole process.
            return simple_evaluate(
                wrapped,
                tasks=self.tasks,
                task_manager=self.manager,
                limit=self.limit,
                log_samples=False,
                random_seed=None,
                numpy_random_seed=None,
                torch_random_seed=None,
            )

    def table(self, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The report's `benchmarks`.

        Args:
            results: What `run` returned for each model, by its role.

        Returns:
            `harness` (its version), `limit`, `rows`, see `benchmark_rows`, and `unscored`, the tasks without a row.
        """
        rows, tasks = benchmark_rows(results), next(iter(results.values()))["n-samples"]
        unscored = [task for task in tasks if task not in {row["task"] for row in rows}]
        if unscored:
            logger.warning(f"The harness gave no score for {', '.join(unscored)}: see the metric_list of each.")
        return {"harness": self.harness, "limit": self.limit, "rows": rows, "unscored": unscored}


def _reason(error: Exception) -> str:
    """Why a task cannot be loaded, on one line."""
    reason = " ".join(str(error).split())[:200]
    if isinstance(error, ConnectionError):
        return f"{reason}. {OFFLINE}"
    # A mapping names the missing key alone: as a rule a split.
    missing = isinstance(error, KeyError) and " " not in reason
    return f"there is no {reason} in its data or its file. Correct the split or key there." if missing else reason


def _unknown_metrics(task: Any) -> list[str]:
    """Metrics of a loaded task that the harness would pass over, or that it could not sum up."""
    own = getattr(task.config, "process_results", None)
    # The harness holds None for a metric that it has not found, but also for all where the task measures by itself.
    tables = ({} if own else getattr(task, "_metric_fn_list", {})), task.aggregation()
    absent = {name for functions in tables for name, function in functions.items() if function is None}
    return sorted(absent - {"bypass"})


def load_benchmarks(
    tasks: Sequence[str] | None, include_path: str | None = None, limit: int | None = None
) -> Benchmarks | None:
    """`Benchmarks`, or None without tasks."""
    return Benchmarks(tasks, include_path, limit) if tasks else None


def benchmark_rows(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each metric of each task.

    Args:
        results: What `simple_evaluate` returned for each model on the same tasks, by the model's role.

    Returns:
        `task`, its `version`, `metric`, `filter`, `higher_is_better` (None where the harness does not say),
        `num_fewshot` and `samples`; and `scores`, by role: `value` and `stderr` (None where there is none).
    """
    first, rows = next(iter(results.values())), []
    for task, scores in first["results"].items():
        for key, value in scores.items():
            metric, _, name = key.partition(",")
            if not name or metric.endswith("_stderr") or _plain(value) is None:
                continue
            rows.append(
                {
                    "task": task,
                    "version": first["versions"].get(task),
                    "metric": metric,
                    "filter": name,
                    "higher_is_better": first["higher_is_better"].get(task, {}).get(metric),
                    "num_fewshot": first["n-shot"].get(task),
                    "samples": first["n-samples"].get(task, {}).get("effective"),
                    "scores": {role: _score(found["results"][task], metric, name) for role, found in results.items()},
                }
            )
    return rows


def _score(scores: dict[str, Any], metric: str, name: str) -> dict[str, float | None]:
    # The standard error is N/A where the harness knows none.
    return {"value": _plain(scores[f"{metric},{name}"]), "stderr": _plain(scores.get(f"{metric}_stderr,{name}"))}


def _plain(value: Any) -> float | int | None:
    """A number of any library as Python's own, since a scalar of numpy cannot go into a model card; else None."""
    if not isinstance(value, Real):
        return None
    return int(value) if isinstance(value, Integral) else float(value)
