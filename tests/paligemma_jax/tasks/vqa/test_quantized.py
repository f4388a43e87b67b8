"""A VQA run on a quantised base: trained, resumed, evaluated, merged; on one device and on several."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax import convert, loading
from paligemma_jax.adapt.lora.adapter import largest_logit_gap
from paligemma_jax.adapt.lora.merge_quantized import merge_quantized, probe_inputs
from paligemma_jax.adapt.quantization import quantize
from paligemma_jax.adapt.quantization.quantized_kernel import QUANTIZATION_KINDS
from paligemma_jax.inference.answer import predict
from paligemma_jax.tasks.vqa import figures as vqa_figures
from paligemma_jax.weights.reader import load
from tests.paligemma_jax.mini import mistake, png, read_lines, task_of, train_main
from tests.paligemma_jax.training import SMOOTH, Training, long_answers
from tests.train_jax.runs import assert_same_run, logged
from train_jax import loop
from train_jax.checkpoints.manager import Checkpoints
from train_jax.core import param_tree
from train_jax.report import startup

pytestmark = pytest.mark.usefixtures("fast_compilation")

OPTIONS = {"nf4": {"model.quantize_double": True}, "int8": {"eval.int8_outliers": 6.0}, "int4": {}}
STEP = {"cache_features": False, "adapter.targets": ".*", "data.suffix_length": 8}
MESHES = {
    "1x8x1": {"mesh.data": 1, "mesh.fsdp": 8, "mesh.tensor": 1},
    "2x2x2": {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2},
}


def arrays_of(model) -> dict[str, np.ndarray]:
    """Every array on the host."""
    return {path: np.asarray(array) for path, array in param_tree.flatten(model).items()}


def assert_same_arrays(arrays, expected):
    assert arrays.keys() == expected.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path, strict=True)


# A whole run.


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    with pytest.MonkeyPatch.context() as patch:  # they take longer than the steps
        patch.setattr(loop, "plot_curves", lambda *paths: None)
        patch.setattr(vqa_figures, "save_answer_sheet", lambda *args, **options: None)
        yield


@pytest.fixture(scope="module")
def run_options(mini_options):
    """Of each kind, twelve steps with a checkpoint after six; a shorter run is the beginning of a longer one."""
    short = {"eval.controls": False, "eval.candidates": "", "eval.before": False, "load_best_at_end": False}
    short |= {"log_steps": 1, "optimizer.schedule": "constant", "optimizer.warmup_percent": None}
    return lambda kind: mini_options | short | {"model.quantize": kind, "optimizer.learning_rate": 0.02} | OPTIONS[kind]


@pytest.fixture(scope="module", params=QUANTIZATION_KINDS)
def run(request, run_options, tmp_path_factory):
    """A kind and the workdir of a finished run on it; read-only."""
    workdir = tmp_path_factory.mktemp("runs") / request.param
    train_main(workdir, run_options(request.param))
    return request.param, workdir


@pytest.mark.slow
def test_a_run_learns_and_answers(run, tmp_path):
    kind, workdir = run
    losses = logged(workdir)
    assert min(losses[11], losses[12]) < losses[1]
    assert len(read_lines(workdir / "predictions.jsonl")) == 20
    (tmp_path / "picture.png").write_bytes(png(0))
    ((_, _, answer),) = predict(
        [str(tmp_path / "picture.png")], ["What is it?"], workdir=str(workdir), max_new_tokens=4
    )
    assert isinstance(answer, str)
    kernels = quantize.quantized_kernels(loading.load(workdir)).values()
    assert {kernel.kind for kernel in kernels} == {kind} and len(kernels) == 14
    assert {kernel.outlier_threshold for kernel in kernels} == {None}  # evaluation looked at a clone


@pytest.mark.slow
def test_an_interrupted_run_resumes_bit_for_bit(run, run_options, tmp_path):
    kind, straight = run
    options = run_options(kind)
    train_main(tmp_path, options | {"total_steps": 6})
    train_main(tmp_path, options)
    assert_same_run(tmp_path, straight, 12)
    assert (tmp_path / "predictions.jsonl").read_bytes() == (straight / "predictions.jsonl").read_bytes()


@pytest.mark.slow
def test_a_run_merges_the_weights_that_it_was_trained_on(run, tmp_path, capsys):
    """Whatever dtype it is read in; the folder that is written holds what `merge_quantized` gives."""
    kind, workdir = run
    model = loading.load(workdir)
    codes = {path: array for path, array in arrays_of(model).items() if "/kernel/" in path}
    half = arrays_of(loading.load(workdir, "bfloat16"))
    assert_same_arrays({path: half[path] for path in codes}, codes)
    merged, gap = merge_quantized(model)
    assert quantize.is_quantized(model) and not quantize.is_quantized(merged)
    rounded, rounded_gap = merge_quantized(model, requantize=True)
    assert {kernel.kind for kernel in quantize.quantized_kernels(rounded).values()} == {kind}
    assert 0 <= gap < rounded_gap / 10
    capsys.readouterr()
    convert.convert(str(workdir), str(tmp_path / "out"), "orbax")
    described = capsys.readouterr().out
    assert f"dequantised: 14 kernels in {kind}" in described and "logits move by at most" in described
    expected = {path: array.astype(np.float32) for path, array in arrays_of(merged).items()}
    assert_same_arrays(arrays_of(load(tmp_path / "out")), expected)


# Evaluation.


def test_outliers_are_split_in_evaluation_only(mini_options):
    task = task_of(mini_options | STEP | {"model.quantize": "int8", "eval.int8_outliers": 6.0})
    model = task.init()
    evaluated = task.evaluation(model).model
    for each, threshold in ((model, None), (evaluated, 6.0)):
        assert {kernel.outlier_threshold for kernel in quantize.quantized_kernels(each).values()} == {threshold}
    assert largest_logit_gap(model, evaluated, **probe_inputs(model)) > 0
    ours, theirs = param_tree.flatten(model), param_tree.flatten(evaluated)
    assert all(theirs[path] is array for path, array in ours.items())  # no second copy
    assert task_of(mini_options | STEP | {"model.quantize": "int8"}).evaluation(model).model is model


# The step.


@pytest.fixture(scope="module")
def training(mini_options):
    """Two steps with adapters everywhere, of a kind and a mesh; each is made once."""
    done = {}

    def make(kind, mesh=None):
        if (kind, mesh) not in done:
            options = mini_options | SMOOTH | STEP | {"model.quantize": kind} | MESHES.get(mesh, {}) | OPTIONS[kind]
            steps = Training(options, long_answers())
            done[kind, mesh] = steps, steps.run(2)
        return done[kind, mesh]

    return make


@pytest.mark.parametrize(("kind", "mesh"), [("nf4", "1x8x1"), ("nf4", "2x2x2"), ("int8", "2x2x2"), ("int4", "2x2x2")])
def test_two_steps_on_a_mesh_equal_one_device(training, kind, mesh):
    one, expected = training(kind)
    many, means = training(kind, mesh)
    for result, reference in zip(means, expected, strict=True):
        np.testing.assert_allclose(result["loss"], reference["loss"], rtol=1e-5)
        np.testing.assert_allclose(result["grad_norm"], reference["grad_norm"], rtol=1e-4)
    for path, array in many.trained().items():
        np.testing.assert_allclose(array, one.trained()[path], rtol=1e-3, atol=2e-5, err_msg=path)
    frozen = many.placed.frozen
    for path in ("mlp/gate_proj", "self_attn/q_proj", "mlp/down_proj"):  # cut as the plain kernels are
        codes = frozen[f"decoder/layers/{path}/kernel/codes"]
        parts = {"1x8x1": 8, "2x2x2": 4}[mesh]
        assert {shard.data.nbytes * parts for shard in codes.addressable_shards} == {codes.nbytes}, path


@pytest.mark.parametrize("kind", QUANTIZATION_KINDS)
def test_training_does_not_change_the_base(training, mini_folder, kind):
    steps, _ = training(kind)
    frozen = {path: np.asarray(array) for path, array in steps.placed.frozen.items()}
    assert any(re.fullmatch(quantize.FROZEN, path) for path in frozen)
    double = OPTIONS[kind].get("model.quantize_double", False)
    assert_same_arrays(frozen, arrays_of(load(mini_folder, quantize=kind, double=double)))
    assert all("/lora_" in path for path in steps.state.params)


@pytest.mark.parametrize("kind", QUANTIZATION_KINDS)
def test_the_report_counts_weights_and_true_bytes(training, mini_folder, kind):
    steps, _ = training(kind)
    task, placed = steps.task, steps.placed
    counts = task.parameter_counts(placed.model(steps.state.params))
    rows = startup.count_parameters({}, placed.frozen, (), counts)
    plain = startup.count_parameters({}, param_tree.flatten(load(mini_folder)), ())
    assert {tower: row["frozen"][0] for tower, row in rows.items()} == {
        tower: row["frozen"][0] for tower, row in plain.items()
    }
    assert sum(row["frozen"][1] for row in rows.values()) == sum(leaf.nbytes for leaf in placed.frozen.values())
    weights = sum(module.size for module in quantize.quantized_kernels(placed.model(steps.state.params)).values())
    described = task.describe(placed.model(steps.state.params)).splitlines()[-1]
    assert described.startswith(f"14 kernels in {kind}: {weights:,} weights of ")


def test_quantised_arrays_are_saved_and_restored_bit_for_bit(mini_options, tmp_path):
    """Onto another mesh, too."""
    options = mini_options | STEP | {"model.quantize": "nf4"} | OPTIONS["nf4"]
    saved, placed = (param_tree.flatten(task_of(options | MESHES[mesh]).base()) for mesh in ("1x8x1", "2x2x2"))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, saved, {"step": jnp.int32(1)}, {})
    arrays = checkpoints.restore_params(1, placed)
    checkpoints.close()
    assert {array.dtype.name for array in arrays.values()} == {"uint8", "float32"}
    for path, array in arrays.items():
        assert array.sharding == placed[path].sharding and array.dtype == saved[path].dtype
        np.testing.assert_array_equal(array, saved[path], err_msg=path)


# Mistakes.


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model.quantize": "nf5"}, "config.model.quantize='nf5', expected one of '', nf4, int8, int4"),
        ({"model.quantize": "nf4", "model.quantize_block_size": 32}, "model.quantize_block_size=32, expected one"),
        ({"model.quantize": "int8", "model.quantize_double": True}, "double quantisation is set for int8"),
        ({"model.quantize": "nf4", "adapter.name": "none"}, "which trains every parameter, expected kernels that stay"),
        ({"model.quantize": "nf4", "adapter.name": "none", "trainable": ".*q_proj.*", "cache_features": False},
         "trainable matches .*q_proj/kernel/absmax, which is quantised and cannot train"),
        ({"model.quantize": "nf4", "eval.int8_outliers": 6.0}, "eval.int8_outliers is 6.0 beside model.quantize='nf4'"),
        ({"model.quantize": "int8", "eval.int8_outliers": 0.0}, "config.eval.int8_outliers=0.0, expected a number"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(capsys, mini_options, tmp_path, changes, sentence):
    assert re.search(sentence, mistake(capsys, mini_options | changes, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_norms_and_biases_may_train_beside_quantised_kernels(mini_options):
    changes = {"model.quantize": "nf4", "adapter.name": "none", "trainable": ".*/(scale|bias)", "cache_features": False}
    changes |= {"optimizer.weight_decay": 0.0, "data.suffix_length": 8}
    training = Training(mini_options | SMOOTH | changes, long_answers())
    before = training.trained()
    training.run(1)
    moved = {path for path, array in training.trained().items() if not np.array_equal(array, before[path])}
    assert {path for path in before if path.startswith("decoder/")} <= moved
