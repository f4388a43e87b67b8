"""Model FLOPs count every kernel of a model once for each token."""

import pytest
from flax import nnx

from paligemma_jax.metrics.model_flops import FORWARD, FULL, LORA, decoder_weights, model_flops, tower_weights
from paligemma_jax.models.paligemma import PaliGemma, variant
from train_jax.core import param_tree


@pytest.mark.parametrize("name", ["3b-224", "pg2-28b-224"])
def test_weights_are_those_of_the_kernels(name):
    arrays = param_tree.flatten(nnx.eval_shape(lambda: PaliGemma(variant(name), rngs=nnx.Rngs(0))))
    sizes = {path: leaf.size for path, leaf in arrays.items() if path.endswith("kernel")}
    config = variant(name)
    assert decoder_weights(config.decoder) == sum(size for path, size in sizes.items() if path.startswith("decoder/"))
    assert tower_weights(config.vision) == sum(size for path, size in sizes.items() if path.startswith("vision/"))


def test_text_costs_the_decoder_and_an_image_both():
    config = variant("3b-224")
    text = model_flops(config, 0, 10, 0, FORWARD)
    assert text == 2 * 10 * decoder_weights(config.decoder)
    assert model_flops(config, 1, 0, 0, FORWARD) == 256 * (
        2 * tower_weights(config.vision) + 2 * decoder_weights(config.decoder) + 2 * 1152 * 2048
    )
    assert model_flops(config, 0, 0, 3, FORWARD) == 2 * 3 * 257_152 * 2048
    assert model_flops(config, 0, 10, 0, LORA) == 2 * text and model_flops(config, 0, 10, 0, FULL) == 3 * text
