"""How much smaller and faster the student is than its teacher."""

import datasets
import evaluate

_DESCRIPTION = """Ratios of cost between a teacher and a student.

parameter_ratio    = teacher parameters / student parameters
size_reduction     = 1 - student size / teacher size
speedup            = student bytes per second / teacher bytes per second, of the forward pass
generation_speedup = the same of generation

Speed is compared per byte of text, since the two tokenizers cut the same text into different numbers of tokens."""

_INPUTS = """
Args:
    predictions (list of one dict): the student's "parameters", "size_mb", "bytes_per_second" and
        "generated_bytes_per_second"; a speed may be None.
    references (list of one dict): the same keys of the teacher.
Returns:
    parameter_ratio (float), size_reduction (float, at most 1), speedup and generation_speedup (float, None where a
    speed is missing)
"""


def compression(student: dict, teacher: dict) -> dict[str, float | None]:
    """Parameter ratio, size reduction and speed-ups of `student` over `teacher`, see the module's description.

    Raises:
        ValueError: If parameters or size of a model are missing or not above 0.
    """
    for role, model in (("student", student), ("teacher", teacher)):
        for key in ("parameters", "size_mb"):
            if not (model.get(key) or 0) > 0:
                raise ValueError(f"{key} of the {role} must be above 0, got {model.get(key)}.")

    def ratio(speed: str) -> float | None:
        return student[speed] / teacher[speed] if student.get(speed) and teacher.get(speed) else None

    return {
        "parameter_ratio": teacher["parameters"] / student["parameters"],
        "size_reduction": 1 - student["size_mb"] / teacher["size_mb"],
        "speedup": ratio("bytes_per_second"),
        "generation_speedup": ratio("generated_bytes_per_second"),
    }


class Compression(evaluate.Metric):
    """`compression` of one student against one teacher."""

    def _info(self):
        model = {
            "parameters": datasets.Value("int64"),
            "size_mb": datasets.Value("float64"),
            "bytes_per_second": datasets.Value("float64"),
            "generated_bytes_per_second": datasets.Value("float64"),
        }
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": model, "references": model}),
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """As `evaluate` does, which fails on a model without one of the keys."""
        for name, models in (("predictions", predictions), ("references", references)):
            for number, model in enumerate(models or ()):
                if missing := [key for key in self.features["predictions"] if key not in model]:
                    raise ValueError(
                        f"Row {number} of {name} must have {', '.join(missing)}, got {', '.join(model) or 'none'}. A "
                        "speed that is not known is None."
                    )
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def _compute(self, predictions, references):
        if len(predictions) != 1:
            raise ValueError(f"predictions must be one model, got {len(predictions)}. Compute one pair at a time.")
        return compression(predictions[0], references[0])
