"""Losses as pure functions over aligned tensors: student first, teacher second, then the mask of what counts."""

from distill_trainer.losses.attention import attention_loss
from distill_trainer.losses.contrastive import contrastive_loss
from distill_trainer.losses.feature import feature_loss
from distill_trainer.losses.layerwise import layerwise_loss
from distill_trainer.losses.logits import kl_divergence_loss, lm_loss

__all__ = ["attention_loss", "contrastive_loss", "feature_loss", "kl_divergence_loss", "layerwise_loss", "lm_loss"]
