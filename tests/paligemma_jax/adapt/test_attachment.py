"""What is attached to a layer; that detaching is the inverse is tested for every method in test_method.py."""

import pytest
from flax import nnx

from paligemma_jax.adapt import attachment
from paligemma_jax.adapt.lora.layer import LoraProjection
from paligemma_jax.models.gemma import Gemma, GemmaAttention, GemmaBlock
from paligemma_jax.models.projection import Projection, projections

WORDS = ("lora", "prefix_", "soft_prompt", "bottleneck", "last_layers", "_adapter")


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
