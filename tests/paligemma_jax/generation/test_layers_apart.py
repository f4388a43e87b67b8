"""Decoding with separate layers against the scan over stacked ones."""

import importlib

import numpy as np
import pytest
from flax import nnx

from paligemma_jax.generation import layers_apart

pytestmark = pytest.mark.usefixtures("fast_compilation")


def test_separate_layers_decode_what_the_stack_does(big_vision_model, big_vision_case, monkeypatch):
    model, case, taken = big_vision_model, big_vision_case, []
    file = importlib.import_module("paligemma_jax.generation.generate")

    def take_apart(decoder, num_tokens):
        layers_apart.take_apart(decoder, num_tokens)
        taken.append(len(decoder.layers) if isinstance(decoder.layers, nnx.List) else 1)

    monkeypatch.setattr(file, "take_apart", take_apart)
    prompts = case["image"], case["dec_text"], case["dec_mask_input"]
    few, many = layers_apart.FEWEST_TOKENS - 1, layers_apart.FEWEST_TOKENS
    tokens, out = file.generate(model, *prompts, few, -1, return_out=True)
    apart, out_apart = file.generate(model, *prompts, many, -1, return_out=True)
    assert taken == [1, model.config.decoder.depth]
    np.testing.assert_array_equal(apart[:, :few], tokens)
    np.testing.assert_allclose(out_apart["logits"][:, :few], out["logits"], atol=1e-5)
    assert not isinstance(model.decoder.layers, nnx.List)  # the caller's model is as before
