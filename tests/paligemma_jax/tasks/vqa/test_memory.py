"""What the compiler plans for a training step and an evaluation when the vocabulary is PaliGemma's; nothing is run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paligemma_jax.adapt.lora.adapter import attach_lora
from paligemma_jax.models.paligemma import PaliGemma
from tests.paligemma_jax.mini import MINI, task_of
from tests.paligemma_jax.training import planned_memory
from train_jax.core import param_tree
from train_jax.system.memory import step_memory

pytestmark = pytest.mark.slow
VOCABULARY, CHUNK = 257_152, 64
MICRO, ROWS = 2, 4  # micro-batches of rows


@functools.cache
def abstract_model(vocab: int):
    """Structure and shapes of a model with adapters, every block rematerialised."""
    config, graphs = MINI.replace(decoder={"vocab_size": vocab}, both={"remat": "block"}), []

    def make():
        model = attach_lora(PaliGemma(config, rngs=nnx.Rngs(0)), dropout=0.1, rngs=nnx.Rngs(0))
        graph, arrays = param_tree.split(model)
        graphs.append(graph)
        return arrays

    arrays = jax.eval_shape(make)
    return graphs[0], arrays


def task_with(mini_options, vocab_chunk: int | None):
    """Its text rows take more tokens than a chunk holds."""
    sizes = {"data.prefix_length": 64, "data.suffix_length": 32, "loss.chunk_size": CHUNK, "eval.batch_size": ROWS}
    return task_of(mini_options | sizes | {"cache_features": False, "loss.vocab_chunk": vocab_chunk})


def training_temp(task, vocab: int) -> int:
    """Of the step with accumulation."""
    return planned_memory(task, *abstract_model(vocab), MICRO, ROWS).temp


def evaluation_temp(task, vocab: int, outputs: tuple[str, ...]) -> int:
    """Of one program with all that a batch of an evaluation computes."""
    model = param_tree.merge(*abstract_model(vocab))
    evaluation = task.evaluation(model)
    length = task.config.data.prefix_length
    row = functools.partial(jax.ShapeDtypeStruct, (ROWS, length + task.config.data.suffix_length))
    batch = {"tokens": row(jnp.int32), "mask_ar": row(jnp.int32), "mask_input": row(bool), "mask_loss": row(bool)}
    batch |= {"weight": jax.ShapeDtypeStruct((ROWS,), jnp.float32)}
    batch |= {"prompt": jax.ShapeDtypeStruct((ROWS, length), jnp.int32)}
    batch |= {"prompt_mask": jax.ShapeDtypeStruct((ROWS, length), bool)}
    batch |= {"features": jax.ShapeDtypeStruct((ROWS, 4, 32), np.float32)}
    images = jax.ShapeDtypeStruct((ROWS, 24, 24, 3), jnp.uint8)
    program = jax.jit(evaluation._everything, static_argnums=3).lower(model, batch, images, outputs)
    return step_memory(program.compile()).temp


TEMP = {
    "training": training_temp,
    "evaluation": functools.partial(evaluation_temp, outputs=("generate", "likelihood", "loss")),
}


@pytest.mark.parametrize("program", TEMP)
def test_growth_with_the_vocabulary_is_that_of_one_chunk(mini_options, program):
    task = task_with(mini_options, None)
    growth = TEMP[program](task, VOCABULARY) - TEMP[program](task, 1024)
    assert 0.9 * CHUNK * VOCABULARY * 4 <= growth <= 1.5 * CHUNK * VOCABULARY * 4


@pytest.mark.parametrize("program", [training_temp, functools.partial(evaluation_temp, outputs=("likelihood", "loss"))])
def test_memory_is_flat_in_the_vocabulary_with_vocabulary_chunks(mini_options, program):
    """31 blocks of words and a remainder against 2 blocks and the same remainder.

    Generation is left out: it holds logits [rows, V] of one token a row, a few per cent of a chunk of the loss.
    """
    task = task_with(mini_options, 8192)
    assert program(task, VOCABULARY) == program(task, VOCABULARY - 29 * 8192)
