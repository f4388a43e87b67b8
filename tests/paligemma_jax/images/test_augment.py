"""Random views: seeded, switched individually, each with its own effect only."""

import colorsys
import dataclasses

import numpy as np
import pytest

from paligemma_jax.images import augment
from paligemma_jax.images.augment import Augmentation
from paligemma_jax.images.preprocessing import Preprocessing
from train_jax.core.errors import UserError

SIGLIP, CLIP = Preprocessing.siglip(24), Preprocessing.clip(24)


def image(height=40, width=60):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def view(augmentation, picture, seed=0, preprocessing=SIGLIP):
    return augmentation.view(picture, preprocessing, np.random.default_rng(seed))


@pytest.mark.parametrize("preprocessing", [SIGLIP, CLIP, Preprocessing.big_vision(24)])
def test_without_augmentation_a_view_equals_evaluation(preprocessing):
    seen = view(augment.NONE, image(), preprocessing=preprocessing)
    np.testing.assert_array_equal(seen, preprocessing.resize(image()))


@pytest.mark.parametrize("name", ["LIGHT", "STRONG", "SCENES_LIGHT", "SCENES_STRONG"])
@pytest.mark.parametrize("preprocessing", [SIGLIP, CLIP, Preprocessing.big_vision(24)])
def test_views_are_a_function_of_the_generator(name, preprocessing):
    augmentation = getattr(augment, name)
    first, again = (view(augmentation, image(), 3, preprocessing) for _ in range(2))
    assert first.shape == (24, 24, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, view(augmentation, image(), 4, preprocessing))


def test_colours_of_scenes_stay():
    assert augment.SCENES_LIGHT.color_jitter == augment.SCENES_STRONG.color_jitter == augment.NONE.color_jitter == 0
    plain = np.full((30, 30, 3), (41, 208, 208), np.uint8)
    for seed in range(20):
        np.testing.assert_array_equal(view(augment.SCENES_STRONG, plain, seed), view(augment.NONE, plain))


def test_half_of_the_views_are_flipped():
    straight, flipped = view(augment.NONE, image()), 0
    for seed in range(200):
        seen = view(Augmentation(flip=True), image(), seed)
        turned = np.array_equal(seen, straight[:, ::-1])
        assert turned or np.array_equal(seen, straight)
        flipped += turned
    assert 75 <= flipped <= 125  # 3.5 standard deviations


def test_crops_keep_the_requested_area():
    """The red and green channels hold the column and the row, so a view tells where its crop was."""
    rows, columns = np.mgrid[:200, :200].astype(np.uint8)
    place = np.stack([columns, rows, rows], -1)
    areas = []
    for seed in range(300):
        seen = view(Augmentation(crop=0.25), place, seed).astype(int)
        width, height = (np.ptp(seen[..., k]) * 24 / 23 for k in (0, 1))
        areas.append(width * height / 200**2)
        assert 0.7 <= width / height <= 1.45
    assert 0.2 < min(areas) < 0.3 and 0.9 < max(areas) < 1.05
    assert abs(np.mean(areas) - 0.625) < 0.05  # uniform; the largest ones of uneven sides do not fit


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (2, 3)])
def test_the_smallest_images_have_views(shape):
    for seed in range(5):
        assert view(augment.STRONG, image(*shape), seed).shape == (24, 24, 3)


def test_rotation_turns_about_the_centre_and_fills_with_the_mean():
    picture = np.zeros((25, 25, 3), np.uint8)
    picture[12, 12] = 255
    preprocessing = Preprocessing.siglip(25)
    for seed in range(10):
        seen = view(Augmentation(rotation=90.0), picture, seed, preprocessing)
        assert seen.argmax() // 3 == 12 * 25 + 12
    bright = np.full((24, 24, 3), 200, np.uint8)
    assert (view(Augmentation(rotation=45.0), bright) == 200).all()


def test_jitter_changes_colours_and_nothing_else():
    left = np.zeros((24, 24, 3), np.uint8) + np.array([200, 60, 60], np.uint8)
    left[:, 12:] = (60, 60, 200)
    hues = []
    for seed in range(100):
        seen = view(Augmentation(color_jitter=0.4), left, seed)
        assert (seen[:, :12] == seen[0, 0]).all() and (seen[:, 12:] == seen[0, -1]).all()
        hues.append((colorsys.rgb_to_hsv(*(seen[0, 0] / 255.0))[0] + 0.5) % 1 - 0.5)
    assert 0.08 < max(np.abs(hues)) <= 0.1 + 2 / 256  # a quarter of the strength


@pytest.mark.parametrize("wrong", [dict(crop=0.0), dict(crop=1.1), dict(color_jitter=-1.0), dict(rotation=200.0)])
def test_numbers_out_of_range(wrong):
    with pytest.raises(UserError, match="an augmentation has crop="):
        Augmentation(**wrong)


def test_a_crop_fills_the_square_with_a_centre_crop_preprocessing():
    cut = dataclasses.replace(CLIP, resized=32)
    views = [view(Augmentation(crop=0.5), image(), preprocessing=each) for each in (SIGLIP, cut)]
    np.testing.assert_array_equal(*views)
