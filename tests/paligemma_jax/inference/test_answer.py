"""Answers about image files."""

import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pg
from paligemma_jax.data.few_shot.descriptions import fill_templates
from paligemma_jax.data.sources.clevr import ClevrQuestions
from paligemma_jax.images.preprocessing import Preprocessing
from paligemma_jax.inference import answer as predict_module
from paligemma_jax.inference.answer import predict, read_pixels
from tests.paligemma_jax.mini import prepared_scenes, read_lines
from train_jax.core.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")


@pytest.fixture(scope="module")
def scenes(mini_run, mini_options, tmp_path_factory):
    """The validation images of the run by name."""
    folder = tmp_path_factory.mktemp("scenes")
    source = ClevrQuestions(prepared_scenes(mini_options), "validation", "answer en {question}")
    for record in (source[i] for i in range(len(source))):
        (folder / record.image_name).write_bytes(record.image)
    return folder


def test_a_run_answers_as_in_its_evaluation(mini_run, scenes):
    rows = read_lines(mini_run / "predictions.jsonl")[:6]
    images = [str(scenes / row["image_name"]) for row in rows]
    result = predict(images, [row["question"] for row in rows], workdir=str(mini_run), max_new_tokens=4)
    assert result == [(image, row["question"], row["prediction"]) for image, row in zip(images, rows, strict=True)]


def test_batches_and_pairing(mini_folder, scenes, monkeypatch):
    images = sorted(map(str, scenes.iterdir()))
    options = {"model": str(mini_folder), "max_new_tokens": 3}
    together = predict(images[:3], ["caption en"], **options)
    monkeypatch.setattr(predict_module, "BATCH", 2)
    assert predict(images[:3], ["caption en"], **options) == together
    assert [(image, text) for image, text, _ in together] == [(image, "caption en") for image in images[:3]]
    assert len({answer for *_, answer in together}) > 1
    other = predict(images[:1], ["caption en", "detect a very long prompt indeed"], **options)
    assert other[0] == together[0]  # the neighbour's length does not matter


def test_prompts_of_several_lengths_share_a_program_and_padding_changes_no_answer(mini_folder, scenes, monkeypatch):
    images, lengths = [str(image) for image in sorted(scenes.iterdir())[:2]], []
    options = {"model": str(mini_folder), "max_new_tokens": 3}

    def generate(model, images, tokens, *rest, **more):
        lengths.append(tokens.shape[1])
        return pg.generate(model, images, tokens, *rest, **more)

    monkeypatch.setattr(predict_module, "generate", generate)
    prompts = ["caption en", "count the cubes", "any red cube left of a ball?"]
    padded = [predict(images, [prompt], **options) for prompt in prompts]
    assert lengths == [16] * 3
    monkeypatch.setattr(predict_module, "padded_length", lambda length: length)
    assert predict(images, prompts[:1], **options) == padded[0]
    assert lengths[3] < 16


def test_the_image_is_prepared_by_the_models_preprocessing(mini_folder, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    model, tokenizer = pg.load(mini_folder), pg.load_tokenizer(mini_folder)
    row = pg.make_example(tokenizer, "caption en", None, 20)
    images = model.config.preprocessing.apply(pixels)[None]
    tokens = pg.generate(model, images, row["tokens"][None], row["mask_input"][None], 3)
    result = predict([str(tmp_path / "a.png")], ["caption en"], model=str(mini_folder), max_new_tokens=3)
    assert result[0][2] == tokenizer.decode(np.asarray(tokens)[0].tolist())


def test_sampling_is_seeded(mini_folder, scenes):
    image = str(next(scenes.iterdir()))
    options = {"model": str(mini_folder), "max_new_tokens": 4, "sampler": "temperature"}
    answers = [predict([image], ["caption en"], seed=seed, **options)[0][2] for seed in (0, 0, 1)]
    assert answers[0] == answers[1] != answers[2]


def test_row_numbers_continue_from_batch_to_batch(mini_folder, scenes, monkeypatch):
    """A repeated prompt gets another random answer, whatever the batch size."""
    image = str(next(scenes.iterdir()))
    options = {"model": str(mini_folder), "max_new_tokens": 4, "sampler": "temperature", "temperature": 2.0}
    assert predict_module.BATCH == 16
    answers = [answer for *_, answer in predict([image], ["caption en"] * 20, **options)]
    assert len(set(answers)) == 20
    monkeypatch.setattr(predict_module, "BATCH", 4)
    assert [answer for *_, answer in predict([image], ["caption en"] * 20, **options)] == answers


@pytest.mark.parametrize("name", ["\ud83d.png", "a\0.png", "missing.png", "~nobody-of-this-name/a.png"])
def test_a_name_that_no_file_can_have_is_refused(name):
    with pytest.raises(UserError, match=r"png'? cannot be read \(.+\): correct --image\.$") as error:
        read_pixels(name, Preprocessing.siglip(8))
    assert str(error.value).isprintable()


def test_half_surrogate_pairs_are_refused_as_prompt_and_class():
    with pytest.raises(UserError, match=r"the prompt '\\udcff' holds bytes that are not UTF-8"):
        predict(["a.png"], ["what?", "\udcff"], model="tiny")
    with pytest.raises(UserError, match=r"the class or template '\\udcff' holds bytes"):
        fill_templates(["cat", "\udcff"], ["{}"])


@pytest.mark.parametrize("images, texts", [("a.png", ["what?"]), (["a.png"], "what?")])
def test_one_text_in_place_of_a_list_is_refused(images, texts):
    with pytest.raises(UserError, match="expected a list: put it into one"):
        predict(images, texts, model="tiny")


def test_a_dual_encoder_answers_no_prompts():
    with pytest.raises(UserError, match="tiny-siglip is no PaliGemma, .* --class"):
        predict(["a.png"], ["what?"], model="tiny-siglip")


def test_options_of_no_sampler_are_refused():
    with pytest.raises(UserError, match=r"not foo: leave it out\.$"):
        predict(["a.png"], ["what?"], model="tiny", sampler="temperature", foo=2)
    with pytest.raises(UserError, match="not top_p: leave it out or choose sampler 'nucleus'"):
        predict(["a.png"], ["what?"], model="tiny", sampler="temperature", top_p=0.5)


def test_an_unknown_sampler(mini_folder, scenes):
    with pytest.raises(UserError, match="sampler"):
        predict([str(next(scenes.iterdir()))], ["x"], model=str(mini_folder), sampler="best")
