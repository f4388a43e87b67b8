"""Small-scale text to image: a flow from noise to images of single objects."""

from paligemma_jax.tasks.text_to_image.task import TextToImage

__all__ = ["TextToImage"]
