"""One process of a run over gloo: `python one_rank.py OUTPUT_FILE SETTINGS_JSON`, with RANK and WORLD_SIZE set."""

import json
import sys
from pathlib import Path

import torch
from builders import tiny_trainer
from transformers import TrainerCallback

# Adds up over ranks, which see each other's anchors, but not over micro-batches.
CONTRASTIVE = {"contrastive_weight": 0.05}
# Terms that depend on who shares a micro-batch are off: they do not add up, by design.
ADDITIVE = {
    "gap_weighting": False,
    "contrastive_weight": 0.0,
    "router_balance_weight": 0.0,
    "router_anchor_weight": 0.0,
    "train_sampling_strategy": "sequential",
    # The step is the gradient times the learning rate.
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "max_steps": 2,
    "temperature": 2.0,
}


class FirstStep(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            named = getattr(model, "module", model).named_parameters()
            self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}


def two_steps(folder, **changes):
    """The log of two steps over the same 8 windows, the first step's gradients, and the weights after both."""
    watch = FirstStep()
    trainer = tiny_trainer(folder, callbacks=[watch], rows=8, **(ADDITIVE | changes))
    trainer.train()
    weights = {name: value.clone() for name, value in trainer.distillation_model.state_dict().items()}
    return {"log": trainer.state.log_history, "gradients": watch.gradients, "weights": weights}


if __name__ == "__main__":
    output = Path(sys.argv[1])
    result = two_steps(output.parent, per_device_train_batch_size=4, **json.loads(sys.argv[2]))
    if int(torch.distributed.get_rank()) == 0:
        torch.save(result, output)
    torch.distributed.destroy_process_group()
