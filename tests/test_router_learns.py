"""The router on the demo's pair: what it learns from real text within a short part of the demo's training."""

from pathlib import Path

import torch
from transformers import set_seed

from distill_trainer.assembly import load_texts
from distill_trainer.data import DistillationCollator, prepare_dataset
from distill_trainer.loading import load_causal_lm, load_tokenizer
from distill_trainer.parsing import parse_arguments
from distill_trainer.trainer import DistillationTrainer

ROOT = Path(__file__).parents[1]
KL_ONLY = [f"--{name}_weight=0" for name in ("feature", "attention", "layerwise", "contrastive")]


def demo_trainer(output_dir, spoil, *flags):
    """A trainer with the demo's settings, whose teacher was changed by `spoil`, and batches of held-out text."""
    short = ["--output_dir", str(output_dir), "--eval_strategy", "no", "--disable_tqdm", "true"]
    # The demo's learning rate, of which this is the first quarter: it has hardly fallen by then.
    short += ["--max_steps", "120", "--lr_scheduler_type", "constant", "--per_device_train_batch_size", "4"]
    names, texts, args = parse_arguments([str(ROOT / "configs/demo.yaml"), *short, *KL_ONLY, *flags])
    set_seed(args.seed)
    sides = (ROOT / names.student_model_name_or_path, ROOT / names.teacher_model_name_or_path)
    tokenizers = [load_tokenizer(str(side)) for side in sides]
    splits = load_texts(texts, args.seed)
    student, teacher = load_causal_lm(str(sides[0])), load_causal_lm(str(sides[1]), dtype=names.teacher_dtype)
    spoil(teacher)
    trainer = DistillationTrainer(
        student,
        teacher,
        args,
        train_dataset=splits["train"],
        processing_class=tokenizers[0],
        teacher_processing_class=tokenizers[1],
    )
    windows, _ = prepare_dataset(splits["test"].select(range(1)), *tokenizers, max_length=args.max_length)
    rows = list(windows)[::4]
    collator = DistillationCollator(*tokenizers)
    return trainer, [collator(rows[start : start + 16]) for start in range(0, min(len(rows), 48), 16)]


def mean_load(trainer, batches, top_k):
    """Share of the routing weight of each expert on the batches."""
    trainer.values.top_k = top_k
    routed = [trainer.route(batch) for batch in batches]
    weights = torch.cat([r.routing_weights for r in routed])
    selected = torch.cat([r.selected_experts for r in routed])
    return torch.zeros(3).index_add(0, selected.flatten(), weights.flatten()) / len(weights)


def test_an_expert_of_noise_loses_its_load(tmp_path):
    def spoil(teacher):
        experts = teacher.model.layers[-1].mlp.experts
        with torch.no_grad():
            for weight in (experts.gate_up_proj, experts.down_proj):
                # The expert of addresses moves to another place: the noise is in the way of one that serves the text.
                weight[1] = weight[0]
                weight[0].normal_(std=float(weight[0].std()))

    # As many steps in which the router learns as the whole demo has, in one layer.
    trainer, batches = demo_trainer(
        tmp_path, spoil, "--router_layers", "last", "--router_interval", "1", "--final_top_k", "2"
    )
    before = {top_k: float(mean_load(trainer, batches, top_k)[0]) for top_k in (1, 3)}
    trainer.train()
    after = {top_k: float(mean_load(trainer, batches, top_k)[0]) for top_k in (1, 3)}
    # Alone it is hardly ever chosen any more. Mixed with all others it keeps part of its weight: the objective
    # holds the router near the gate.
    assert before[1] > 0.3 and after[1] < before[1] / 10
    assert before[3] > 0.3 and after[3] < 0.75 * before[3]
