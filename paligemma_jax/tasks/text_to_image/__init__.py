"""Text to image in miniature: a flow from noise to pictures of single objects."""

from paligemma_jax.tasks.text_to_image.task import TextToImage

__all__ = ["TextToImage"]
