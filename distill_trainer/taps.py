"""Reading a causal language model from inside: residual streams, attention inputs and head, on chosen layers only."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from distill_trainer.errors import UnsupportedModelError
from distill_trainer.losses.attention import attention_rows, pool_spans
from distill_trainer.losses.heads import Head

ATTENTION_WITH_TAP = "sdpa_with_tap"
NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "final_norm", "ln_f")


@dataclass
class AttentionInputs:
    """What one attention layer compared: queries and keys after their position embedding.

    Attributes:
        query: `(batch_size, num_heads, sequence_length, head_dim)`.
        key: `(batch_size, num_key_value_heads, sequence_length, head_dim)`.
        scaling: Factor of the dot product.
        visible: True where a query sees a key, `(batch_size, 1, sequence_length, sequence_length)`; None for all keys
            up to it.
    """

    query: Tensor
    key: Tensor
    scaling: float
    visible: Tensor | None = None

    def over_spans(self, positions: Tensor, attention_mask: Tensor, anchor_mask: Tensor) -> Tensor:
        """The heads' mean attention at anchors, its mass pooled over the spans between them; see `pool_spans`.

        Args:
            positions: Index of each anchor's token, increasing, `(batch_size, num_anchors)`.
            attention_mask: 1 at real tokens, `(batch_size, sequence_length)`.
            anchor_mask: True for real anchors, bool, `(batch_size, num_anchors)`.

        Returns:
            Float32, `(batch_size, 1, num_anchors, num_anchors)`.
        """
        rows = attention_rows(
            self.query, self.key, positions, attention_mask.bool(), self.scaling, visible=self.visible
        )
        # Pooling is linear: the mean over heads goes first, because it is all that is compared.
        return pool_spans(rows.mean(dim=1, keepdim=True), positions, anchor_mask)


@dataclass
class TrunkOutput:
    """What a model without its head computed.

    Attributes:
        last_hidden_state: Input of the head, `(batch_size, sequence_length, hidden_size)`.
        layers: Residual stream after each tapped layer, same shape, by layer index.
        attentions: Queries and keys of each tapped attention, by layer index.
        embeddings: What the first layer read, same shape, with a gradient; None unless it was asked for.
    """

    last_hidden_state: Tensor
    layers: dict[int, Tensor] = field(default_factory=dict)
    attentions: dict[int, AttentionInputs] = field(default_factory=dict)
    embeddings: Tensor | None = None


def _sdpa_with_tap(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
    """Scaled dot product attention that also hands queries and keys to the module's `attention_tap`, if it has one."""
    tap = getattr(module, "attention_tap", None)
    if tap is not None:
        scaling = kwargs.get("scaling")
        biased = attention_mask is not None and attention_mask.dtype != torch.bool
        if biased or kwargs.get("position_bias") is not None:
            raise _beyond_dot_products(module)
        # The mask that the model itself uses knows of windows, chunks and padding.
        tap(AttentionInputs(query, key, query.shape[-1] ** -0.5 if scaling is None else scaling, attention_mask))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _beyond_dot_products(module: nn.Module) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The attention of {type(module).__name__} is not plain scaled dot product attention. "
        "Set attention_weight to 0."
    )


AttentionInterface.register(ATTENTION_WITH_TAP, _sdpa_with_tap)
AttentionMaskInterface.register(ATTENTION_WITH_TAP, sdpa_mask)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's transformer layers, from the bottom up.

    Raises:
        UnsupportedModelError: If no list of `config.num_hidden_layers` modules exists.
    """
    count = model.config.num_hidden_layers
    lists = [
        module for module in model.base_model.modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise UnsupportedModelError(f"The layers of {type(model).__name__} cannot be found.")
    return lists[0]


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The normalisation between the last layer and the head.

    Raises:
        UnsupportedModelError: If it goes by an unknown name.
    """
    for name in NORM_NAMES:
        if hasattr(model.base_model, name):
            return getattr(model.base_model, name)
    raise UnsupportedModelError(
        f"The final normalisation of {type(model).__name__} cannot be found. A teacher can do without: set use_router "
        "to false to distil from its own gate."
    )


def attention_module(layer: nn.Module) -> nn.Module:
    """The self-attention of a transformer layer.

    Raises:
        UnsupportedModelError: If the layer has none that follows the attention interface of transformers.
    """
    for module in layer.modules():
        if type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx"):
            return module
    raise UnsupportedModelError(
        f"The attention of {type(layer).__name__} does not follow the attention interface of transformers. "
        "Set attention_weight to 0."
    )


def output_head(model: PreTrainedModel, *, autocast: bool = True) -> Head:
    """The model's head, in its own scale."""
    config = model.config
    return Head(
        model.get_output_embeddings(),
        vocab_size=config.vocab_size,
        factor=getattr(config, "logit_scale", None) or 1.0,
        divisor=getattr(config, "logits_scaling", None) or 1.0,
        softcap=getattr(config, "final_logit_softcapping", None),
        autocast=autocast,
    )


def run_trunk(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    layers: tuple[int, ...] = (),
    attention_layers: tuple[int, ...] = (),
    embeddings: bool = False,
) -> TrunkOutput:
    """Run a model without its head and keep what the chosen layers computed.

    Args:
        model: A causal language model.
        input_ids: `(batch_size, sequence_length)`, padded on either side.
        attention_mask: 1 at real tokens, same shape.
        layers: Layers whose residual stream is kept.
        attention_layers: Layers whose queries and keys are kept.
        embeddings: Keep the embedded tokens, for gradients that reach them.
    """
    with _tapped(model, layers, attention_layers, embeddings) as output:
        positions = {}
        if not bool(attention_mask[:, 0].all()):
            # Left padding: count positions from the first real token, as at inference.
            positions["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        output.last_hidden_state = model.base_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions
        ).last_hidden_state
    return output


@contextmanager
def _tapped(
    model: PreTrainedModel, layers: tuple[int, ...], attention_layers: tuple[int, ...], embeddings: bool
) -> Iterator[TrunkOutput]:
    output = TrunkOutput(last_hidden_state=torch.empty(0))
    modules: Sequence[nn.Module] = list(decoder_layers(model)) if layers or attention_layers else []

    def keep_residual(index):
        def hook(module, inputs, result):
            output.layers[index] = result[0] if isinstance(result, tuple) else result

        return hook

    def keep_embeddings(module, inputs, result):
        # Under adapters they are frozen, and would end the graph.
        output.embeddings = result if result.requires_grad else result.requires_grad_()

    hooks = [modules[index].register_forward_hook(keep_residual(index)) for index in layers]
    if embeddings:
        hooks.append(model.get_input_embeddings().register_forward_hook(keep_embeddings))
    implementation = model.config._attn_implementation
    flagged = [attention_module(modules[index]) for index in attention_layers]
    for index, module in zip(attention_layers, flagged, strict=True):
        setattr(module, "attention_tap", partial(output.attentions.__setitem__, index))  # noqa: B010
    if flagged:
        model.config._attn_implementation = ATTENTION_WITH_TAP
    try:
        yield output
    finally:
        model.config._attn_implementation = implementation
        for module in flagged:
            del module.attention_tap
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def check_attention(model: PreTrainedModel) -> None:
    """Raise unless a model computes the same with its attention tapped, on a few tokens.

    Raises:
        UnsupportedModelError: If its attention does what scaled dot product attention does not: sinks, soft caps,
            position biases.
    """
    input_ids = torch.arange(1, 9, device=model.device).clamp(max=model.config.vocab_size - 1).unsqueeze(0)
    mask = torch.ones_like(input_ids)
    training = model.training
    model.eval()
    plain = run_trunk(model, input_ids, mask).last_hidden_state.float()
    try:
        layers = tuple(range(model.config.num_hidden_layers))
        tapped = run_trunk(model, input_ids, mask, attention_layers=layers).last_hidden_state.float()
    except (AttributeError, ValueError):  # from transformers, for MPT, which needs a mask, and for a soft cap
        tapped = torch.full_like(plain, torch.inf)
    model.train(training)
    if not plain.isfinite().all():
        return  # of a broken model nothing can be said about its attention
    tolerance = {torch.float32: 1e-3, torch.float16: 1e-2}.get(model.dtype, 6e-2)
    if not (plain - tapped).abs().max() <= tolerance * plain.abs().max():
        raise _beyond_dot_products(model)
