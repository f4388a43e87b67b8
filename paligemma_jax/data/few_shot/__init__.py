"""Few-shot data sets: images of named classes, with a few training images of each."""

from paligemma_jax.data.few_shot.dataset import Example, FewShot, by_class, drawing_order

__all__ = ["Example", "FewShot", "by_class", "drawing_order"]
