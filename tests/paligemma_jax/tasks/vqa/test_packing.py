"""Rows of texts cut to a bucket, and packed: value and gradient are those of padded rows; most of a batch is real."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.data.records import Record
from paligemma_jax.models.gemma import GemmaConfig
from paligemma_jax.models.vit import ViTConfig
from paligemma_jax.tasks.vqa.trimmed import TrimmedRows
from tests.paligemma_jax.mini import Rows, png, read_lines, task_of, train_main, write_rows
from tests.placed_model import placed_model
from tests.test_randomness import KEPT, assert_same, stirred
from train_jax import loop
from train_jax.core.data_source import SLOTS, Lengths
from train_jax.core.errors import UserError
from train_jax.data.pipeline import Pipeline, training_batches
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
    source = task.processor.guarded(rows, task.processor.image_and_text, max_bad_fraction=1.0)
    return task.trimmed(source, rows) if task.config.data.buckets else source


def gradient(options: dict, rows, step: int = 1) -> tuple[tuple[float, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Returns the loss and the gradient of a step, and its batch."""
    task = task_of(options)
    config, mesh = task.config, task.mesh
    batch = training_batches(config, source_of(task, rows), num_steps=9).batch_at(step)
    placed = stirred(placed_model(task, training=True))
    start = placement.create_state(placed, KEPT, mesh, ema=False, float16=False)
    start = dataclasses.replace(start, step=jax.device_put(jnp.int32(step), start.step.sharding))
    rows_on_mesh = sharding.to_global(batch, mesh, sharding.batch_sharding(mesh).spec)
    schedule = optimizers.make_schedule(config.optimizer, 100, 0)
    loss, normalizer = task.loss, task.normalizer
    traced, totals = train_step.trace(config, loss, normalizer, mesh, placed, KEPT, schedule, start, rows_on_mesh)
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


def real_share(task, changes: dict) -> float:
    """Returns the share of real tokens among those that tower and decoder of PaliGemma-3B compute in some steps.

    Batches of 32 over four devices. Image slots and tower tokens count, as each of them is a patch.
    """
    patches, data, records = ViTConfig().num_patches, task.config.data, task.split("train")
    lengths = Lengths(patches, task.processor.text_limit, 4, data.packing, GemmaConfig().attention_share)
    source = TrimmedRows(task.processor.guarded(records, task.processor.text), records, task.processor, lengths)
    source.lengths = dataclasses.replace(lengths, **changes)
    real = computed = 0
    for batch in Pipeline(source, 32, num_steps=12, devices=4, threads=0).iterate():
        tower = 32 * patches
        real += 2 * tower + int((batch["mask_input"].sum(-1) - 1).sum())
        width = batch[SLOTS].size if SLOTS in batch else tower + 32 * (batch["tokens"].shape[-1] - 1)
        computed += tower + width
    return real / computed


def test_most_tokens_of_clevr_are_real(mini_options):
    """With the limits of configs/clevr.py:3b."""
    task = task_of(mini_options | {"data.prefix_length": 128, "data.suffix_length": 384, "data.num_train_scenes": 20})
    shares = [real_share(task, change) for change in ({"shapes": 0}, {}, {"packed": True})]
    assert shares[0] < 0.55 and shares[1] > 0.95 and shares[2] > 0.98


def test_most_tokens_of_mixed_data_are_real_if_packed(mini_options, tmp_path):
    """Short captions, answers and long descriptions in one file, over images of one pixel."""
    rng = np.random.default_rng(1)
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "1.png").write_bytes(png(1))
    kinds = [("answer en what is it", 1), ("caption en", 12), ("describe en", 120), ("ocr", 60)]
    rows = []
    for index in range(200):
        prefix, longest = kinds[rng.choice(4, p=(0.4, 0.3, 0.1, 0.2))]
        suffix = " ".join(rng.choice(WORDS, rng.integers(1, longest + 1)))
        rows.append({"image": f"{index % 2}.png", "prefix": prefix, "suffix": suffix})
    write_rows(tmp_path, "train", rows)
    options = {"data.name": "jsonl", "data.source": str(tmp_path), "data.prefix_length": 64, "data.suffix_length": 500}
    task = task_of(mini_options | options | {"data.tune_fraction": 0.5})
    shares = [real_share(task, change) for change in ({}, {"packed": True})]
    assert shares[0] < 0.9 and shares[1] > 0.95


def test_a_packed_run_resumes_bit_for_bit(mini_options, tmp_path, monkeypatch):
    """In the middle of an epoch."""
    monkeypatch.setattr(loop, "plot_curves", lambda *paths: None)
    options = mini_options | PACKED | {"eval.controls": False, "eval.candidates": "", "eval.before": False}
    options |= {"load_best_at_end": False, "log_steps": 1, "optimizer.schedule": "constant", "total_steps": 4}
    options |= {"optimizer.warmup_percent": None, "eval_steps": 4, "checkpoint_steps": 2}
    train_main(tmp_path / "straight", options)
    train_main(tmp_path / "resumed", options | {"total_steps": 2})
    train_main(tmp_path / "resumed", options)
    runs = [tmp_path / name for name in ("straight", "resumed")]
    losses = [[line["loss"] for line in read_lines(run / "metrics.jsonl") if "loss" in line] for run in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    adapters = [(run / "adapter/adapter_model.safetensors").read_bytes() for run in runs]
    assert adapters[0] == adapters[1]


def test_packing_without_shapes_is_refused(mini_options):
    with pytest.raises(UserError, match="data.packing is True beside data.buckets=0"):
        task_of(mini_options | PACKED | PADDED)


def test_a_row_that_has_grown_since_it_was_counted_stops_the_run(mini_options, rows):
    task = task_of(mini_options | LIVELY)
    source = source_of(task, rows)
    batch = source.get_batch(np.arange(16), 0, np.arange(16))
    longest = int(source.lengths_of(np.arange(16)).max())
    assert source.trim(batch, longest)["tokens"].shape == (16, longest + 1)
    with pytest.raises(UserError, match=f"more than the {longest - 1} tokens that were counted"):
        source.trim(batch, longest - 1)
