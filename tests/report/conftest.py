import math

import pytest


def model(name, bits, parameters, **changes):
    figures = {
        "name": name,
        "parameters": parameters,
        "active_parameters": parameters,
        "size_mb": parameters * 4 / 1e6,
        "disk_mb": parameters * 2 / 1e6,
        "bits_per_byte": bits,
        "word_perplexity": 2 ** (bits * 6.03),
        "token_perplexity": 2 ** (bits * 3.3),
        "tokens_per_second": 9e9 / parameters,
        "bytes_per_second": 3e10 / parameters,
        "generated_tokens_per_second": 3e8 / parameters,
        "generated_bytes_per_second": 1e9 / parameters,
        "peak_memory_mb": 812.4,
    }
    return figures | changes


STUDENTS = ("student_before", "baseline", "student")


def breakdown(low, high, anchors, gaps, agreements):
    values = (gaps, agreements)
    by_role = (dict(zip(STUDENTS, found, strict=True)) for found in values)
    names = zip(("kl_divergence", "top1_agreement"), by_role, strict=True)
    return {"from": low, "to": high, "anchors": anchors, **dict(names)}


def layer(number, expert_load, gate_load, changed):
    return {"layer": number, "expert_load": expert_load, "gate_load": gate_load, "changed_fraction": changed}


def passage(text, *bits):
    return {"text": text, "bytes": len(text), **dict(zip((*STUDENTS, "teacher"), bits, strict=True))}


@pytest.fixture
def report():
    return {
        "schema": 1,
        "teacher": model("huihui-ai/Huihui-MoE-1B-A0.6B", 1.7203, 12_400_000, active_parameters=6_800_000),
        "student_before": model("tiny-llama", 2.8311, 2_150_000),
        "student": model("tiny-llama", 2.2758, 2_150_000),
        "baseline": model("tiny-llama", 2.3225, 2_150_000),
        "student_aware_teacher": {"bits_per_byte": 1.7021},
        "compression": {
            "parameter_ratio": 5.767,
            "size_reduction": 0.8266,
            "speedup": 3.91,
            "generation_speedup": 2.84,
        },
        "retention": {
            "kl_divergence": 0.6123,
            "top1_agreement": 0.5521,
            "top5_overlap": 0.6187,
            "gap_closed": 0.4999,
            "gap_closed_baseline": 0.4578,
            "by_frequency": [
                breakdown(1, 9, 1713, (4.512, 4.231, 3.987), (0.213, 0.251, 0.268)),
                breakdown(10, 99, 9021, (2.871, 2.302, 2.211), (0.352, 0.401, 0.419)),
                breakdown(100, None, 59801, (1.203, 0.871, 0.842), (0.511, 0.582, 0.597)),
            ],
            "by_position": [
                breakdown(1, 7, 3811, (2.431, 2.022, 1.958), (0.312, 0.361, 0.372)),
                breakdown(8, 15, 66724, (1.542, 1.101, 1.066), (0.483, 0.541, 0.556)),
            ],
        },
        "attention": {"similarity": 0.8114},
        "router": {
            "expert_load": [0.31, 0.44, 0.25],
            "gate_load": [0.52, 0.28, 0.20],
            "changed_fraction": 0.217,
            "entropy": 0.913,
            "top_k": 2,
            "capacity": 0.412,
            "gap": 0.803,
            "layers": [
                layer(0, [0.2, 0.3, 0.5], [0.61, 0.16, 0.23], 0.634),
                layer(3, [0.31, 0.44, 0.25], [0.52, 0.28, 0.20], 0.217),
            ],
            "token_classes": [
                {"name": "word start", "anchors": 70123, "expert_load": [0.3, 0.5, 0.2], "gate_load": [0.6, 0.3, 0.1]},
                {"name": "digits", "anchors": 411, "expert_load": [0.0, 0.08, 0.92], "gate_load": [0.0, 0.04, 0.96]},
            ],
            "reliability": [
                {"predicted": 0.131, "observed": 0.142, "correct": 0.223, "anchors": 35_267},
                {"predicted": 0.634, "observed": 0.587, "correct": 0.661, "anchors": 35_268},
            ],
            "calibration_error": 0.0291,
            "examples": [
                {
                    "tokens": [
                        {"text": " The", "expert": 1, "gate_expert": 1, "gap": 0.25},
                        {"text": " peo", "expert": 1, "gate_expert": 0, "gap": 2.13},
                        {"text": "ple", "expert": 2, "gate_expert": 2, "gap": 0.07},
                        {"text": " ", "expert": 2, "gate_expert": 2, "gap": 0.5},
                        {"text": ".\n\n", "expert": 0, "gate_expert": 2, "gap": 5.01},
                    ]
                },
                {"tokens": [{"text": "In", "expert": 0, "gate_expert": 0, "gap": 1.0}]},
            ],
        },
        "gap": {
            "deciles": [
                {"anchors": 7053, "before": 0.211, "after": 0.243, "baseline": 0.262},
                {"anchors": 7054, "before": 5.347, "after": 3.911, "baseline": 4.102},
            ]
        },
        "benchmarks": {
            "harness": "0.4.13",
            "limit": None,
            "rows": [
                {
                    "task": "arc_easy",
                    "version": 1.0,
                    "metric": "acc",
                    "filter": "none",
                    "higher_is_better": True,
                    "num_fewshot": 0,
                    "samples": 2376,
                    "scores": {
                        "student_before": {"value": 0.2634, "stderr": 0.009},
                        "baseline": {"value": 0.2881, "stderr": 0.0093},
                        "student": {"value": 0.3127, "stderr": 0.0095},
                    },
                },
                {
                    "task": "lambada",
                    "version": 1.0,
                    "metric": "perplexity",
                    "filter": "strict",
                    "higher_is_better": False,
                    "num_fewshot": 5,
                    "samples": 5153,
                    "scores": {
                        "student_before": {"value": 912.4, "stderr": None},
                        "baseline": {"value": 700.25, "stderr": None},
                        "student": {"value": 612.5, "stderr": None},
                    },
                },
            ],
        },
        "passages": {
            "compared": 1423,
            "best": [passage("It is with great satisfaction <i>that</i> I report.", 2.1, 1.4, 1.2, 1.1)],
            "worst": [passage("Mr. Seward's note | of\n\nthe 26th *ultimo*", 3.9, 3.8, 3.71, 1.3)],
        },
        "samples": [
            {
                "prompt": "The people of the",
                "continuation": " several States have been",
                "student_before": " the the the",
                "baseline": " United States and",
                "student": " United States <b>of</b>",
                "teacher": " United States have",
            }
        ],
        "data": {
            "train_documents": 40,
            "train_bytes": 1_912_345,
            "eval_documents": 12,
            "eval_bytes": 402_113,
            "eval_sha256": "5f" * 32,
            "scored_bytes": 402_113,
            "eval_max_length": 128,
            "eval_stride": 64,
            "dropped": {"empty_documents": 1, "short_windows": 0},
            "anchor_fraction": 0.965,
        },
        "environment": {
            "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "wandb": None},
            "platform": "Linux-6.1-x86_64",
            "device": "cpu",
            "dtype": "float32",
            "peak_memory": "resident set of the whole process",
            "seconds": 512.3,
            "evaluation_seconds": 31.0,
            "command": "run_distillation.py configs/demo.yaml --seed 0",
        },
    }


@pytest.fixture
def log_history():
    history = []
    for step in range(10, 401, 10):
        progress = step / 400
        load = [0.5 - 0.2 * progress, 0.3 + 0.15 * progress, 0.2 + 0.05 * progress]
        entry = {
            "step": step,
            "loss": 3 - progress,
            "learning_rate": 5e-4 * (1 - progress),
            "distill/temperature": 4 - 3 * progress,
            "distill/router_temperature": 2 - progress,
            "distill/top_k": 1 + int(2 * progress),
            "distill/changed_fraction": 0.3 * progress,
            "distill/router_entropy": 1.0 - 0.2 * progress,
            "distill/capacity": 0.5 - 0.1 * progress,
            "distill/gap": 1.6 - 0.8 * progress,
        }
        sizes = {"kl": 2.1, "feature": 0.8, "attention": 0.4, "layerwise": 1.1, "contrastive": 3.2, "lm": 3.4}
        weights = {"kl": 0.7, "feature": 0.1, "attention": 0.1, "layerwise": 0.05, "contrastive": 0.05, "lm": 0.3}
        for name, size in sizes.items():
            on = progress > 0.3 or name in ("kl", "lm")
            noise = 0.06 * math.sin(step * len(name))
            entry[f"distill/loss_{name}"] = size * (math.exp(-1.5 * progress) + noise) if on else 0.0
            entry[f"distill/weight_{name}"] = weights[name] * (1 - 0.5 * progress * (name == "kl")) if on else 0.0
        history.append(entry | {f"distill/expert_load_{expert}": share for expert, share in enumerate(load)})
        if step % 50 == 0:
            history.append(
                {"step": step, "eval_loss": 2.5, "eval_bits_per_byte": 2.27 + 0.55 * math.exp(-4 * progress)}
            )
    return history


@pytest.fixture
def baseline_log_history():
    return [{"step": s, "eval_bits_per_byte": 2.32 + 0.5 * math.exp(-s / 110)} for s in range(50, 401, 50)]
