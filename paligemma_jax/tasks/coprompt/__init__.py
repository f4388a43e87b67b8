"""Tunes a SigLIP or a CLIP on a few images of each class, by CoPrompt or one of its relatives."""

from paligemma_jax.tasks.coprompt.task import CoPrompt

__all__ = ["CoPrompt"]
