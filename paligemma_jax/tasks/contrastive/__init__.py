"""Trains a dual encoder on pairs of images and captions with SigLIP's or CLIP's loss."""

from paligemma_jax.tasks.contrastive.task import Contrastive

__all__ = ["Contrastive"]
