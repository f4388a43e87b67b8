"""The losses: of words (token_losses.py), of pairs of an image and a text (contrastive_losses.py), of few shots."""

from paligemma_jax.consistency import class_cross_entropy, consistency_loss, coprompt_loss
from paligemma_jax.contrastive_losses import sigmoid_loss, softmax_loss
from paligemma_jax.gradient_cache import embed_in_micro_batches
from paligemma_jax.token_losses import TokenScores, loss_weights, token_cross_entropy, token_log_probs, token_scores

__all__ = [
    # Words
    "TokenScores",
    "loss_weights",
    "token_cross_entropy",
    "token_log_probs",
    "token_scores",
    # Pairs
    "embed_in_micro_batches",
    "sigmoid_loss",
    "softmax_loss",
    # Few shots of classes
    "class_cross_entropy",
    "consistency_loss",
    "coprompt_loss",
]
