from pathlib import Path

import numpy as np
import pytest

from paligemma_jax.images.tf_resize import bilinear

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "tf_resize" / "resize.npz", allow_pickle=False)


def grey(rows):
    return np.repeat(np.array(rows, np.uint8)[:, :, None], 3, axis=2)


@pytest.mark.parametrize("case", range(6))
@pytest.mark.parametrize("variant", ["plain", "antialias"])
def test_bit_identical_to_tensorflow(case, variant):
    expected = GOLDEN[f"resized{case}_{variant}"]
    ours = bilinear(GOLDEN[f"image{case}"], expected.shape[:2], variant == "antialias")
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, expected)


def test_by_hand_two_to_four():
    # Output centres 0.5 .. 3.5 lie at -0.25, 0.25, 0.75, 1.25 of the input; the ends repeat the border.
    out = bilinear(grey([[0, 8], [16, 40]]), (4, 4))[..., 0]
    row = np.array([[0, 2, 6, 8], [16, 22, 34, 40]], float)
    np.testing.assert_allclose(out, [row[0], 0.75 * row[0] + 0.25 * row[1], 0.25 * row[0] + 0.75 * row[1], row[1]])


def test_by_hand_four_to_two():
    image = grey([[0, 10, 20, 70]])
    # Without antialiasing the centres fall between pixels 0, 1 and between 2, 3.
    assert bilinear(image, (1, 2))[0, :, 0].tolist() == [5, 45]
    # With it a triangle of radius 2 around 1.0 covers pixel centres 0.5, 1.5, 2.5 with 0.75, 0.75, 0.25.
    weights = np.array([0.75, 0.75, 0.25]) / 1.75
    expected = [weights @ [0, 10, 20], weights @ [70, 20, 10]]
    np.testing.assert_allclose(bilinear(image, (1, 2), True)[0, :, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), (16, 12), (31, 33)])
def test_a_constant_image_stays_constant(antialias, shape):
    np.testing.assert_allclose(bilinear(np.full((16, 12, 3), 200, np.uint8), shape, antialias), 200, rtol=1e-6)


@pytest.mark.parametrize("new", [4, 9, 24, 50])
def test_a_linear_ramp_is_reproduced_inside_the_border(new):
    old = 24
    ramp = grey([np.arange(old) * 10])
    out = bilinear(ramp, (1, new))[0, :, 0]
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    np.testing.assert_allclose(out, 10 * np.clip(centre, 0, old - 1), rtol=1e-5, atol=1e-4)


def test_antialias_averages_where_plain_sampling_aliases():
    stripes = grey([[0, 255] * 32])
    assert np.ptp(bilinear(stripes, (1, 7))) > 100
    assert np.abs(bilinear(stripes, (1, 7), True) - 127.5).max() < 6


def test_axes_are_not_mixed_up():
    image = np.random.default_rng(1).integers(0, 256, (9, 13, 3), np.uint8)
    for antialias in (False, True):
        out = bilinear(image, (4, 6), antialias)
        turned = bilinear(np.ascontiguousarray(image.swapaxes(0, 1)), (6, 4), antialias)
        np.testing.assert_allclose(out, turned.swapaxes(0, 1), rtol=1e-5)
