"""Zero-shot classification and retrieval, compared with results computed by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paligemma_jax import zero_shot
from paligemma_jax.images.preprocessing import Preprocessing
from paligemma_jax.models.dual_encoder import DualEncoder, DualEncoderConfig
from paligemma_jax.models.text_encoder import TextConfig
from paligemma_jax.models.vit import ViTConfig
from train_jax.core.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")

SIZES = dict(width=16, depth=1, mlp_dim=24, num_heads=2)
CONFIG = DualEncoderConfig(
    ViTConfig(12, 4, **SIZES), TextConfig(31, 6, **SIZES), embed_dim=16, preprocessing=Preprocessing.siglip(12)
)
TEMPLATES = ("a {}", "one object: a {}", "{}")


@pytest.fixture(scope="module")
def model(make_random):
    return make_random(nnx.eval_shape(lambda: DualEncoder(CONFIG, rngs=nnx.Rngs(0))))


def tokenize(texts):
    """Letters as tokens, with a mask of all True."""
    tokens = np.array([[ord(letter) % 31 for letter in text.ljust(6)[-6:]] for text in texts], np.int32)
    return tokens, np.ones(tokens.shape, bool)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_a_class_is_the_mean_of_its_prompts(model):
    result = zero_shot.class_embeddings(model, tokenize, ("cube", "ball"), TEMPLATES)
    for row, name in zip(result, ("cube", "ball"), strict=True):
        tokens, mask = tokenize([template.format(name) for template in TEMPLATES])
        prompts = np.asarray(model.encode_text(jnp.asarray(tokens), jnp.asarray(mask))[0])
        np.testing.assert_allclose(row, unit(prompts.mean(0)[None])[0], atol=1e-5)


def test_scores_are_cosines_of_images_and_classes(model):
    images = np.random.default_rng(0).uniform(-1, 1, (3, 12, 12, 3)).astype(np.float32)
    scores = zero_shot.zero_shot(model, tokenize, images, ("cube", "ball"), TEMPLATES)
    embeds = np.asarray(model.encode_image(jnp.asarray(images))[0])
    classes = zero_shot.class_embeddings(model, tokenize, ("cube", "ball"), TEMPLATES)
    np.testing.assert_allclose(scores, embeds @ classes.T, atol=1e-5)


def test_texts_and_images_are_embedded_without_recompiling(model, monkeypatch):
    """Traced once; then no Python of the model runs, for any number of rows up to a power of two."""
    images, traced = np.zeros((5, 12, 12, 3), np.float32), []
    for name in ("encode_text", "encode_image"):
        original = getattr(DualEncoder, name)
        monkeypatch.setattr(DualEncoder, name, lambda *given, f=original, n=name: (traced.append(n), f(*given))[1])
    jax.clear_caches()
    first = zero_shot.zero_shot(model, tokenize, images, ("cube", "ball", "cone"), ("a {}",))
    assert sorted(traced) == ["encode_image", "encode_text"]
    again = zero_shot.zero_shot(model, tokenize, images[:5], ("cube", "ball", "cone", "cup"), ("a {}",))
    assert len(traced) == 2
    np.testing.assert_array_equal(again[:, :3], first)


def test_any_number_of_texts_is_embedded(model):
    texts = [f"text {number}" for number in range(70)]
    whole = zero_shot.embed_texts(model, tokenize, texts)
    for number in (1, 2, 3, 64, 65, 70):
        np.testing.assert_allclose(zero_shot.embed_texts(model, tokenize, texts[:number]), whole[:number], atol=1e-6)


@pytest.mark.parametrize(
    ("classes", "templates", "message"),
    [((), ("{}",), "0 classes"), (("cube",), ("a cube",), "'a cube'"), (("cube",), (), "'none'")],
)
def test_invalid_classes_and_templates_are_refused(model, classes, templates, message):
    with pytest.raises(UserError, match=message):
        zero_shot.class_embeddings(model, tokenize, classes, templates)


def test_recall_of_known_ranks():
    """The right column is first, second and third; in the last row it ties with two others, which counts against it."""
    similarity = np.array([[3.0, 2, 1, 0], [3, 2, 1, 0], [3, 2, 1, 0], [1, 1, 0, 1]])
    assert zero_shot.recall(similarity, np.array([0, 1, 2, 0]), (1, 2, 3)) == {1: 0.25, 2: 0.5, 3: 1.0}


def test_retrieval_both_ways():
    """Image 0 finds text 0, image 1 finds text 0 as well; of the texts, both find image 1."""
    images, texts = np.array([[1.0, 0], [2, 1]]), np.array([[1.0, 0], [0, 0.5]])
    result = zero_shot.retrieval(images, texts)
    assert result["image_to_text_r1"] == result["text_to_image_r1"] == result["mean_r1"] == 0.5
    assert result["image_to_text_r5"] == result["text_to_image_r10"] == 1.0


def test_any_equal_caption_is_a_hit():
    """Two images of a cat, two captions "a cat": the second image is more similar to the first caption."""
    images = np.array([[1.0, 0, 0], [0.999, 0.0447, 0], [0, 1, 0], [0, 0, 1]])
    texts = np.eye(3)[[0, 0, 1, 2]]
    assert set(zero_shot.retrieval(images, texts).values()) == {1.0}
    assert set(zero_shot.retrieval(images, texts, ["cat", "cat", "dog", "fish"]).values()) == {1.0}
    apart = zero_shot.retrieval(images, texts, ["cat", "a cat", "dog", "fish"])
    assert apart["image_to_text_r1"] == 0.5 and apart["text_to_image_r1"] == 0.75  # ties count against both


@pytest.mark.parametrize(
    "images, texts, captions, message",
    [
        (np.eye(3), np.eye(3), ["a cat"], "3 pairs come with 1 captions"),
        (np.eye(3), np.eye(3)[:2], None, r"are \[3, 3\] and text embeddings \[2, 3\]"),
        (np.eye(3), np.eye(3, 4), None, r"are \[3, 3\] and text embeddings \[3, 4\]"),
        (np.ones(3), np.ones(3), None, r"are \[3\] and"),
        (np.ones((0, 3)), np.ones((0, 3)), None, r"are \[0, 3\] and"),
    ],
)
def test_embeddings_that_are_not_pairs_are_refused(images, texts, captions, message):
    """With one caption for three pairs everything would be a hit."""
    with pytest.raises(UserError, match=message):
        zero_shot.retrieval(images, texts, captions)


def test_equal_captions_count_once_with_their_best_rank():
    similarity = np.array([[0.1, 0.9, 0.5], [0.9, 0.1, 0.5], [0.6, 0.7, 0.5]])
    right = np.array([[True, True, False], [True, True, False], [False, False, True]])
    assert zero_shot.recall(similarity, right, (1, 2, 3)) == {1: 2 / 3, 2: 2 / 3, 3: 1.0}


def test_a_constant_text_tower_retrieves_nothing():
    images = np.random.default_rng(0).standard_normal((20, 4))
    for captions in (None, [f"caption {number}" for number in range(20)]):
        result = zero_shot.retrieval(images, np.ones((20, 4)), captions)
        assert result["image_to_text_r1"] == result["image_to_text_r10"] == 0


def test_nan_is_never_a_hit():
    similarity = np.full((3, 3), np.nan)
    assert zero_shot.recall(similarity, np.arange(3), (1, 10)) == {1: 0, 10: 0}


def test_rows_are_embedded_as_one_by_one(model):
    rng = np.random.default_rng(1)
    tokens, mask = tokenize(["red", "blue", "green", "gray", "cyan"])
    rows = [
        {"image": rng.integers(0, 256, (12, 12, 3), np.uint8), "tokens": tokens[i], "mask": mask[i]} for i in range(5)
    ]
    images, texts, used = zero_shot.embed(model, rows, batch_size=2)
    assert used == [0, 1, 2, 3, 4]
    assert images.shape == texts.shape == (5, 16)
    for i, row in enumerate(rows):
        pixels = CONFIG.preprocessing.normalize(jnp.asarray(row["image"][None]))
        zimg, ztxt, _ = model(pixels, jnp.asarray(tokens[i : i + 1]), jnp.asarray(mask[i : i + 1]))
        np.testing.assert_allclose(images[i], zimg[0], atol=1e-5)
        np.testing.assert_allclose(texts[i], ztxt[0], atol=1e-5)


def test_rows_of_weight_0_are_left_out(model):
    tokens, mask = tokenize(["red", "blue", "green"])
    image = np.zeros((12, 12, 3), np.uint8)
    rows = [{"image": image, "tokens": tokens[i], "mask": mask[i]} for i in range(3)]
    every = zero_shot.embed(model, rows, batch_size=2)
    some = zero_shot.embed(model, [row | {"weight": np.float32(i != 1)} for i, row in enumerate(rows)], batch_size=2)
    assert some.rows == [0, 2]
    np.testing.assert_array_equal(some.texts, every.texts[[0, 2]])


def test_calibration_computed_by_hand():
    """Two bins: of .1 and .3 one in two is true, of .9 and 1 all."""
    bins = zero_shot.calibration(np.array([0.1, 0.3, 0.9, 1.0]), np.array([False, True, True, True]), 2)
    np.testing.assert_allclose(bins.likely, [0.2, 0.95])
    assert bins.true.tolist() == [0.5, 1.0] and bins.count.tolist() == [2, 2]
    assert zero_shot.calibration_error(bins) == pytest.approx((0.3 * 2 + 0.05 * 2) / 4)


def test_empty_bins_add_nothing():
    bins = zero_shot.calibration(np.array([0.05, 0.95]), np.array([False, True]), 10)
    assert np.isnan(bins.true[5]) and zero_shot.calibration_error(bins) == pytest.approx(0.05)


def test_a_tokenizer_of_another_model_is_refused(model):
    """Clamped ids would give plausible scores; inside jit an id beyond the embedding gives NaN."""

    def other(texts):
        tokens, mask = tokenize(texts)
        return np.where(tokens == tokens[0, 0], 31, tokens), mask

    images = np.zeros((1, 12, 12, 3), np.float32)
    rows = [{"image": np.zeros((12, 12, 3), np.uint8), "tokens": other(["cube"])[0][0], "mask": np.ones(6, bool)}]
    for call in (
        lambda: zero_shot.class_embeddings(model, other, ("cube",)),
        lambda: zero_shot.zero_shot(model, other, images, ("cube", "ball")),
        lambda: zero_shot.embed_texts(model, other, ["cube"]),
        lambda: zero_shot.embed(model, rows),
    ):
        with pytest.raises(UserError, match="texts hold the id 31, expected ids from 0 to 30: use this model's"):
            call()
    tokens, mask = map(jnp.asarray, other(["cube"]))
    assert np.isnan(model.encode_text(tokens, mask)[0]).all()


def test_a_clip_needs_its_end_mark(make_random):
    text = TextConfig(31, 6, **SIZES, causal=True, pool="eos", eos_token=30)
    clip = make_random(nnx.eval_shape(lambda: DualEncoder(dataclasses.replace(CONFIG, text=text), rngs=nnx.Rngs(0))))
    with pytest.raises(UserError, match="a text lacks the end mark 30"):
        zero_shot.embed_texts(clip, lambda texts: (np.zeros((1, 6), np.int32), np.ones((1, 6), bool)), ["cube"])
