"""Plans of VQA runs: shapes equal those of the run; sizes of a missing checkpoint follow from its name."""

import re

import jax
import numpy as np
import pytest

from paligemma_jax.tasks.vqa.task import VQA
from paligemma_jax.weights import reader as loading
from tests.live import live_arrays
from tests.paligemma_jax.mini import config_of
from train_jax import loop
from train_jax.core.errors import UserError
from train_jax.parallel import sharding
from train_jax.plan import planning
from train_jax.plan.planning import TRAINING, plan
from train_jax.plan.report import report
from train_jax.step import compiled_steps, placement, train_step
from train_jax.system.memory import step_memory

pytestmark = pytest.mark.usefixtures("fast_compilation")


class TracedError(Exception):
    """Raised once the step has been traced."""


def blueprint(options):
    config = config_of(options)
    return VQA.blueprint(config, sharding.make_mesh(config.mesh))


@pytest.mark.parametrize("changes", [{"cache_features": False}, {"cache_features": True}, {"adapter.name": "none"}])
def test_the_plan_equals_the_run(mini_options, tmp_path, monkeypatch, changes):
    """Every leaf, the batch, live bytes, and what the compiler plans for the step, if it computes padded rows."""
    options = mini_options | {"cache_features": False, "data.buckets": 0} | changes
    seen, original = [], train_step.trace

    def traced(config, loss, normalizer, mesh, placed, optimizer, schedule, start, batch):
        step, _ = original(config, loss, normalizer, mesh, placed, optimizer, schedule, start, batch)
        seen.append((start, placed.frozen, batch, step_memory(step.lower().compile())))
        raise TracedError

    with monkeypatch.context() as patch:
        patch.setattr(train_step, "trace", traced)
        with pytest.raises(TracedError):
            loop.fit(config_of(options), tmp_path / "run", "none")
    ((start, frozen, batch, memory),) = seen
    task, model, example, *_ = blueprint(options)
    shapes = placement.abstract(model, task.trainable(), task.sharding_rules(), task.mesh)
    expected = {path: (leaf.shape, leaf.dtype) for path, leaf in (start.params | frozen).items()}
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in (shapes.trainable | shapes.frozen).items()} == expected
    assert shapes.trainable.keys() == start.params.keys()
    assert {name: (leaf.shape[2:], leaf.dtype) for name, leaf in batch.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in example.items()
    }
    planned = plan(config_of(options))
    live = sum(leaf.nbytes for leaf in jax.tree.leaves((start, frozen)))
    assert planned.trainable + planned.frozen + planned.optimizer == live
    assert planned.programs[0].temp == memory.temp


@pytest.mark.parametrize(("memory", "chosen"), [(None, "block"), (1 << 40, "mlp")])
def test_plan_and_run_choose_alike_what_is_recomputed(mini_options, tmp_path, monkeypatch, capsys, memory, chosen):
    """By the memory that devices report; CPUs report none."""

    def stop(*arguments):
        raise TracedError

    for module in (planning, compiled_steps):
        monkeypatch.setattr(module, "free_device_memory", lambda: memory)
    monkeypatch.setattr(loop, "startup_report", stop)
    options = mini_options | {"model.remat": "auto", "data.buckets": 0}
    planned, explicit = (
        plan(config_of(options | {"model.remat": remat}), only=[TRAINING]) for remat in ("auto", chosen)
    )
    assert planned.programs == explicit.programs and explicit.remat is None
    assert planned.remat.startswith(f"model.remat=auto chooses {chosen}: ") and planned.remat in report(planned)
    with pytest.raises(TracedError):
        loop.fit(config_of(options), tmp_path / "run", "plain")
    assert f"model.remat=auto chooses {chosen}: " in capsys.readouterr().out


def test_a_plan_reads_no_files_and_leaves_no_arrays(mini_options, monkeypatch):
    monkeypatch.setattr(loading, "read_rows", lambda *arguments: pytest.fail("weights were read"))
    monkeypatch.setattr(VQA, "split", lambda self, name: pytest.fail("data were opened"))
    before = len(live_arrays())
    planned = plan(config_of(mini_options))
    assert len(live_arrays()) == before
    assert {program.name.removeprefix("evaluation: ") for program in planned.programs[1:]} == {
        "image features", "features of training images", "generated answers", "likelihood of candidates", "token loss"
    }  # fmt: skip


@pytest.mark.parametrize(
    "name, width, image",
    [("paligemma-3b-pt-224", 2048, 224), ("/x/paligemma2-10b-mix-448", 3584, 448), ("random:pg2-3b-896", 2304, 896),
     ("hf://google/paligemma-3b-pt-896", 2048, 896)],
)  # fmt: skip
def test_a_released_model_is_known_by_its_name(mini_options, name, width, image):
    task, model, example, *_ = blueprint(mini_options | {"model.path": name, "cache_features": False})
    arrays = placement.abstract(model, task.trainable(), task.sharding_rules(), task.mesh)
    leaves = arrays.trainable | arrays.frozen
    assert leaves["decoder/embed_tokens/embedding"].shape == (257_152, width)
    assert example["image"].shape == (image, image, 3) and example["image"].dtype == np.uint8
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves.values())


def test_a_model_of_unknown_size_is_refused(mini_options):
    with pytest.raises(
        UserError, match=re.escape("no model at nowhere/at-all, and its name is not that of a released")
    ):
        blueprint(mini_options | {"model.path": "nowhere/at-all"})
