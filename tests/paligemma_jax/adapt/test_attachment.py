"""Attaching and detaching are inverses, of every method, down to NNX's own description of the model."""

import jax
import numpy as np
import pytest
from flax import nnx

from paligemma_jax.adapt import attachment
from paligemma_jax.adapt.lora.adapter import attach_lora
from paligemma_jax.adapt.lora.layer import LoraProjection
from paligemma_jax.adapt.peft.methods import DETACH, METHODS
from paligemma_jax.models.gemma import Gemma, GemmaAttention, GemmaBlock
from paligemma_jax.models.projection import Projection, projections

WORDS = ("lora", "prefix_", "soft_prompt", "bottleneck", "last_layers", "_adapter")


def attach(name, model):
    if name == "lora":
        return attach_lora(model, rank=2, rngs=nnx.Rngs(0), dora=True, rank_pattern={".*layers/0/.*": 1})
    method = METHODS[name]
    return method.attach(model, method.size and 3, method.targets, nnx.Rngs(0))


@pytest.mark.parametrize("name", sorted(DETACH))
def test_detaching_gives_back_the_base(name, small_model):
    graph, state = nnx.split(small_model)
    adapted = attach(name, nnx.clone(small_model))
    assert nnx.graphdef(adapted) != graph
    base_graph, base_state = nnx.split(DETACH[name](adapted))
    assert base_graph == graph
    jax.tree.map(np.testing.assert_array_equal, base_state, state)


@pytest.mark.parametrize("kind", [Projection, Gemma, GemmaAttention, GemmaBlock])
def test_models_have_no_attributes_of_adapters(kind, small_model):
    for path, module in nnx.iter_modules(small_model):
        if type(module) is kind:
            assert not [name for name in vars(module) if any(word in name for word in WORDS)], path


def test_a_layer_of_another_class_is_refused(small_model):
    module = next(iter(projections(small_model).values()))
    with pytest.raises(TypeError, match="LoraProjection with .* is to extend a PaliGemma, expected a Projection and"):
        attachment.attach(small_model, LoraProjection, lora_a=None)
    with pytest.raises(TypeError, match=r"with \['lora_a'\] is to extend a Projection, expected a Projection and"):
        attachment.attach(module, LoraProjection, lora_a=None)
    assert type(module) is Projection
