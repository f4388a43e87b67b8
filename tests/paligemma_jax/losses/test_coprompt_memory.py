"""Memory of a step with and without consistency, as the compiler plans it (with all its optimizations)."""

import jax
import jax.numpy as jnp
from flax import nnx

import paligemma_jax as pg
from paligemma_jax.models.dual_encoder import DualEncoder
from tests.paligemma_jax.losses.test_coprompt import clip_like
from train_jax.core import param_tree


def step_memory(weight, remat="block"):
    """Bytes of temporaries and of arguments of a step; compiled, not run."""

    def make():
        model = DualEncoder(clip_like(128, 6, 64, 24, remat), rngs=nnx.Rngs(0))
        return pg.attach_prompts(model, pg.PromptConfig(2, 2, 4, text_adapter=16, image_adapter=16), rngs=nnx.Rngs(1))

    model = nnx.eval_shape(make)
    graph, arrays = nnx.graphdef(model), param_tree.abstract(model)
    chosen = {path: leaf for path, leaf in arrays.items() if path.startswith("prompts/")}
    frozen = {path: leaf for path, leaf in arrays.items() if path not in chosen}
    pixels = jax.ShapeDtypeStruct((16, 64, 64, 3), jnp.float32)
    words = jax.ShapeDtypeStruct((16, 24), jnp.int32)
    batch = dict(images=pixels, tokens=words, labels=jax.ShapeDtypeStruct((16,), jnp.int32))
    if weight:
        batch |= dict(images_augmented=pixels, descriptions=words)

    def loss(chosen, frozen, batch):
        return pg.losses.coprompt_loss(param_tree.merge(graph, chosen | frozen), batch, weight)[0]

    memory = jax.jit(jax.value_and_grad(loss)).lower(chosen, frozen, batch).compile().memory_analysis()
    return memory.temp_size_in_bytes, memory.argument_size_in_bytes


def test_consistency_takes_less_than_half_as_much_memory_again():
    """The frozen branch has no second copy of the weights and keeps no activations, blocks rematerialised."""
    (plain, base), (consistent, held) = step_memory(0.0), step_memory(1.0)
    assert consistent < 1.5 * plain and held < 1.2 * base, (plain, consistent, base, held)
