"""Images of named classes, and the few of each that a model is tuned on."""

from paligemma_jax.data.few_shot.dataset import Example, FewShot, by_class, drawing_order

__all__ = ["Example", "FewShot", "by_class", "drawing_order"]
