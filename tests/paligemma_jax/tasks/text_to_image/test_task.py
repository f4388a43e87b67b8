"""Text to image: a run from end to end, the conditions of the model, the scores of samples, and prediction."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import flow_jax as fj
import paligemma_jax as pg
import predict as predict_script
from paligemma_jax import zero_shot
from paligemma_jax.data.synthetic_clevr import conditioning
from paligemma_jax.loading import load_run, run_config
from paligemma_jax.tasks.text_to_image.siglip_scorer import SigLIPScorer
from paligemma_jax.tasks.text_to_image.task import TextToImage
from tests.paligemma_jax.mini import ROOT, config_of, mistake, save_small_siglip
from train_jax import loop
from train_jax.config import command_line
from train_jax.core.errors import UserError
from train_jax.parallel import sharding
from train_jax.plan.planning import plan

pytestmark = pytest.mark.usefixtures("fast_compilation")

CONFIG = str(ROOT / "configs/flow_clevr.py:dit,smoke")
CAPTIONS = str(ROOT / "configs/flow_clevr.py:captions,dit,smoke")
OPTIONS = {
    "data.num_scenes": 12,
    "data.num_held_out": 6,
    "data.build_workers": 1,
    "data.image_size": 8,
    "data.threads": 0,
    "model.dit.width": 16,
    "model.dit.depth": 1,
    "model.dit.num_heads": 2,
    "mesh.data": 1,
}


@pytest.fixture(scope="module")
def siglip(make_random, tmp_path_factory):
    return save_small_siglip(make_random, tmp_path_factory.mktemp("siglip") / "model")


@pytest.fixture(scope="module")
def options(siglip, tmp_path_factory):
    return {"data.cache_dir": str(tmp_path_factory.mktemp("cache")), "siglip": str(siglip)} | OPTIONS


@pytest.fixture(scope="module")
def run(options, tmp_path_factory):
    """A finished run on captions; read-only."""
    workdir = tmp_path_factory.mktemp("runs") / "captions"
    loop.fit(config_of(options, CAPTIONS), workdir, "none")
    return workdir


def task_of(options, config=CONFIG, **changes):
    settings = config_of(options | changes, config)
    return TextToImage(settings, sharding.make_mesh(settings.mesh))


def test_a_run_writes_results_and_figures(run):
    results = json.loads((run / "eval.json").read_text())
    names = ("accuracy", "accuracy_all", *(f"accuracy_{name}" for name in conditioning.ATTRIBUTES))
    assert all(0 <= results[name + side] <= 1 for name in names for side in ("", "_data"))
    assert all(np.isfinite(results[name]) for name in ("frechet", "bpd", "nfe", "straightness"))
    for name in ("samples", "captions", "flow"):
        assert (run / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_captions_are_conditions_embedded_by_the_text_tower(options, siglip):
    task = task_of(options, CAPTIONS)
    row = task.train_source()[3]
    number = int(row["label"])
    text = task.descriptions.texts[number]
    assert text == task.data.train.text(3)
    model = pg.load(siglip)
    tokens, mask = pg.load_text_tokenizer(siglip, model.config.text.length)([text])
    expected, _ = model.encode_text(jnp.asarray(tokens), jnp.asarray(mask))
    np.testing.assert_allclose(task.descriptions.table[number], expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(task.descriptions.table[-1], 0.0)
    named = conditioning.named_attributes(text)
    truth = task.data.train._scenes.scenes[3]["objects"][0]
    assert named == {name: truth[name] for name in named} and "shape" in named


def test_attributes_are_conditions_by_their_indices(options):
    task = task_of(options)
    row = task.train_source()[3]
    truth = task.data.train._scenes.scenes[3]["objects"][0]
    expected = [values.index(truth[name]) for name, values in conditioning.ATTRIBUTES.items()]
    np.testing.assert_array_equal(task.descriptions.table[int(row["label"])], expected)


def test_labels_are_rows_of_the_condition_table(options):
    task = task_of(options, CAPTIONS)
    model = task.init()
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    model.model.outputs.kernel[...] = jnp.ones_like(model.model.outputs.kernel[...])
    model.model.modulation.kernel[...] = 0.1 * jax.random.normal(jax.random.key(1), model.model.modulation.kernel.shape)
    labels = jnp.array([3, task.num_classes])
    vectors = jnp.asarray(task.descriptions.table)[labels]
    np.testing.assert_array_equal(model(0.5, x, labels), model.model(0.5, x, vectors))
    assert np.abs(model(0.5, x, labels) - model(0.5, x, labels[::-1])).max() > 1e-4


def test_training_does_not_change_the_condition_table(run, options):
    task = task_of(options, CAPTIONS)
    trained = loop.load_model(task.config, run, "latest")
    start = task.init()
    np.testing.assert_array_equal(trained.table[...], start.table[...])
    assert np.abs(trained.model.outputs.kernel[...] - start.model.outputs.kernel[...]).max() > 0


def test_siglip_scores_are_accuracies_of_the_described_attributes(siglip):
    model = pg.load(siglip)
    tokenizer = pg.load_text_tokenizer(siglip, model.config.text.length)
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    attributes = [{"color": "red", "shape": "cube"}, {"shape": "sphere"}]
    labels = np.array([0, 1, 1, 0, 1])
    scorer = SigLIPScorer(model, tokenizer, attributes, (images[:2], labels[:2]))
    scorer.add(images[:3], labels[:3])
    scorer.add(images[3:], labels[3:])
    results = scorer.results()
    # The same by hand, for images that are scaled and classified one at a time.
    prepare = model.config.preprocessing
    pixels = np.stack([prepare.apply(image) for image in images])
    shapes, colors = conditioning.ATTRIBUTES["shape"], conditioning.ATTRIBUTES["color"]
    templates = ("a {}", "a large {}", "a small {}", "one object: a {}")
    predicted = zero_shot.zero_shot(model, tokenizer, pixels, shapes, templates).argmax(1)
    shape = np.array([shapes[i] for i in predicted]) == np.array([attributes[label]["shape"] for label in labels])
    templates = ("a {} cube", "a {} sphere", "a {} cylinder", "one object: a {} cube")
    color = zero_shot.zero_shot(model, tokenizer, pixels, colors, templates).argmax(1) == colors.index("red")
    red = labels == 0
    assert results["accuracy_shape"] == pytest.approx(shape.mean())
    assert results["accuracy_color"] == pytest.approx(color[red].mean())
    assert results["accuracy"] == pytest.approx((shape.mean() + color[red].mean()) / 2)
    assert results["accuracy_all"] == pytest.approx((shape & (color | ~red)).mean())
    assert results["accuracy_shape_data"] == pytest.approx(shape[:2].mean())
    assert "accuracy_size" not in results


def test_predict_draws_samples_of_the_flow(run, tmp_path, capsys):
    texts, file = ["a small red metal cube", "a sphere"], tmp_path / "x.png"
    flags = [f"--prompt={text}" for text in texts]
    command_line.run(predict_script.main, ["predict.py", f"--workdir={run}", f"--out={file}", "--seed=3", *flags])
    assert f"2 image(s) in {file}" in capsys.readouterr().out
    assert Image.open(file).size[0] > 100
    task = TextToImage(run_config(run), sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}))
    model = load_run(run, run_config(run))
    images = task.draw(model, texts, seed=3)
    x_0 = jnp.stack([jax.random.normal(jax.random.fold_in(jax.random.key(3), i), (8, 8, 3)) for i in range(2)])
    vectors = jnp.asarray(task.vectors(texts))
    expected = fj.sample(model.model, x_0, solver="euler", num_steps=4, args=(vectors,)).x
    np.testing.assert_array_equal(images, np.clip(np.floor((np.asarray(expected) + 1) * 128), 0, 255).astype(np.uint8))
    assert (task.draw(model, texts, seed=4) != images).any()


def test_a_run_is_planned_without_rendering(options, tmp_path):
    for config in (CONFIG, CAPTIONS):
        result = plan(config_of(options | {"data.cache_dir": str(tmp_path)}, config))
        assert result.programs and not list(tmp_path.iterdir())


def test_mistakes_are_one_sentence(options, tmp_path, capsys, run):
    message = mistake(capsys, options | {"siglip": None}, tmp_path / "a", config=CAPTIONS)
    assert "siglip is not set, expected a SigLIP whose text tower reads them" in message
    message = mistake(capsys, options | {"coupling.name": "exact"}, tmp_path / "b", config=CONFIG)
    assert "assigns each description a part of the noise" in message
    message = mistake(capsys, options | {"siglip": "tiny"}, tmp_path / "c", config=CAPTIONS)
    assert "siglip is tiny, which is not a SigLIP or CLIP" in message
    with pytest.raises(UserError, match="names no color and no material, expected all attributes"):
        task_of(options)._conditions(["a small cube"])
    with pytest.raises(SystemExit):
        command_line.run(predict_script.main, ["predict.py", f"--workdir={run}", "--image=x.png", "--prompt=a cube"])
    assert "expected prompts alone" in capsys.readouterr().err
