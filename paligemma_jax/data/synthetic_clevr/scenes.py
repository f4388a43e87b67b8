"""Random scenes in the layout of CLEVR v1.0's scenes JSON, sampled by its rules (Johnson et al. 2017, section 3)."""

from typing import Any

import numpy as np

from paligemma_jax.data.synthetic_clevr.attributes import COLORS, MATERIALS, RELATIONS, SHAPES, SIZES
from paligemma_jax.data.synthetic_clevr.geometry import WINDOW, Camera, camera_of, half_height, project, visible_pixels

MIN_DISTANCE = 0.25  # between the hulls of two objects on the ground, world units
MARGIN = 0.4  # between two objects along each of the four directions, so that no relation is close to a tie
_EXTENT = 3.0  # x and y of objects are within [-3, 3]
_MIN_VISIBLE = 16 / (96 * 64)  # smallest visible share of the image, as CLEVR's 200 of 320 x 240 pixels
_TRIES_PER_OBJECT = 50

# Blender positions of CLEVR's base scene and the half-widths of their jitter.
_CAMERA, _CAMERA_JITTER = (7.48, -6.51, 5.34), 0.5
_LIGHTS, _LIGHT_JITTER = {"key": (6.45, -2.91, 4.26), "fill": (-4.67, -4.01, 3.01), "back": (-1.11, 2.65, 5.82)}, 1.0


def sample_scene(
    seed: tuple[int, ...] | int,
    num_objects: tuple[int, int] = (3, 10),
    image_index: int = 0,
    image_filename: str = "",
    split: str = "",
) -> dict[str, Any]:
    """Returns a random scene that is a function of `seed` alone, on every machine.

    `num_objects` is an inclusive range (the official one by default). Beside the official keys (objects,
    relationships, directions, image_index, image_filename, split) the scene has `view`: camera and light positions
    and the ground's gray level, which `render` also needs; change it to restyle an image. `pixel_coords` are
    [x, y, depth] in the official 480 x 320 window. Any two objects are `MARGIN` apart along all four directions, and
    each is visible on at least 0.26 % of the image. Raises ValueError for a range outside 1..10.
    """
    low, high = num_objects
    if not 1 <= low <= high <= 10:
        raise ValueError(f"num_objects is {num_objects}; expected 1 <= lowest <= highest <= 10 (CLEVR counts to ten).")
    rng = np.random.Generator(np.random.PCG64(seed))
    count = low + int(rng.random() * (high - low + 1))
    view = _sample_view(rng)
    scene = {"split": split, "image_index": image_index, "image_filename": image_filename, "view": view}
    camera = camera_of(scene)
    scene["directions"] = _directions(camera)
    while True:
        scene["objects"] = _place_objects(rng, count, camera)
        pixels = visible_pixels(scene, 96, 64)
        if pixels.min() >= _MIN_VISIBLE * 96 * 64:
            break
    scene["relationships"] = relationships(scene)
    return scene


def relationships(scene: dict) -> dict[str, list[list[int]]]:
    """Returns, for each relation and object i, the objects in that relation to i (`left`[i]: those left of i)."""
    coords = np.array([item["3d_coords"] for item in scene["objects"]], np.float64)
    out = {}
    for name in RELATIONS:
        dx, dy, _ = scene["directions"][name]
        along = coords[:, 0] * dx + coords[:, 1] * dy
        out[name] = [np.flatnonzero(along > along[i] + MARGIN / 2).tolist() for i in range(len(coords))]
    return out


def _sample_view(rng: np.random.Generator) -> dict[str, Any]:
    def jitter(position, amount):
        return [round(p + amount * (2.0 * rng.random() - 1.0), 4) for p in position]

    return {
        "camera": jitter(_CAMERA, _CAMERA_JITTER),
        "lights": {name: jitter(position, _LIGHT_JITTER) for name, position in _LIGHTS.items()},
        "ground": 0.62,
    }


def _directions(camera: Camera) -> dict[str, list[float]]:
    """Returns unit vectors along the ground as the camera sees them, and above / below."""
    right = [round(v, 6) for v in camera.right]
    behind = [round(-right[1], 6), right[0], 0.0]
    named = {"right": right, "behind": behind, "above": [0.0, 0.0, 1.0]}
    opposite = {"right": "left", "behind": "front", "above": "below"}
    return named | {opposite[name]: [-v if v else 0.0 for v in vector] for name, vector in named.items()}


def _pick(rng: np.random.Generator, options):
    options = tuple(options)
    return options[int(rng.random() * len(options))]


def _place_objects(rng: np.random.Generator, count: int, camera: Camera) -> list[dict[str, Any]]:
    """Returns `count` objects at their minimum distances; starts over when one does not fit."""
    while True:
        placed: list[dict[str, Any]] = []
        while len(placed) < count:
            size = _pick(rng, SIZES)
            spot = _find_spot(rng, SIZES[size], placed, camera)
            if spot is None:
                break
            placed.append(_sample_object(rng, size, spot, camera))
        else:
            return placed


def _find_spot(rng, radius: float, placed: list[dict], camera: Camera) -> tuple[float, float] | None:
    rx, ry, _ = camera.right
    for _ in range(_TRIES_PER_OBJECT):
        x, y = (round((2.0 * rng.random() - 1.0) * _EXTENT, 4) for _ in range(2))
        for other in placed:
            dx, dy = x - other["3d_coords"][0], y - other["3d_coords"][1]
            distance = radius + SIZES[other["size"]] + MIN_DISTANCE
            if dx * dx + dy * dy < distance * distance or min(abs(dx * rx + dy * ry), abs(dy * rx - dx * ry)) < MARGIN:
                break
        else:
            return x, y
    return None


def _sample_object(rng, size: str, spot: tuple[float, float], camera: Camera) -> dict[str, Any]:
    shape, color, material = _pick(rng, SHAPES), _pick(rng, COLORS), _pick(rng, MATERIALS)
    coords = [*spot, round(half_height(shape, size), 6)]
    x, y, depth = project(camera, np.array([coords], np.float64))[0]
    return {
        "shape": shape,
        "size": size,
        "material": material,
        "color": color,
        "3d_coords": coords,
        "rotation": round(rng.random() * 360.0, 4),
        "pixel_coords": [round(float(x) * WINDOW[0]), round(float(y) * WINDOW[1]), round(float(depth), 4)],
    }
