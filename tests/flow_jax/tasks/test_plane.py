"""The task of flows in the plane: its training source and loss, results and files of a run, and refused settings."""

import json

import jax
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

import train
from flow_jax.data import toys
from flow_jax.data.plane_pairs import ToyPairs
from flow_jax.tasks import path_choice, plane_evaluation
from flow_jax.tasks.plane import PlaneFlow
from tests.paligemma_jax.mini import ROOT, arguments, mistake
from train_jax.config import command_line
from train_jax.config.base import stored_config
from train_jax.config.resume_check import check_resume
from train_jax.core.errors import UserError
from train_jax.data.pipeline import Pipeline
from train_jax.evaluate import evaluate as run_evaluation
from train_jax.parallel import sharding
from train_jax.plan.planning import plan
from train_jax.task import make_task

FLOW = str(ROOT / "configs/flow_2d.py")
SHORT = {
    "total_steps": 60,
    "eval_steps": 30,
    "checkpoint_steps": 30,
    "log_steps": 30,
    "batch_size": 64,
    "optimizer.warmup_steps": 5,
    "model.width": 32,
    "model.depth": 2,
    "data.num_examples": 2000,
    "eval.num_samples": 100,
    "eval.draws": 2,
    "eval.solver": "euler",
    "eval.num_steps": 4,
    "mesh.data": 1,
}


@pytest.fixture(scope="module", autouse=True)
def _fast(fast_compilation):
    """Much compiling, little computing."""


def test_exact_pairs_have_the_least_cost_of_the_step():
    plain, coupled = (ToyPairs("moons", "gaussian", 500, name, 3) for name in ("independent", "exact"))
    rows = np.arange(40, 100)
    one, other = plain.get_batch(rows, 7), coupled.get_batch(rows, 7)
    for name in one:
        np.testing.assert_array_equal(np.sort(one[name], axis=0), np.sort(other[name], axis=0))
    cost = np.square(one["x_0"][:, None] - one["x_1"][None]).sum(-1)
    best = cost[linear_sum_assignment(cost)].sum()
    assert np.square(other["x_0"] - other["x_1"]).sum() == pytest.approx(best, rel=1e-5)


def test_the_blueprint_has_the_rows_of_the_training_source():
    config = command_line.load_config(FLOW)
    with config.unlocked():
        config.mesh.data = 1
    blueprint = PlaneFlow.blueprint(config, sharding.make_mesh(config.mesh))
    row = blueprint.task.train_source()[0]
    assert {name: (array.shape, array.dtype) for name, array in row.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in blueprint.example.items()
    }
    assert [program.name for program in plan(config).programs] == ["training step"]


def test_noise_is_a_function_of_seed_step_and_row():
    def noise(seed: int, step: int, rows: np.ndarray) -> np.ndarray:
        pairs = ToyPairs("moons", "gaussian", 600, "independent", seed)
        return pairs.get_batch(np.arange(len(rows)), step, rows)["x_0"]

    whole = noise(0, 1, np.arange(600))
    assert len(np.unique(whole, axis=0)) == 600  # none is drawn twice
    for rows in (np.arange(5), np.arange(250, 300), np.array([3, 599])):
        np.testing.assert_array_equal(noise(0, 1, rows), whole[rows])
    for seed, step in ((1, 1), (0, 2)):
        assert not np.isin(noise(seed, step, np.arange(600)), whole).any()


def test_exact_pairs_have_the_least_cost_in_each_group_in_every_process():
    pairs = ToyPairs("moons", "gaussian", 500, "exact", 3, group=4)
    whole = Pipeline(pairs, 16, num_steps=9).batch_at(8)
    plain = Pipeline(ToyPairs("moons", "gaussian", 500, "independent", 3), 16, num_steps=9).batch_at(8)
    for rows in np.arange(16).reshape(-1, 4):
        x_0, x_1 = (plain[name][0][rows] for name in ("x_0", "x_1"))
        cost = np.square(x_0[:, None] - x_1[None]).sum(-1)
        np.testing.assert_array_equal(whole["x_1"][0][rows], x_1[linear_sum_assignment(cost)[1]])
    for group in (4, None):  # parts of 2 rows, of groups that others have a part of
        pairs = ToyPairs("moons", "gaussian", 500, "exact", 3, group)
        whole = Pipeline(pairs, 16, num_steps=9).batch_at(8)["x_1"].reshape(4, 2, 2, 2)
        parts = [Pipeline(pairs, 16, 4, num_steps=9, process_index=p, process_count=2).batch_at(8) for p in range(2)]
        for p in range(2):
            np.testing.assert_array_equal(parts[p]["x_1"], whole[:, p])


def task(**changes):
    config = command_line.load_from_flags(arguments(None, SHORT | changes, config=FLOW))[0]
    return make_task(config, sharding.make_mesh(config.mesh))


@pytest.mark.parametrize("path", [name for name in path_choice.PATHS if name != "gaussian"])  # needs functions
@pytest.mark.parametrize("coupling", ["independent", "exact", "sinkhorn"])
def test_every_path_and_coupling_has_a_finite_loss(path, coupling):
    changes = {"path.name": path, "coupling.name": coupling, "times": "stratified"}
    if path == "schroedinger_bridge" and coupling != "sinkhorn":
        with pytest.raises(UserError, match="under the entropic coupling alone, expected sinkhorn"):
            task(**changes)
        return
    chosen = task(**changes)
    batch = chosen.train_source().get_batch(np.arange(32), 0)
    loss, _ = chosen.loss(chosen.init(), batch, jax.random.split(jax.random.key(0), 32))
    assert np.isfinite(float(loss)) and float(loss) > 0


def test_epsilon_of_a_bridges_coupling_follows_from_its_sigma():
    """Tong et al. 2024: epsilon = 2 sigma^2, in the units of the squared distance."""
    changes = {"path.name": "schroedinger_bridge", "coupling.name": "sinkhorn"}
    assert task(**changes, **{"path.sigma": 0.5})._entropy() == {"epsilon": 0.5, "relative": False}
    x = np.linspace(-1, 1, 16, dtype=np.float32)[:, None] * np.ones(2, np.float32)
    batch = {"x_0": x, "x_1": x}
    losses = [
        float(chosen.loss(chosen.init(), batch, jax.random.split(jax.random.key(0), 16))[0])
        for chosen in (task(**changes, **{"path.sigma": sigma, "path.beta_max": 20.0}) for sigma in (1e-2, 10.0))
    ]
    assert losses[0] < 0.05 * losses[1]  # with little noise every row stays where it is


def test_a_run_learns_and_writes_its_figures(tmp_path):
    workdir = tmp_path / "run"
    train.main(arguments(workdir, SHORT, "--progress=none", config=FLOW))
    results = json.loads((workdir / "eval.json").read_text())
    for name in ("w2", "w2_data", "nll", "nfe", "straightness", "path_energy", "w2_ratio"):
        assert np.isfinite(results[name]), name
    assert results["nfe"] == 4 and 0 < results["coverage"] <= 1
    assert [nfe for nfe, _ in results["error_by_nfe"]] == [2 * steps for steps in plane_evaluation.STEPS]
    assert [step for step, _ in results["w2_by_step"]] == [30, 60]
    noise, data = (toys.draw(name, 100, 9) for name in ("gaussian", "checkerboard"))
    untrained = np.square(noise[:, None] - data[None]).sum(-1)
    assert results["w2"] < np.sqrt(untrained[linear_sum_assignment(untrained)].mean())
    for name in ("samples.png", "field.png", "trajectories.png", "density.png", "curves.png"):
        assert (workdir / name).read_bytes().startswith(b"\x89PNG")
    assert (workdir / "flow.gif").read_bytes().startswith(b"GIF89a")


def test_a_transport_between_two_distributions_has_no_likelihood(tmp_path):
    train.main(
        arguments(tmp_path, SHORT | {"total_steps": 30}, "--progress=none", config=f"{FLOW}:8gaussians_to_moons")
    )
    results = json.loads((tmp_path / "eval.json").read_text())
    assert results["nll"] is None and not (tmp_path / "density.png").exists()
    with pytest.raises(UserError, match="split is 'val', but the evaluation data of this run have no splits"):
        run_evaluation(stored_config(tmp_path), tmp_path, "val")


def test_a_run_resumes_with_other_micro_batches_but_not_with_other_groups():
    options = SHORT | {"coupling.group": 16}
    old = command_line.load_from_flags(arguments(None, options, config=FLOW))[0]
    cut, grouped = (
        command_line.load_from_flags(arguments(None, options | change, config=FLOW))[0]
        for change in ({"micro_batch": 8}, {"coupling.group": 8})
    )
    assert check_resume(old, cut) == ["micro_batch: None -> 8 (does not change the mathematics)"]
    with pytest.raises(UserError, match="a run with another config .coupling.group: 16 -> 8."):
        check_resume(old, grouped)


def test_gradients_of_a_run_do_not_depend_on_its_micro_batches(tmp_path):
    """With times, noise of the path and an exact coupling, as the log has them."""
    options = SHORT | {
        "total_steps": 2,
        "optimizer.warmup_steps": 1,
        "log_steps": 1,
        "path.name": "cfm",
        "times": "stratified",
    }
    logged = []
    for micro in (None, 16):
        workdir = tmp_path / str(micro)
        train.main(arguments(workdir, options | {"micro_batch": micro}, "--progress=none", config=FLOW))
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        logged.append([(line["loss"], line["grad_norm"]) for line in lines if "grad_norm" in line])
    np.testing.assert_allclose(logged[1], logged[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"path.name": "ot"}, "config.path.name='ot', expected one of cond_ot, cfm, vp, linear_vp, ve, cosine, "
         "polynomial, schroedinger_bridge, gaussian: change it"),
        ({"coupling.name": "emd"}, "config.coupling.name='emd', expected one of independent, exact, sinkhorn: change "
         "it"),
        ({"data.name": "swiss"}, "data.name is 'swiss', expected one of checkerboard, 8gaussians, moons, spirals, "
         "gaussian, or an import path such as 'my_package.my_module:function'; did you mean 'spirals'?"),
        ({"data.noise": "nowhere:points"}, "data.noise='nowhere:points': there is no module 'nowhere': correct the "
         "import path"),
        ({"coupling.name": "sinkhorn", "micro_batch": 8}, "micro_batch is 8 beside coupling.name='sinkhorn', which "
         "pairs the rows of a step: set micro_batch=None."),
        ({"coupling.name": "sinkhorn", "coupling.group": 16, "micro_batch": 8}, "micro_batch is 8 beside "
         "coupling.name='sinkhorn', which pairs coupling.group=16 rows in the step, expected a multiple of 16: change "
         "one of the two."),
        ({"coupling.group": 48}, "coupling.group is 48, expected a divisor of batch_size=64, so that groups fill a "
         "batch: change it, or set it to None for all rows of a batch."),
        ({"coupling.name": "independent", "coupling.group": 4}, "coupling.group is 4 beside "
         "coupling.name='independent', which pairs no rows with one another, expected None: leave one of the two out."),
        ({"eval.solver": "foo"}, "config.eval.solver='foo', expected one of euler, midpoint, heun, rk4, dopri5, "
         "tsit5, dopri8: change it"),
        ({"model.activation": "foo"}, "model: the activation is 'foo', expected a function of jax.nn, such as silu, "
         "gelu or selu."),
        ({"path.sigma_min": -0.5}, "config.path.sigma_min=-0.5, expected a number from 0 to 1: change it"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path, capsys, changes, sentence):
    assert mistake(capsys, SHORT | changes, tmp_path / "run", config=FLOW) == sentence


def test_an_unknown_argument_of_the_config(tmp_path, capsys):
    message = mistake(capsys, {}, tmp_path / "run", config=f"{FLOW}:swissroll")
    assert message.startswith("config argument 'swissroll': expected one of checkerboard, 8gaussians, moons, spirals")
