"""Image files classified by a dual encoder, in Python and from the command line."""

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import paligemma_jax as pg
import predict as predict_script
from paligemma_jax import zero_shot
from paligemma_jax.data.few_shot.class_folders import class_folders
from paligemma_jax.inference import classify as module
from paligemma_jax.inference.classify import classify
from paligemma_jax.models.dual_encoder import DualEncoder
from paligemma_jax.tasks import classify_folders
from paligemma_jax.tasks.classify_folders import accuracies
from tests.paligemma_jax.mini import save_small_siglip
from train_jax.config import command_line
from train_jax.core.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")

CLASSES, TEMPLATES = ("cube", "ball", "cylinder"), ("a {}", "one object: a {}")


@pytest.fixture(scope="module")
def folder(make_random, tmp_path_factory):
    return save_small_siglip(make_random, tmp_path_factory.mktemp("siglip") / "model")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Class folders: two cubes and three small balls."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, number in (("cube", 2), ("small_ball", 3)):
        (root / name).mkdir()
        for index in range(number):
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(root / name / f"{index}.png")
    (root / "empty").mkdir()
    (root / "cube/notes.txt").write_text("no image")
    return root


def files_of(pictures):
    return [str(file) for file in sorted(pictures.glob("*/*.png"))]


@pytest.mark.parametrize("batch", [2, 32])
def test_likelihoods_are_sigmoids_of_the_models_logits(folder, pictures, monkeypatch, batch):
    monkeypatch.setattr(module, "BATCH", batch)
    files, calls = files_of(pictures), []
    result = classify(files, CLASSES, TEMPLATES, model=folder, on_progress=lambda *counts: calls.append(counts))
    model = pg.load(folder)
    prepare = model.config.preprocessing
    images = np.stack([prepare.apply(np.asarray(Image.open(file))) for file in files])
    words = pg.load_text_tokenizer(folder, model.config.text.length)
    cosines = zero_shot.zero_shot(model, words, images, CLASSES, TEMPLATES)
    logits = np.exp(model.logit_scale[...]) * cosines + model.logit_bias[...]
    np.testing.assert_allclose(result, 1 / (1 + np.exp(-logits)), rtol=1e-4, atol=1e-6)
    assert calls[-1] == (5, 5) and len(calls) == -(-5 // batch)


def test_a_second_call_compiles_nothing(folder, pictures, monkeypatch):
    traced, original = [], DualEncoder.encode_image
    monkeypatch.setattr(DualEncoder, "encode_image", lambda *given: (traced.append(1), original(*given))[1])
    for _ in range(2):
        classify(files_of(pictures)[:3], CLASSES, model=folder)
    assert len(traced) == 1


def test_a_clips_likelihoods_are_a_softmax(folder, pictures, monkeypatch):
    model = pg.load(folder)
    model.logit_bias = nnx.data(None)
    monkeypatch.setattr(module, "load", lambda *args, **options: model)
    result = classify(files_of(pictures), CLASSES, model=folder)
    np.testing.assert_allclose(result.sum(1), 1, rtol=1e-5)


def test_class_folders(pictures, tmp_path):
    result = class_folders(pictures)
    assert {name: len(files) for name, files in result.items()} == {"cube": 2, "small ball": 3}
    with pytest.raises(UserError, match="holds 0 folder"):
        class_folders(tmp_path)


def test_accuracies_computed_by_hand():
    scores = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.3, 0.7]])
    result = accuracies(scores, np.array([0, 0, 1, 1]), ("cube", "ball"))
    assert result == {"accuracy": 0.75, "mean_class_accuracy": 0.75, "cube": 0.5, "ball": 1.0}


def test_the_command_measures_a_folder(folder, pictures, capsys):
    command_line.run(classify_folders.main, ["classify", str(folder), str(pictures), "--template=a {}"])
    lines = dict(line.rsplit(None, 1) for line in capsys.readouterr().out.strip().splitlines() if ":" not in line)
    files = class_folders(pictures)
    scores = classify([f for group in files.values() for f in group], list(files), ("a {}",), model=folder)
    expected = accuracies(scores, np.array([0, 0, 1, 1, 1]), list(files))
    assert {name.strip(): float(value) for name, value in lines.items()} == pytest.approx(expected, abs=1e-4)


def test_predict_with_classes(folder, pictures, capsys):
    file = files_of(pictures)[0]
    options = [f"--model={folder}", f"--image={file}", "--class=cube", "--class=ball", "--template=a {}"]
    command_line.run(predict_script.main, ["predict.py", *options])
    scores = classify([file], ("cube", "ball"), ("a {}",), model=folder)[0]
    assert capsys.readouterr().out == f"{file}  cube {scores[0]:.3f}  ball {scores[1]:.3f}\n"


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--model=tiny", "--image=x.png"], "tiny is no SigLIP or CLIP, which --class needs"),
        (["--model=tiny", "--image=x.png", "--prompt=answer"], "found 'answer' beside --class"),
        (["--image=x.png"], "give either --workdir=DIR"),
        (["--model=tiny"], "no image is given to classify"),
    ],
)
def test_mistakes(capsys, more, sentence):
    with pytest.raises(SystemExit):
        command_line.run(predict_script.main, ["predict.py", "--class=cube", *more])
    assert sentence in capsys.readouterr().err
