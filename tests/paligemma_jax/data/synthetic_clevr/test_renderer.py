"""Images show the scene's colours, materials, positions and lights."""

import copy
import hashlib

import numpy as np
import pytest

from paligemma_jax.data.synthetic_clevr import COLORS, boxes, render, sample_scene
from paligemma_jax.data.synthetic_clevr.geometry import cast, half_height


def one_object(shape="sphere", color="red", material="rubber", size="large", x=0.0, y=0.0):
    scene = copy.deepcopy(sample_scene(11, num_objects=(1, 1)))
    coords = [x, y, half_height(shape, size)]
    scene["objects"][0] |= {"shape": shape, "color": color, "material": material, "size": size, "3d_coords": coords}
    return scene


def patch(scene, size=64):
    """The object's own pixels, float [N, 3] in 0..1."""
    ids, _, _ = cast(scene, size, size)
    return render(scene, size, size)[ids == 0] / 255.0


def nearest_color(rgb, brightness=0.0):
    """Returns the name of CLEVR's colour nearest to display values 0..1, by hue and optionally brightness."""

    def place(rgb):
        rgb = np.asarray(rgb, np.float64)
        return np.concatenate([rgb / rgb.sum() * 3.0, [brightness * rgb.mean()]])

    distance = {name: np.linalg.norm(place(rgb) - place(np.array(color) / 255.0)) for name, color in COLORS.items()}
    return min(distance, key=distance.get)


def test_bytes_are_a_function_of_the_scene():
    scene = sample_scene(0)
    image = render(scene, 64, 64)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert np.array_equal(image, render(copy.deepcopy(scene), 64, 64))
    assert hashlib.sha256(image.tobytes()).hexdigest()[:16] == "12465da1663a1066"


@pytest.mark.parametrize("shape", ["cube", "sphere", "cylinder"])
@pytest.mark.parametrize("color", COLORS)
def test_a_rubber_object_shows_its_colour(color, shape):
    """The mean of its pixels, normalised by brightness, is nearest to its own colour."""
    assert nearest_color(patch(one_object(shape, color)).mean(axis=0), brightness=0.3) == color


def whole_objects(size, scenes):
    """Yields unoccluded objects of some scenes: entry, pixels, and the pixels around the projected centre."""
    for seed in range(scenes):
        scene = sample_scene((7, seed))
        image, (ids, _, _) = render(scene, size, size) / 255.0, cast(scene, size, size)
        for index, item in enumerate(scene["objects"]):
            alone, _, _ = cast(scene | {"objects": [item]}, size, size)
            if (ids == index).sum() == (alone == 0).sum():
                x, y = (int(q * size / full) for q, full in zip(item["pixel_coords"], (480, 320), strict=False))
                near = np.s_[y - size // 64 : y + size // 64 + 1, x - size // 64 : x + size // 64 + 1]
                yield item, image[ids == index], image[near][ids[near] == index]


@pytest.mark.parametrize("size, scenes", [(64, 30), (224, 10)])
def test_the_objects_of_a_scene_show_their_colours_where_they_project(size, scenes):
    """Rubber shows it at its centre; metal, which mirrors its surroundings, does so nearly always at 64 pixels."""
    metal = []
    for item, pixels, centre in whole_objects(size, scenes):
        assert len(centre) > 3
        if item["material"] == "rubber":
            assert nearest_color(centre.mean(axis=0), brightness=0.3) == item["color"]
        else:
            metal.append(nearest_color(np.median(pixels, axis=0)) == item["color"])
    assert len(metal) > scenes and np.mean(metal) >= (1.0 if size == 224 else 0.9)


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("shape", ["cube", "sphere", "cylinder"])
def test_metal_gleams_and_rubber_does_not(color, shape):
    """Relative to its mean, metal has brighter spots and more contrast, for every shape."""
    metal, rubber = (
        patch(one_object(shape, color, material, y=1.0), 128).mean(axis=1) for material in ("metal", "rubber")
    )
    assert metal.std() / metal.mean() > 1.1 * rubber.std() / rubber.mean()
    assert np.quantile(metal, 0.98) > np.quantile(rubber, 0.98)


def test_an_object_casts_a_shadow_and_covers_nothing_else():
    scene = one_object("cylinder")
    empty = scene | {"objects": []}
    ids, _, _ = cast(scene, 96, 64)
    change = render(scene, 96, 64).astype(int).sum(axis=-1) - render(empty, 96, 64).astype(int).sum(axis=-1)
    ground = change[ids < 0]
    assert (ground < -40).sum() > 50  # darker near the object
    assert (np.abs(ground) < 4).mean() > 0.5  # unchanged far from it
    corners = change[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert np.abs(corners).max() < 4


def test_nearer_objects_hide_farther_ones():
    scene = one_object("cube", "red", x=2.0, y=-1.74)
    hidden = copy.deepcopy(scene["objects"][0]) | {"3d_coords": [-0.3, 0.26, 0.28], "size": "small", "color": "cyan"}
    scene["objects"].append(hidden)
    ids, depth, _ = cast(scene, 96, 64)
    alone, alone_depth, _ = cast(scene | {"objects": [hidden]}, 96, 64)
    both = (ids == 0) & (alone == 0)
    assert both.any() and (depth[both] < alone_depth[both]).all()


def test_boxes_are_the_extent_of_the_visible_pixels():
    for shape in ("cube", "sphere", "cylinder"):
        for x, y in ((0.0, 0.0), (2.5, -2.0), (-2.0, 2.5)):
            scene = one_object(shape, x=x, y=y)
            ids, _, _ = cast(scene, 480, 320)
            ys, xs = np.nonzero(ids == 0)
            seen = np.array([ys.min() / 320, xs.min() / 480, (ys.max() + 1) / 320, (xs.max() + 1) / 480])
            np.testing.assert_allclose(boxes(scene)[0], seen, atol=1.5 / 320)


def test_boxes_hold_the_centres_and_do_not_depend_on_the_size():
    for seed in range(10):
        scene = sample_scene((4, seed))
        for (y0, x0, y1, x1), item in zip(boxes(scene), scene["objects"], strict=True):
            x, y, _ = item["pixel_coords"]
            assert x0 <= x / 480 <= x1 and y0 <= y / 320 <= y1


def test_supersampling_only_smooths():
    scene = sample_scene(2)
    coarse, fine = (render(scene, 64, 64, supersample=n).astype(float) for n in (1, 4))
    assert np.abs(coarse.mean() - fine.mean()) < 1.0
    assert np.median(np.abs(coarse - fine)) <= 1.0


def test_changing_the_view_restyles_an_image():
    scene = sample_scene(2)
    dark = scene | {"view": scene["view"] | {"ground": 0.3}}
    assert render(dark, 32, 32).mean() < render(scene, 32, 32).mean() - 20
