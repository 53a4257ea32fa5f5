"""Train a natively routed Mixture-of-Experts teacher on the texts of the demo's teacher, with the demo's tokenizer.

    python tests/benchmarks/native_teacher.py [--output outputs/native_teacher] [--epochs 2]

The demo's teacher is a merge: its gate was never trained. Here experts and gate learn together from the start (8
experts, 2 per token, with the load balancing loss of Qwen3-MoE), so that a router has as little to win as it can have.
"""

import argparse
from pathlib import Path

from saving import save_whole
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM, set_seed
from transformers.utils import logging

from distill_trainer.demo import ASSETS, token_windows, train_language_model
from distill_trainer.documents import load_sotu

ROOT = Path(__file__).parents[2]


def native_teacher(vocab_size: int) -> Qwen3MoeForCausalLM:
    """An untrained model with the width, the depth and the active parameters of the demo's teacher."""
    config = Qwen3MoeConfig.from_pretrained(
        ASSETS / "teacher",
        vocab_size=vocab_size,
        moe_intermediate_size=192,
        num_experts=8,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        dtype="float32",
    )
    return Qwen3MoeForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/native_teacher")
    parser.add_argument("--epochs", type=int, default=2, help="Passes over the texts.")
    options = parser.parse_args()
    logging.set_verbosity_warning()
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "teacher")
    model = native_teacher(len(tokenizer))
    train_language_model(
        model, token_windows(tokenizer, load_sotu("teacher")), epochs=options.epochs, learning_rate=3e-3
    )
    model.config.output_router_logits = False
    save_whole(options.output, model.half(), tokenizer)


if __name__ == "__main__":
    main()
