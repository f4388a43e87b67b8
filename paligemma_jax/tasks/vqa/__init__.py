"""Visual question answering: fine-tunes a PaliGemma on CLEVR's questions or a user's own."""

from paligemma_jax.tasks.vqa.task import VQA

__all__ = ["VQA"]
