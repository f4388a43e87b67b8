"""Rows of texts cut to a bucket, and packed: value and gradient are those of padded rows; most of a batch is real."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.data.records import Record
from tests.paligemma_jax.mini import MINI, Rows, png, task_of
from tests.test_randomness import KEPT, assert_same, stirred
from train_jax.core.data_source import SLOTS
from train_jax.data.pipeline import training_batches
from train_jax.optim import optimizers
from train_jax.parallel import sharding
from train_jax.step import placement, train_step

pytestmark = pytest.mark.usefixtures("fast_compilation")

WORDS = ("red", "cube", "small", "metal", "blue", "large", "ball")
PADDED, PACKED = {"data.buckets": 0}, {"data.packing": True}
LIVELY = {"adapter.targets": r".*(q_proj|o_proj)", "adapter.dropout": 0.3, "batch_size": 16, "cache_features": False}
LIVELY |= {"data.prefix_length": 40, "data.suffix_length": 20, "seed": 3}


def mixed(count: int) -> list[tuple[str, str]]:
    """Prompts and answers of many lengths, with a long tail."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.geometric(0.2, (count, 2)), 16)
    return [(f"answer en {' '.join(rng.choice(WORDS, n))}", " ".join(rng.choice(WORDS, m))) for n, m in lengths]


@pytest.fixture(scope="module")
def rows():
    """Each with its own image; one image cannot be decoded."""
    records = [Record(png(i), f"{i}.png", i, prefix, suffix) for i, (prefix, suffix) in enumerate(mixed(64))]
    records[3] = dataclasses.replace(records[3], image=b"no image")
    return Rows(records)


def source_of(task, rows):
    task.base()
    source = task.processor.guarded(rows, task.processor.image_and_text, max_bad_fraction=1.0)
    return task.trimmed(source, rows) if task.config.data.buckets else source


def gradient(options: dict, rows, step: int = 1) -> tuple[tuple[float, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Returns the loss and the gradient of a step, and its batch."""
    task = task_of(options)
    config, mesh = task.config, task.mesh
    batch = training_batches(config, source_of(task, rows), num_steps=9).batch_at(step)
    placed = stirred(placement.build(task, mesh, training=True))
    start = placement.create_state(placed, KEPT, mesh, ema=False, float16=False)
    start = dataclasses.replace(start, step=jax.device_put(jnp.int32(step), start.step.sharding))
    rows_on_mesh = sharding.to_global(batch, mesh, sharding.batch_sharding(mesh).spec)
    schedule = optimizers.make_schedule(config.optimizer, 100, 0)
    traced, totals = train_step.trace(config, task, mesh, placed, KEPT, schedule, start, rows_on_mesh)
    zeros = jax.tree.map(lambda leaf: jax.device_put(jnp.zeros(()), leaf.sharding), totals)
    after, sums = traced.lower().compile()(start, zeros, placed.frozen, rows_on_mesh)
    return (float(sums["loss"][0]), {path: np.array(leaf) for path, leaf in after.opt_state.items()}), batch


@pytest.fixture(scope="module")
def padded(mini_options, rows):
    return gradient(mini_options | LIVELY | PADDED, rows)


CUTS = {
    "buckets": {},
    "packed": PACKED,
    "in micro-batches": PACKED | {"micro_batch": 4},
    "over data": PACKED | {"mesh.data": 4, "micro_batch": 8},
    "over data and fsdp": PACKED | {"mesh.data": 2, "mesh.fsdp": 2},
}


@pytest.mark.parametrize("cut", CUTS)
def test_the_gradient_is_that_of_padded_rows(mini_options, rows, padded, cut):
    """With dropout in tower and decoder, whose masks are those of the same examples, and a bad row."""
    (wanted, longest), (result, batch) = padded, gradient(mini_options | LIVELY | CUTS[cut], rows)
    assert batch["tokens"].shape[2] < longest["tokens"].shape[2] == 60
    assert (SLOTS in batch) == (cut != "buckets")
    assert_same(result, wanted)


@pytest.mark.exhaustive
@pytest.mark.parametrize("adapter", ["prompt", "prefix", "bottleneck", "diff_pruning"])
def test_so_it_is_for_other_adapters(mini_options, rows, adapter):
    options = mini_options | LIVELY | {"adapter.targets": None, "adapter.dropout": 0.0, "adapter.name": adapter}
    options |= {"loss.reduction": "example_mean"}
    wanted, result = (gradient(options | cut, rows)[0] for cut in (PADDED, PACKED))
    assert_same(result, wanted)


def test_consistency_of_packed_rows(mini_options, rows):
    options = mini_options | LIVELY | {"consistency.weight": 1.0, "consistency.on": "both", "micro_batch": 8}
    wanted, result = (gradient(options | cut, rows)[0] for cut in (PADDED, PACKED))
    assert_same(result, wanted)


def real_share(options: dict, steps: int = 12) -> float:
    """Returns the share of real tokens among those that the tower and the decoder compute in some steps."""
    task = task_of(options)
    batches = training_batches(task.config, task.train_source(), num_steps=steps)
    patches, real, computed = MINI.vision.num_patches * 16, 0, 0
    for batch in batches.iterate():
        examples = batch["weight"].size
        real += examples * 2 * patches + int((batch["mask_input"].sum(-1) - 1).sum())
        width = batch[SLOTS].size if SLOTS in batch else examples * (patches + batch["tokens"].shape[-1] - 1)
        computed += examples * patches + width
    return real / computed


def test_most_tokens_of_packed_clevr_are_real(mini_options):
    """With image slots and tower counted; the batches hold the examples of padded ones."""
    options = mini_options | {"batch_size": 32, "data.prefix_length": 128, "data.suffix_length": 384}
    assert real_share(options | PADDED) < 0.4 < 0.95 < real_share(options | PACKED)
