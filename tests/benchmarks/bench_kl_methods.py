"""Held-out bits per byte of the demo student under each way of comparing the logits, against the text alone.

    python tests/benchmarks/bench_kl_methods.py [--seeds 0 1 2] [--variants ...] [--folder outputs/bench_kl_methods]

Same pair, documents, batches, steps and learning rates as configs/demo.yaml; the losses are the logit loss and LM,
with the router, so that nothing else blurs the comparison. A seed draws other documents and batches. Every result is a
file: what is there is not run again, so a stopped benchmark goes on, and two processes may share the seeds.

All methods have the weight 0.7 and the temperature 1, which were chosen for the first of them. The demo's student has
the smaller vocabulary, so that the correction of spans touches 0.06 % of its anchors: it cannot show here.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import yaml
from transformers import set_seed
from transformers.utils import logging

from distill_trainer.arguments import parse_arguments
from distill_trainer.assembly import load_texts
from distill_trainer.data import prepare_dataset
from distill_trainer.loading import load_causal_lm, load_tokenizer
from distill_trainer.trainer import DistillationTrainer

ROOT = Path(__file__).parents[2]
DEMO = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())
OTHER_LOSSES = ("feature_weight", "attention_weight", "layerwise_weight", "contrastive_weight")
LM_ONLY = "LM only"
VARIANTS = {
    LM_ONLY: {"kl_weight": 0.0, "lm_weight": 1.0},
    "projected": {},
    "projected, no spans": {"span_correction": False},
    "projected, equal weights": {"gap_weighting": False},
    "projected, reverse": {"kl_direction": "reverse"},
    "projected, js": {"kl_direction": "js"},
    "topk": {"kl_method": "topk"},
    "uld": {"kl_method": "uld"},
    "hybrid": {"kl_method": "hybrid"},
    "alm": {"kl_method": "alm"},
}


def bits_per_byte(settings: dict, seed: int, folder: Path) -> dict[str, float]:
    """Train one student and score it on the test documents."""
    flags = {"seed": seed, "output_dir": folder / "run", "run_baseline": False, "eval_strategy": "no", **settings}
    flags |= dict.fromkeys(OTHER_LOSSES, 0.0)
    argv = [str(ROOT / "configs/demo.yaml"), "--disable_tqdm", "true", "--logging_strategy", "no"]
    argv += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    names, texts, args = parse_arguments(argv)
    set_seed(seed)
    paths = [str(ROOT / name) for name in (names.student_model_name_or_path, names.teacher_model_name_or_path)]
    tokenizers = [load_tokenizer(path) for path in paths]
    splits = load_texts(texts, seed)
    student = load_causal_lm(paths[0])
    teacher = load_causal_lm(paths[1], dtype=names.teacher_dtype)
    trainer = DistillationTrainer(
        student,
        teacher if args.has_teacher_losses() else None,
        args,
        train_dataset=splits["train"],
        processing_class=tokenizers[0],
        teacher_processing_class=tokenizers[1],
    )
    start = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - start
    test, _ = prepare_dataset(splits["test"], *tokenizers, max_length=args.max_length)
    figures = trainer.evaluate(test)
    return {"bits_per_byte": figures["eval_bits_per_byte"], "seconds_per_step": seconds / trainer.state.max_steps}


def table(folder: Path, variants: list[str], seeds: list[int]) -> str:
    """Mean, standard deviation and the difference to the text alone, of what is there."""
    lines = [f"{'':26}{'seeds':>6}{'bits/byte':>11}{'sd':>8}{'- LM only':>11}{'se':>8}{'s/step':>8}"]
    results = {
        name: {
            seed: json.loads(path.read_text()) for seed in seeds if (path := result_path(folder, name, seed)).exists()
        }
        for name in variants
    }
    for name, found in results.items():
        if not found:
            continue
        values = [figures["bits_per_byte"] for figures in found.values()]
        paired = [
            figures["bits_per_byte"] - results[LM_ONLY][seed]["bits_per_byte"]
            for seed, figures in found.items()
            if seed in results.get(LM_ONLY, {})
        ]
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        error = statistics.stdev(paired) / len(paired) ** 0.5 if len(paired) > 1 else float("nan")
        difference = statistics.mean(paired) if paired else float("nan")
        seconds = statistics.median(figures["seconds_per_step"] for figures in found.values())
        lines.append(
            f"{name:26}{len(values):6d}{statistics.mean(values):11.4f}{spread:8.4f}{difference:+11.4f}{error:8.4f}"
            f"{seconds:8.3f}"
        )
    return "\n".join(lines)


def result_path(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs/bench_kl_methods")
    parser.add_argument("--max_steps", type=int, default=DEMO["max_steps"], help="The demo's, unless given.")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        for name in arguments.variants:
            path = result_path(arguments.folder, name, seed)
            settings = VARIANTS[name] | {"max_steps": arguments.max_steps}
            if not path.exists():
                figures = bits_per_byte(settings, seed, arguments.folder)
                path.write_text(json.dumps(figures | {"settings": settings}))
                print(f"seed {seed}  {name:26}{figures['bits_per_byte']:.4f}", flush=True)
            elif json.loads(path.read_text())["settings"] != settings:
                parser.error(f"{path} was made with other settings than {settings}. Give another --folder.")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print(table(arguments.folder, arguments.variants, arguments.seeds))


if __name__ == "__main__":
    main()
