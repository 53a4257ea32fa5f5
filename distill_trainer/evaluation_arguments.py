"""Settings of how the report is measured."""

import re
from dataclasses import dataclass, field

from distill_trainer.errors import ConfigurationError
from distill_trainer.validation import check_number


@dataclass
class EvaluationArguments:
    """What is reported, and how it is measured: a part of `DistillationArguments`, documented by the help texts."""

    run_baseline: bool = field(
        default=False, metadata={"help": "Also train a copy of the student without a teacher, for the report."}
    )
    skip_eval: bool = field(default=False, metadata={"help": "Only train: no final evaluation and no report."})
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after this many evaluations in a row without a better one, 1 or above. None: never."},
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "Bits per byte by which an evaluation must be better to count, 0 or above."}
    )
    eval_stride: int | None = field(
        default=None,
        metadata={"help": "Student tokens that a window of the report scores, 1 to max_length. None: half of it."},
    )
    lm_eval_tasks: list[str] | None = field(
        default=None,
        metadata={"help": "Tasks of EleutherAI's harness for the report: names, or YAML files. None: no tasks."},
    )
    lm_eval_include_path: str | None = field(
        default=None, metadata={"help": "Folder with YAML files of further tasks. None: no further ones."}
    )
    lm_eval_limit: int | None = field(
        default=None, metadata={"help": "Examples of each task, the first ones, 1 or above. None: all."}
    )

    def check_best(
        self, *, load_best: bool, metric: str | None, greater_is_better: bool | None, eval_strategy: str
    ) -> None:
        """Raise a `ConfigurationError` unless the evaluations can tell the best checkpoint, where it is asked for.

        Args:
            load_best: `load_best_model_at_end`.
            metric: `metric_for_best_model`.
            greater_is_better: The setting of this name.
            eval_strategy: When training stops for an evaluation: no, steps or epoch.
        """
        name = "load_best_model_at_end" if load_best else "early_stopping_patience"
        if not load_best and self.early_stopping_patience is None:
            return
        if eval_strategy == "no":
            raise ConfigurationError(f"eval_strategy must be steps or epoch with {name}, got no.")
        # With several evaluation datasets their names stand in between.
        if metric is not None and not re.fullmatch(r"(eval_)?(\w+_)?(loss|bits_per_byte)", metric):
            raise ConfigurationError(
                f"metric_for_best_model must be eval_bits_per_byte or eval_loss with {name}, got {metric}."
            )
        if greater_is_better:
            raise ConfigurationError(f"greater_is_better must be false with {name}, got true. Fewer bits are better.")

    def check_evaluation(self, *, max_length: int) -> None:
        """Raise a `ConfigurationError` unless the settings can be used.

        Args:
            max_length: Student tokens in a window.
        """
        check_number("early_stopping_threshold", self.early_stopping_threshold, least=0)
        if self.early_stopping_patience is not None:
            check_number("early_stopping_patience", self.early_stopping_patience, least=1, whole=True)
        if self.eval_stride is not None:
            check_number("eval_stride", self.eval_stride, least=1, whole=True)
            if self.eval_stride > max_length:
                raise ConfigurationError(
                    f"eval_stride must be at most max_length, which is {max_length}, got {self.eval_stride}."
                )
        if self.lm_eval_limit is not None:
            check_number("lm_eval_limit", self.lm_eval_limit, least=1, whole=True)
        if self.lm_eval_tasks and self.skip_eval:
            raise ConfigurationError(
                f"lm_eval_tasks must be left out with skip_eval, got {' '.join(self.lm_eval_tasks)}."
            )
        for name in ("lm_eval_include_path", "lm_eval_limit"):
            if getattr(self, name) is not None and not self.lm_eval_tasks:
                raise ConfigurationError(
                    f"{name} must be left out without lm_eval_tasks, got {getattr(self, name)}. Name the tasks."
                )
