"""Random weights: drawn layer by layer, quantised while drawing, in an ordinary model."""

import functools
import math

import jax
import numpy as np
import pytest
from flax import nnx

from paligemma_jax.adapt.quantization.quantize import quantize, quantized_kernels
from paligemma_jax.models.gemma import GemmaConfig
from paligemma_jax.models.paligemma import PaliGemmaConfig
from paligemma_jax.models.vit import ViTConfig
from paligemma_jax.weights import random_init
from paligemma_jax.weights import reader as load_module
from paligemma_jax.weights.checkpoint import whole_model
from paligemma_jax.weights.name_table import stacked
from paligemma_jax.weights.reader import load
from train_jax.core import param_tree

DEEP = PaliGemmaConfig(
    vision=ViTConfig(image_size=8, patch_size=8, width=16, depth=2, mlp_dim=32, num_heads=2),
    decoder=GemmaConfig(vocab_size=64, width=256, depth=12, mlp_dim=1024, num_heads=4, head_dim=64),
)


def arrays_of(model) -> dict[str, np.ndarray]:
    return {path: np.asarray(array) for path, array in param_tree.flatten(model).items()}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_working_memory_is_that_of_one_layer_at_any_depth(kind):
    """The compiler's planned memory beside the result."""
    finish = functools.partial(quantize, kind=kind)

    def temporary(depth: int) -> int:
        config = DEEP.replace(decoder=dict(depth=depth))
        compiled = [jax.jit(draw).lower(jax.random.key(0)).compile() for draw in random_init.draws(config, finish)]
        return max(program.memory_analysis().temp_size_in_bytes for program in compiled)

    shapes = param_tree.abstract(nnx.eval_shape(lambda: whole_model(DEEP)))
    whole = sum(4 * math.prod(leaf.shape) for leaf in shapes.values())
    assert temporary(12) <= 1.01 * temporary(3)
    assert temporary(12) < whole / 1.5


@pytest.fixture
def path(small_config, monkeypatch, fast_compilation):
    monkeypatch.setattr(load_module, "variant", lambda name: small_config)
    return "random:small"


def test_layers_have_different_random_weights(path, small_config):
    model = load(path)
    expected = whole_model(small_config)
    assert param_tree.abstract(model) == param_tree.abstract(expected)
    ours, theirs = arrays_of(model), arrays_of(expected)
    for name, array in ours.items():
        if np.ptp(theirs[name]) == 0:  # norm scales and biases
            np.testing.assert_array_equal(array, theirs[name], err_msg=name)
        else:
            assert np.std(array) == pytest.approx(np.std(theirs[name]), rel=0.3), name
            assert not stacked(name) or (array[0] != array[1]).any(), name
    kernels = [name for name in ours if name.endswith("gate_proj/kernel") or name.endswith("up_proj/kernel")]
    assert (ours[kernels[0]] != ours[kernels[1]]).any()


@pytest.mark.parametrize("kind, options", [("nf4", dict(double=True)), ("int8", {}), ("int4", dict(block_size=128))])
def test_quantised_random_weights_equal_quantising_afterwards(path, kind, options):
    model = load(path, "bfloat16", quantize=kind, **options)
    expected = quantize(load(path, "bfloat16"), kind, options.get("block_size", 64), options.get("double", False))
    assert param_tree.abstract(model) == param_tree.abstract(expected)
    assert quantized_kernels(model).keys() == quantized_kernels(expected).keys()
    for name, kernel in quantized_kernels(model).items():
        other = quantized_kernels(expected)[name]
        assert (kernel.codec, kernel.dtype) == (other.codec, other.dtype)
        np.testing.assert_allclose(kernel.dequantize(), other.dequantize(), rtol=1e-5, atol=1e-6, err_msg=name)
