"""Losses of tokens, of image-text pairs (contrastive/) and of few-shot classification (coprompt.py)."""

from paligemma_jax.losses.chunked_cross_entropy import (
    TokenScores,
    loss_weights,
    token_cross_entropy,
    token_log_probs,
    token_scores,
)
from paligemma_jax.losses.chunked_kl import token_divergence
from paligemma_jax.losses.contrastive.api import sigmoid_loss, softmax_loss
from paligemma_jax.losses.coprompt import class_cross_entropy, consistency_loss, coprompt_loss
from paligemma_jax.losses.gradient_cache import embed_in_micro_batches

__all__ = [
    # Tokens
    "TokenScores",
    "loss_weights",
    "token_cross_entropy",
    "token_divergence",
    "token_log_probs",
    "token_scores",
    # Pairs
    "embed_in_micro_batches",
    "sigmoid_loss",
    "softmax_loss",
    # Few-shot classification
    "class_cross_entropy",
    "consistency_loss",
    "coprompt_loss",
]
