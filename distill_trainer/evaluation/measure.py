"""What one causal language model scores, and how large it is."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import PreTrainedModel

SIDES = {
    "student": ("input_ids", "attention_mask", "student_positions"),
    "teacher": ("teacher_input_ids", "teacher_attention_mask", "teacher_positions"),
}


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put the models into evaluation mode without gradients, and back into their own modes afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        with torch.no_grad():
            for model in models:
                model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


def side_inputs(batch: dict[str, Tensor], side: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and anchor positions of one side ("student" or "teacher") of a collated batch."""
    input_ids, attention_mask, positions = (batch[key].to(device) for key in SIDES[side])
    return input_ids, attention_mask, positions


def forward_logits(model: PreTrainedModel, batch: dict[str, Tensor], side: str = "student") -> Tensor:
    """Logits of a model on its side of a batch, `(batch_size, sequence_length, vocab_size)`, in the model's dtype."""
    input_ids, attention_mask, _ = side_inputs(batch, side, model.device)
    positions = {}
    if not bool(attention_mask[:, 0].all()):
        # Left padding: count positions from the first real token, as at inference.
        positions["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions).logits


def scored_tokens(batch: dict[str, Tensor], side: str, device: torch.device) -> Tensor:
    """True at the real tokens after the row's first anchor up to and including its last one.

    They cover exactly the row's `scored_bytes`, whichever tokenizer cut them. A row with fewer than two anchors has
    none.

    Returns:
        Bool, `(batch_size, sequence_length)`.
    """
    input_ids, attention_mask, positions = side_inputs(batch, side, device)
    anchor_mask = batch["anchor_mask"].to(device)
    first = positions.masked_fill(~anchor_mask, input_ids.shape[1]).amin(dim=1, keepdim=True)
    last = positions.masked_fill(~anchor_mask, -1).amax(dim=1, keepdim=True)
    indices = torch.arange(input_ids.shape[1], device=device)
    return (indices > first) & (indices <= last) & attention_mask.bool()


def token_nats(logits: Tensor, batch: dict[str, Tensor], side: str = "student") -> Tensor:
    """Negative log-likelihood of every scored token of one batch under logits that are already at hand.

    Args:
        logits: `(batch_size, sequence_length, vocab_size)`; position t predicts token t + 1, the shift is made here.
        batch: A collated batch.
        side: "student" or "teacher": whose tokens are scored.

    Returns:
        `(batch_size, sequence_length)`, nats, float64 on the CPU, at the token's own position; 0 at other tokens.
    """
    labels = batch[SIDES[side][0]].to(logits.device)[:, 1:]
    counted = scored_tokens(batch, side, logits.device)[:, 1:]
    nats = torch.zeros(logits.shape[:2], dtype=torch.float64)
    # Row by row: the float32 copy then never holds more than one sequence.
    for row, (row_logits, row_labels, row_counted) in enumerate(zip(logits[:, :-1], labels, counted, strict=True)):
        losses = F.cross_entropy(row_logits[row_counted].float(), row_labels[row_counted], reduction="none")
        nats[row, 1:][row_counted.cpu()] = losses.cpu().double()
    return nats


def total_score(nats: Tensor, batch: dict[str, Tensor], side: str = "student") -> dict[str, float | int]:
    """`nll` in nats, `bytes` and `tokens` of one batch, summed, from its `token_nats`."""
    tokens = int(scored_tokens(batch, side, nats.device).sum())
    return {"nll": nats.sum().item(), "bytes": int(batch["scored_bytes"].sum()), "tokens": tokens}


def score_logits(logits: Tensor, batch: dict[str, Tensor], side: str = "student") -> dict[str, float | int]:
    """What `total_score` gives for the `token_nats` of these logits."""
    return total_score(token_nats(logits, batch, side), batch, side)


def active_parameters(model: PreTrainedModel) -> int:
    """Parameters that one token meets: all but the experts, and `top_k / num_experts` of each layer's experts.

    Experts are found by structure (the fused experts interface of transformers), so a dense model counts in full.
    """
    active = float(model.num_parameters())
    for block in model.modules():
        experts = getattr(block, "experts", None)
        if hasattr(experts, "_apply_gate"):
            router = getattr(block, "gate", getattr(block, "router", None))
            top_k = getattr(router, "top_k", None) or model.config.get_text_config().num_experts_per_tok
            size = sum(parameter.numel() for parameter in experts.parameters())
            active -= size * (1 - min(top_k / experts.num_experts, 1))
    return round(active)


def model_size(model: PreTrainedModel, folder: str | Path | None = None) -> dict[str, float | int]:
    """`parameters`, `active_parameters`, `size_mb` and `disk_mb`, the latter two in 10^6 bytes.

    Args:
        model: Tied weights count once, as in a saved checkpoint. `size_mb` are its weights in the dtype they have now.
        folder: Where it was loaded from: `disk_mb` are the weight files there, in the dtype in which they were saved.
            None, or a folder without such files: what saving the model now would write.
    """
    size_mb = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 1e6
    files = weight_files(Path(folder)) if folder else []
    return {
        "parameters": model.num_parameters(),
        "active_parameters": active_parameters(model),
        "size_mb": size_mb,
        "disk_mb": sum(file.stat().st_size for file in files) / 1e6 if files else saved_bytes(model) / 1e6,
    }


def model_folder(name: str | Path) -> Path | None:
    """The folder of a model that was loaded by name or path, None if it is nowhere on this machine."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(str(name), local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or no possible name
        return None


def weight_files(folder: Path) -> list[Path]:
    """The files of a model folder that hold the model's weights: one, or its shards; empty if it has none."""
    for name, shards in (("model.safetensors", "model-*.safetensors"), ("pytorch_model.bin", "pytorch_model-*.bin")):
        if (folder / name).is_file():
            return [folder / name]
        if found := sorted(folder.glob(shards)):
            return found
    return []


def saved_bytes(model: PreTrainedModel) -> int:
    """Bytes of the tensors that a checkpoint of the model would hold, each storage once."""
    tensors = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()}
    return sum(tensors.values())


def floating_dtype(model: nn.Module) -> torch.dtype:
    """The narrowest dtype that holds every floating parameter exactly."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return functools.reduce(torch.promote_types, dtypes)
