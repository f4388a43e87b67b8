"""The step as a pure function: gradient accumulation, bad steps, loss scale, moving average."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.placed_model import placed_model
from tests.train_jax.toy_task import FEATURES, toy_config
from train_jax.config.base import task_class
from train_jax.optim import optimizers
from train_jax.parallel import sharding
from train_jax.step import randomness, train_state, train_step
from train_jax.step.train_state import Guard, LossScale, TrainState

pytestmark = pytest.mark.usefixtures("fast_runs")
ROWS = 32


class Steps:
    """The toy's step on one device, and the initial state."""

    def __init__(self, **changes):
        config = toy_config(**{"batch_size": ROWS, "optimizer__learning_rate": 0.1, **changes})
        mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
        task = task_class(config.task)(config, mesh)
        bundle = placed_model(task)
        schedule = optimizers.make_schedule(config.optimizer, 100, 0)
        optimizer = optimizers.make_optimizer(config.optimizer, schedule, bundle.trainable)
        self.frozen = bundle.frozen
        self.state = train_state.create(
            bundle.trainable,
            optimizer,
            ema=config.ema_decay is not None,
            float16=config.compute_dtype == "float16",
        )
        self._step = jax.jit(
            train_step.make_train_step(
                bundle.merge,
                task.loss,
                task.normalizer,
                optimizer,
                schedule,
                seed=config.seed,
                ema_decay=config.ema_decay,
                max_bad_steps=config.max_bad_steps,
            )
        )

    def __call__(self, before: TrainState, batch: dict) -> tuple[TrainState, dict]:
        """Returns the state after a batch and the metrics of the step (sums and counts)."""
        names = ("error", "examples", "loss", "grad_norm", "learning_rate")
        totals = {name: (jnp.float32(0), jnp.float32(0)) for name in names}
        after, totals = self._step(before, totals, self.frozen, batch)
        return after, {name: (float(value), float(count)) for name, (value, count) in totals.items()}


@functools.lru_cache
def make_steps(**changes) -> Steps:
    """A step compiled once for all tests; tests must not change it."""
    return Steps(**changes)


def batch(micro_batches=1, **changed):
    """Returns a batch [A, b, ...]; the weights of every 8 rows are ten times those of the previous 8."""
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.normal(size=(ROWS, FEATURES)).astype(np.float32),
        "y": rng.normal(size=ROWS).astype(np.float32),
        "weight": 10.0 ** (np.arange(ROWS) // 8 - 2).astype(np.float32),
    } | changed
    return {name: rows.reshape(micro_batches, -1, *rows.shape[1:]) for name, rows in arrays.items()}


def assert_equal(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_accumulation_equals_the_big_batch():
    """With dropout, whose masks depend on rows and not on micro-batches."""
    steps = make_steps(optimizer__name="sgd", model__dropout=0.3)
    big, metrics = steps(steps.state, batch(1))
    small, accumulated = steps(steps.state, batch(4))
    for name, value in metrics.items():
        np.testing.assert_allclose(accumulated[name][0] / accumulated[name][1],
                                   value[0] / value[1] if name != "examples" else 8, rtol=1e-5)  # fmt: skip
    for path, expected in big.params.items():
        np.testing.assert_allclose(small.params[path], expected, rtol=1e-5, atol=1e-6)
    # The mean of the micro-batches' means is far from it.
    means = [steps(steps.state, {k: v[:, i : i + 8] for k, v in batch(1).items()})[1]["error"] for i in (0, 8, 16, 24)]
    assert abs(np.mean([value / count for value, count in means]) / metrics["loss"][0] - 1) > 0.05


def test_dropout_depends_on_row_and_step_only():
    keys = jax.random.key_data(randomness.row_keys(0, jnp.int32(3), 8))
    assert len(np.unique(keys, axis=0)) == 8
    assert_equal(keys[:4], jax.random.key_data(randomness.row_keys(0, jnp.int32(3), 4)))
    for seed, step in ((0, 4), (1, 3)):
        other = jax.random.key_data(randomness.row_keys(seed, jnp.int32(step), 8))
        assert not (keys == other).all(axis=1).any()


def test_batches_have_row_numbers_and_the_step():
    result = randomness.numbered({"x": jnp.zeros((2, 3, 5))}, jnp.int32(7))
    assert result["x"].shape == (2, 3, 5)
    np.testing.assert_array_equal(result[randomness.ROW], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(result[randomness.STEP], np.full((2, 3), 7))


def bad_batch():
    x = batch()["x"][0].copy()
    x[3, 0] = np.nan
    return batch(x=x)


def test_a_bad_step_changes_neither_parameters_nor_optimizer():
    steps = make_steps(max_bad_steps=2, ema_decay=0.9)
    good, _ = steps(steps.state, batch())
    after, metrics = steps(good, bad_batch())
    assert_equal((after.params, after.opt_state, after.ema), (good.params, good.opt_state, good.ema))
    assert set(metrics.values()) == {(0.0, 0.0)}  # nothing enters the means
    assert (int(after.step), int(after.guard.total), int(after.guard.in_a_row)) == (2, 1, 1)
    assert int(after.guard.first_bad) == 1 and not after.guard.stopped
    # After another good step the count of bad steps is 0, and the update equals that without the bad step.
    recovered, metrics = steps(after, batch())
    assert (int(recovered.guard.total), int(recovered.guard.in_a_row), int(recovered.guard.first_bad)) == (1, 0, -1)
    assert metrics["loss"][1] == 1 and np.isfinite(metrics["loss"][0])
    assert int(recovered.updates) == 2


def test_the_guard_stays_latched():
    steps = make_steps(max_bad_steps=2, ema_decay=0.9)
    after = steps.state
    for _ in range(2):
        after, _ = steps(after, bad_batch())
    assert bool(after.guard.stopped) and int(after.guard.first_bad) == 0
    later, metrics = steps(after, batch())  # good, but too late
    assert_equal((later.params, later.opt_state, later.guard), (after.params, after.opt_state, after.guard))
    assert metrics["loss"] == (0.0, 0.0)


def test_an_infinite_gradient_is_a_fault_too():
    steps = make_steps()
    after, _ = steps(steps.state, batch(weight=np.full(ROWS, 1e-30, np.float32), y=np.full(ROWS, 1e25, np.float32)))
    assert bool(after.guard.stopped)
    assert_equal(after.params, steps.state.params)


def spike():
    y = batch()["y"][0].copy()
    y[-1] = 5e4  # a finite loss whose gradient times 2**15 is beyond float16
    return batch(y=y)


def test_float16_overflow_halves_the_scale():
    steps = make_steps(compute_dtype="float16")
    after, metrics = steps(steps.state, spike())
    assert float(after.loss_scale.value) == 2.0**14
    assert_equal((after.params, after.opt_state), (steps.state.params, steps.state.opt_state))
    assert (int(after.guard.scale_skips), int(after.guard.total), int(after.guard.in_a_row)) == (1, 0, 0)
    assert metrics["loss"] == (0.0, 0.0) and int(after.updates) == 0


def test_float16_step_does_not_depend_on_the_scale():
    steps = make_steps(compute_dtype="float16")
    half = LossScale.start(2.0**8)
    small = TrainState(**{**vars(steps.state), "loss_scale": half})
    after, expected = steps(small, batch())[0], steps(steps.state, batch())[0]
    for path in expected.params:
        np.testing.assert_allclose(after.params[path], expected.params[path], rtol=1e-2, atol=1e-3)


def test_float16_nan_in_the_data_is_a_fault_and_leaves_the_scale():
    steps = make_steps(compute_dtype="float16")
    after, _ = steps(steps.state, bad_batch())
    assert float(after.loss_scale.value) == 2.0**15
    assert bool(after.guard.stopped) and int(after.guard.scale_skips) == 0


def test_at_the_smallest_scale_an_overflow_is_a_fault():
    before = TrainState(jnp.int32(7), {}, (), None, Guard.clean(), LossScale.start(LossScale.SMALLEST))
    guard, scale, apply = train_state.update_guard(before, jnp.array(True), jnp.array(False), max_bad_steps=1)
    assert bool(guard.stopped) and int(guard.first_bad) == 7 and not apply
    assert float(scale.value) == LossScale.SMALLEST


def test_the_scale_doubles_after_its_interval(monkeypatch):
    monkeypatch.setattr(LossScale, "INTERVAL", 3)
    scale, values = LossScale.start(8.0), []
    for finite in (True, True, True, True, True, False, True, True, True):
        scale = scale.update(jnp.array(finite))
        values.append(float(scale.value))
    assert values == [8, 8, 16, 16, 16, 8, 8, 8, 16]


def test_debias_ema_equals_its_definition():
    """With a decay for which 1 - decay is inaccurate in float32."""
    decay = 0.9999
    steps = make_steps(ema_decay=decay, model__dropout=0.0)
    after, seen = steps.state, []
    for _ in range(5):
        after, _ = steps(after, batch())
        seen.append(jax.device_get(after.params))
    weights = decay ** np.arange(4, -1, -1.0)
    averaged = train_state.debias_ema(after.ema, decay, after.updates, after.params)
    for path, result in averaged.items():
        expected = np.average([params[path] for params in seen], axis=0, weights=weights)
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
    # With decay 0 the average is the last value.
    assert_equal(train_state.debias_ema(after.params, 0.0, after.updates, after.params), after.params)


def test_average_before_the_first_update_is_the_parameters():
    steps = make_steps(max_bad_steps=2, ema_decay=0.9)
    assert_equal(
        train_state.debias_ema(steps.state.ema, 0.9, steps.state.updates, steps.state.params), steps.state.params
    )


def test_logged_rate_is_the_one_applied():
    """After a skipped update, the optimizer's schedule and the log are both one step behind."""
    steps = make_steps(max_bad_steps=2, optimizer__schedule="linear", optimizer__name="sgd")
    after, _ = steps(steps.state, bad_batch())
    after, metrics = steps(after, batch())
    assert metrics["learning_rate"][0] == pytest.approx(0.1)
    after, metrics = steps(after, batch())
    assert metrics["learning_rate"][0] == pytest.approx(0.1 * 0.99)


def test_frozen_leaves_have_no_optimizer_state():
    steps = make_steps()
    shapes = [leaf.shape for leaf in jax.tree.leaves(steps.state.opt_state)]
    assert sorted(shapes) == sorted([(), ()] + 2 * [leaf.shape for leaf in steps.state.params.values()])
    assert all(not path.startswith("tower") for path in steps.state.params)
    assert set(steps.frozen) == {"tower/kernel", "tower/bias"}


def test_merge_returns_the_model():
    config = toy_config()
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    task = task_class(config.task)(config, mesh)
    model = placed_model(task).model()
    x = jnp.ones((2, FEATURES))
    np.testing.assert_array_equal(model(x), task.init()(x))
    assert isinstance(model, nnx.Module)
