"""Styles change a scene's appearance and not its content."""

import copy

import numpy as np
import pytest

from paligemma_jax.data.synthetic_clevr import render, sample_scene
from paligemma_jax.data.synthetic_clevr.geometry import cast
from paligemma_jax.data.synthetic_clevr.styles import STYLES, _restyled, render_styled

SCENE = sample_scene(4, (2, 2))
PLAIN = render(SCENE, 64, 64)
OBJECTS = cast(SCENE, 64, 64)[0]


def styled(name):
    return render_styled(SCENE, 64, 64, STYLES[name])


def test_the_plain_style_equals_the_renderer():
    np.testing.assert_array_equal(styled("plain"), PLAIN)
    np.testing.assert_array_equal(render(SCENE, 64, 64, light=(1.0, 1.0, 1.0)), PLAIN)


@pytest.mark.parametrize("name", sorted(set(STYLES) - {"plain"}))
def test_pixels_differ_and_geometry_does_not(name):
    before = copy.deepcopy(SCENE)
    image = styled(name)
    assert image.shape == PLAIN.shape and image.dtype == np.uint8
    np.testing.assert_array_equal(image, styled(name))
    assert np.abs(image.astype(int) - PLAIN).mean() > 1.0
    assert before == SCENE  # the scene itself is unchanged
    after = _restyled(SCENE, STYLES[name])
    assert after["objects"] == SCENE["objects"] and after["view"]["camera"] == SCENE["view"]["camera"]
    np.testing.assert_array_equal(cast(after, 64, 64)[0], OBJECTS)


def test_light_is_linear():
    """Display values are square roots of light unless clipped: a quarter of the light halves them."""
    plain = render(SCENE, 64, 64, supersample=1).astype(float)
    for light in ((0.25, 0.25, 0.25), (1.0, 0.9, 0.6)):
        image = render(SCENE, 64, 64, supersample=1, light=light)
        expected = plain * np.sqrt(light)
        assert np.abs(image - expected)[plain < 255].max() <= 1.0


def test_floors_change_the_floor():
    floor = OBJECTS < 0
    for name, tone in (("dark_floor", (0.2, 0.2, 0.2)), ("wood_floor", (0.6, 0.45, 0.3))):
        image = styled(name).astype(float)
        ratio = image[floor] / PLAIN[floor]
        inner = (PLAIN[floor] < 250) & (PLAIN[floor] > 30)
        for k in range(3):
            result = np.median(ratio[:, k][inner[:, k]])
            assert abs(result - tone[k] / 0.62) < 0.02


def test_noise_has_its_deviation_and_depends_on_the_scene():
    flat = (PLAIN > 60) & (PLAIN < 190)
    difference = styled("noise").astype(int) - PLAIN
    assert abs(difference[flat].std() - 25) < 1.0 and abs(difference[flat].mean()) < 1.0
    other = render_styled(SCENE | {"image_index": 1}, 64, 64, STYLES["noise"])
    assert not np.array_equal(other, styled("noise"))


def test_low_resolution_keeps_means_and_loses_detail():
    image = styled("low_resolution").astype(float)
    assert np.abs(image.mean((0, 1)) - PLAIN.mean((0, 1))).max() < 1.0
    assert np.abs(np.diff(image, axis=1)).sum() < 0.9 * np.abs(np.diff(PLAIN.astype(float), axis=1)).sum()
