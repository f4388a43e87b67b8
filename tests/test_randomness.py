"""One contract for all tasks: a step is a function of (seed, step, row), never of who computes which rows.

Batch, loss and gradient of a global step are compared over micro-batches, processes (each one's share is read here)
and meshes. A new task joins by a case in randomness_cases.py, without which `test_every_task_has_a_case` fails.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.placed_model import placed_model
from tests.randomness_cases import BATCH, CASES, Case, places, small_models, task_paths
from train_jax.config.validate import validate
from train_jax.core.errors import UserError
from train_jax.data.pipeline import Pipeline
from train_jax.optim import optimizers
from train_jax.parallel import sharding
from train_jax.step import placement, train_step
from train_jax.task import make_task

STEP = 3
ONE = {"mesh.data": 1}
ALL_AXES = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
OTHERS = {"over 8 rows": (None, 2, {"mesh.data": 8}), "in quarters": (2, 2, ONE), "in halves": (4, 1, ONE)}
PROCESSES = (1, 2, 4)
IDS = {(task, name): f"{task.partition(':')[2]}-{name}" for task, cases in CASES.items() for name in cases}
ALL = [pytest.param(*key, id=label) for key, label in IDS.items()]
WHOLE = [pytest.param(*key, id=label) for key, label in IDS.items() if CASES[key[0]][key[1]].whole]
CUT_OTHERWISE = [
    pytest.param(*key, cut, id=f"{label}-{cut}")
    for key, label in IDS.items()
    for cut, (micro_batch, _, _) in OTHERS.items()
    if micro_batch is None or not CASES[key[0]][key[1]].whole
]

pytestmark = pytest.mark.usefixtures("fast_compilation")


@pytest.fixture(scope="module", autouse=True)
def _small():
    with small_models():
        yield


@pytest.fixture(scope="module")
def case_of(mini_options, tmp_path_factory):
    """Returns the case of a task by name, and writes its files."""
    root = tmp_path_factory.mktemp("randomness")

    @functools.cache
    def find(task: str, name: str) -> Case:
        case, files = CASES[task][name], places(task, root, mini_options)
        return dataclasses.replace(case, options=files | case.options)

    return find


class Step:
    """A training step of a config: its batch, its loss and its gradient."""

    def __init__(self, config):
        validate(config)
        self.config, self.mesh = config, sharding.make_mesh(config.mesh)
        self.task = make_task(config, self.mesh)
        self.source = self.task.train_source()

    def batch(self, micro_batch: int | None, processes: int) -> dict[str, np.ndarray]:
        """Returns the batch [A, b, ...], with the rows of all processes concatenated in every micro-batch."""
        options = {"num_steps": STEP + 1, "seed": self.config.seed, "threads": 0, "process_count": processes}
        parts = [
            Pipeline(self.source, BATCH, micro_batch, process_index=index, **options).batch_at(STEP)
            for index in range(processes)
        ]
        return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}

    def gradients(self, processes: int, *steps: int) -> list[tuple[float, dict[str, np.ndarray]]]:
        """Returns the loss and the gradient by path of one batch, with the random keys of several steps."""
        bundle = stirred(placed_model(self.task, training=True))
        start = placement.create_state(bundle, KEPT, self.mesh, ema=False, float16=False)
        rows = self.batch(self.config.micro_batch, processes)
        batch = sharding.to_global(rows, self.mesh, sharding.batch_sharding(self.mesh).spec)
        schedule = optimizers.make_schedule(self.config.optimizer, 100, 0)
        loss, normalizer = self.task.loss, self.task.normalizer
        traced, totals = train_step.trace(
            self.config, loss, normalizer, self.mesh, bundle, KEPT, schedule, start, batch
        )
        compiled, result = traced.lower().compile(), []
        for step in steps:
            zeros = jax.tree.map(lambda leaf: jax.device_put(jnp.zeros(()), leaf.sharding), totals)
            number = jax.device_put(jnp.int32(step), start.step.sharding)
            start, sums = compiled(dataclasses.replace(start, step=number), zeros, bundle.frozen, batch)
            result.append((float(sums["loss"][0]), {path: np.array(leaf) for path, leaf in start.opt_state.items()}))
        return result


# An optimizer whose state is the gradient.
KEPT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradients, state, params=None: (jax.tree.map(jnp.zeros_like, gradients), gradients),
)


def stirred(bundle: placement.PlacedModel) -> placement.PlacedModel:
    """Returns random parameters, since those that start at zero would hide the effect of random keys."""
    rng = np.random.default_rng(0)
    noise = {path: 0.1 * rng.standard_normal(bundle.trainable[path].shape) for path in sorted(bundle.trainable)}
    moved = {
        path: jax.device_put(leaf + noise[path].astype(leaf.dtype), leaf.sharding)
        for path, leaf in bundle.trainable.items()
    }
    return dataclasses.replace(bundle, trainable=moved)


def assert_same(result, wanted) -> None:
    """Asserts equal losses and gradients to a relative error of 1e-5."""
    np.testing.assert_allclose(result[0], wanted[0], rtol=1e-5)
    assert result[1].keys() == wanted[1].keys()
    whole = norm(*wanted[1].values())
    for path, leaf in wanted[1].items():  # a leaf of no gradient to speak of holds rounding alone
        assert norm(result[1][path] - leaf) <= 1e-5 * max(norm(leaf), 1e-2 * whole), path


def norm(*arrays: np.ndarray) -> float:
    return float(np.sqrt(sum(np.square(array, dtype=np.float64).sum() for array in arrays)))


def test_every_task_has_a_case():
    assert task_paths() == CASES.keys()


@pytest.mark.parametrize(("task", "name"), ALL)
def test_batches_do_not_depend_on_the_reading_process(case_of, task, name):
    step = Step(case_of(task, name).make(**ONE))
    rows = step.batch(None, 1)
    for micro, processes in itertools.product((None, 4, 2), PROCESSES):
        if (micro or BATCH) < processes:
            with pytest.raises(UserError, match=f"a batch of {micro} does not divide over {processes} processes"):
                step.batch(micro, processes)
            continue
        cut = step.batch(micro, processes)
        assert cut.keys() == rows.keys()
        for key, values in rows.items():
            np.testing.assert_array_equal(cut[key].reshape(values.shape), values, err_msg=key)


@pytest.mark.parametrize(("task", "name"), ALL)
def test_a_step_does_not_depend_on_who_computes_it(case_of, task, name):
    """With micro-batches if the task allows them, on all axes of a mesh, read by four processes."""
    case = case_of(task, name)
    wanted, other = Step(case.make(**ONE)).gradients(1, STEP, STEP + 1)
    difference = norm(*(other[1][path] - leaf for path, leaf in wanted[1].items())) / norm(*wanted[1].values())
    assert difference > 1e-3 if case.random_step else difference == 0  # random keys change the gradient
    cut = Step(case.make(**ALL_AXES, **case.elsewhere, micro_batch=None if case.whole else 4))
    assert_same(cut.gradients(4, STEP)[0], wanted)


@pytest.mark.parametrize(("task", "name", "cut"), CUT_OTHERWISE)
def test_nor_on_how_else_it_is_cut(case_of, task, name, cut):
    case, (micro_batch, processes, mesh) = case_of(task, name), OTHERS[cut]
    (wanted,) = Step(case.make(**ONE)).gradients(1, STEP)
    step = Step(case.make(**mesh, **case.elsewhere, micro_batch=micro_batch))
    assert_same(step.gradients(processes, STEP)[0], wanted)


@pytest.mark.parametrize(("task", "name"), WHOLE)
def test_a_loss_of_the_whole_batch_refuses_micro_batches(case_of, task, name):
    case = case_of(task, name)
    config = case.make(**ONE, micro_batch=4)
    with pytest.raises(UserError, match=f"micro_batch is 4.*{case.whole}"):
        make_task(config, sharding.make_mesh(config.mesh))
