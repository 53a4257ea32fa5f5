"""Settings of what goes in: which models, and which text."""

from dataclasses import dataclass, field

from distill_trainer.errors import ConfigurationError
from distill_trainer.validation import check_choice, check_flags, check_number


@dataclass
class ModelArguments:
    """Which teacher and which student. The help text of each field is its documentation."""

    teacher_model_name_or_path: str = field(
        default="huihui-ai/Huihui-MoE-1B-A0.6B",
        metadata={"help": "Teacher: a causal language model, as a name on the Hub or a folder."},
    )
    student_model_name_or_path: str = field(
        default="HuggingFaceTB/SmolLM-135M",
        metadata={"help": "Student: a causal language model, as a name on the Hub or a folder."},
    )
    teacher_dtype: str = field(
        default="auto",
        metadata={"help": "Type of the teacher's weights: float32, float16, bfloat16, or auto (as saved)."},
    )
    student_init: str = field(
        default="pretrained",
        metadata={"help": "pretrained loads the student's weights; random draws new ones for its configuration."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the Python code that a model's repository brings along."}
    )

    def __post_init__(self) -> None:
        check_flags(self)
        check_choice("teacher_dtype", self.teacher_dtype, ("float32", "float16", "bfloat16", "auto"))
        check_choice("student_init", self.student_init, ("pretrained", "random"))


@dataclass
class DataArguments:
    """Which text. The help text of each field is its documentation."""

    datasets: list[str] = field(
        default_factory=lambda: ["wikitext"],
        metadata={
            "help": "One or more datasets: names on the Hub, or local text, JSONL and Parquet files or folders."
        },
    )
    dataset_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Share of each dataset in the mixture, above 0, one each. None: all documents once."},
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the text of a document."})
    dataset_subset_size: int | None = field(
        default=None, metadata={"help": "Use this many documents of the mixture, 1 or above. None: all."}
    )
    validation_fraction: float = field(
        default=0.05,
        metadata={"help": "Share of the documents that is held out for evaluation, above 0 and below 1."},
    )
    streaming: bool = field(default=False, metadata={"help": "Read the datasets while training, without a download."})
    use_dynamic_batching: bool = field(
        default=False,
        metadata={"help": "Batch windows of similar length: train_sampling_strategy=group_by_length."},
    )

    def __post_init__(self) -> None:
        check_flags(self)
        if not self.datasets or not all(name.strip() for name in self.datasets):
            raise ConfigurationError(f"datasets must name at least one dataset, got {self.datasets}.")
        if self.dataset_weights is not None:
            if len(self.dataset_weights) != len(self.datasets):
                raise ConfigurationError(
                    f"dataset_weights must have one value for each of the {len(self.datasets)} datasets, "
                    f"got {self.dataset_weights}."
                )
            for weight in self.dataset_weights:
                check_number("dataset_weights", weight, above=0)
        if self.dataset_subset_size is not None:
            check_number("dataset_subset_size", self.dataset_subset_size, least=1)
        if not 0 < self.validation_fraction < 1:
            raise ConfigurationError(
                f"validation_fraction must be above 0 and below 1, got {self.validation_fraction}."
            )
        if self.streaming and self.use_dynamic_batching:
            raise ConfigurationError(
                "use_dynamic_batching must be false with streaming, got true. The lengths are not known beforehand."
            )
