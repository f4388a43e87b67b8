"""Renders images of the synthetic scenes by ray casting: three lights, soft shadows, matte rubber, mirroring metal.

Shape, colour and material should be recognisable at 64 x 64 pixels, for people and models, as in CLEVR's own images;
physical accuracy is not a goal. The bytes are a function of scene and size (see `geometry`).
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from paligemma_jax.data.synthetic_clevr.attributes import COLORS
from paligemma_jax.data.synthetic_clevr.geometry import (
    Camera,
    Components,
    Solid,
    bounding_corners,
    camera_of,
    cast,
    image_rectangles,
    intersect,
    local_normal,
    solid_of,
    to_local,
    to_world,
)

# For each light: power at the middle of the ground, width of the penumbra per unit of distance from the object that
# casts the shadow, and the share of the light that a full shadow removes.
_LIGHTS = {"key": (0.62, 0.12, 0.75), "fill": (0.25, 0.0, 0.0), "back": (0.38, 0.16, 0.6)}
_AMBIENT = 0.5
_FALLOFF = 70.0  # squared distance at which a light has lost half its power
_METAL_DIFFUSE = 0.25

Image = Float32[np.ndarray, "H W"]


def render(
    scene: dict,
    width: int,
    height: int,
    supersample: int = 2,
    light: tuple[float, float, float] | None = None,
) -> UInt8[np.ndarray, "height width 3"]:
    """Renders an image of a scene, sRGB 0..255; each pixel is the mean of `supersample` squared rays.

    `light` multiplies all light, per channel; objects emit none.
    """
    w, h = width * supersample, height * supersample
    ids, distance, rays = cast(scene, w, h)
    solids = [solid_of(item) for item in scene["objects"]]
    camera = camera_of(scene)
    points = _components(np.float32(camera.location[k]) + distance * rays[k] for k in range(3))
    normals = _normals(solids, ids, points)
    rgb = _shade(scene, solids, camera, ids, points, normals, rays)
    if light is not None:
        rgb = _components(np.float32(gain) * channel for gain, channel in zip(light, rgb, strict=True))
    return _to_bytes(rgb, supersample)


def _normals(solids: list[Solid], ids: np.ndarray, points: Components) -> Components:
    """Returns the unit normals of the surface at every pixel; the ground's is up."""
    normals = np.zeros_like(points[0]), np.zeros_like(points[0]), np.ones_like(points[0])
    for index, solid in enumerate(solids):
        where = np.nonzero(ids == index)
        local = to_local(solid, *(p[where] - np.float32(c) for p, c in zip(points, solid.center, strict=True)))
        for target, value in zip(normals, to_world(solid, *local_normal(solid, *local)), strict=True):
            target[where] = value
    return normals


def _shade(scene, solids, camera: Camera, ids, points: Components, normals: Components, rays: Components):
    """Returns linear light per channel, three float32 [H, W]."""
    length = np.sqrt(rays[0] * rays[0] + rays[1] * rays[1] + rays[2] * rays[2])
    view = _components(-d / length for d in rays)  # towards the camera
    table, metal = _surfaces(scene)
    albedo, metal = _components(table[ids, k] for k in range(3)), metal[ids]  # index -1, the ground, is the last row
    diffuse = _AMBIENT * (0.7 + 0.3 * normals[2]) * _ground_occlusion(solids, camera, ids, points)
    gloss = np.zeros_like(diffuse)
    for name, (power, softness, depth) in _LIGHTS.items():
        light = scene["view"]["lights"][name]
        offset = _components(np.float32(q) - p for q, p in zip(light, points, strict=True))
        square = offset[0] * offset[0] + offset[1] * offset[1] + offset[2] * offset[2]
        inverse = 1.0 / np.sqrt(square)
        toward = _components(o * inverse for o in offset)
        facing = np.maximum(_dot(normals, toward), 0.0)
        shadow = _shadow(solids, camera, ids, points, toward, light, softness)
        strength = (power * 2.0 * _FALLOFF / (_FALLOFF + square)) * (1.0 - depth * shadow)
        diffuse += strength * facing
        gloss += strength * _highlight(normals, toward, view, metal)
    scatter = np.where(metal, np.float32(_METAL_DIFFUSE), np.float32(1.0)) * diffuse
    rgb = _components(a * scatter + gloss for a in albedo)
    where = np.nonzero(metal)
    points, normals, view = (_components(c[where] for c in v) for v in (points, normals, view))
    mirrored = _mirrored(solids, table, ids[where], points, normals, view)
    for channel, own, light in zip(rgb, albedo, mirrored, strict=True):
        channel[where] += own[where] * light
    return rgb


def _components(arrays: Iterable[np.ndarray]) -> Components:
    x, y, z = arrays
    return x, y, z


def _dot(a: Components, b: Components) -> np.ndarray:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _surfaces(scene: dict) -> tuple[Float32[np.ndarray, "surfaces 3"], Bool[np.ndarray, " surfaces"]]:
    """Returns the linear albedo of each object and, last, of the ground; and which of them is metal."""
    ground = scene["view"]["ground"]  # one gray level, or one per channel
    table = [[c / 255.0 for c in COLORS[item["color"]]] for item in scene["objects"]]
    table = np.array([*table, ground if isinstance(ground, list | tuple) else [ground] * 3], np.float32)
    metal = np.array([item["material"] == "metal" for item in scene["objects"]] + [False])
    return table * table, metal  # display values to linear light; gamma 2, as pow differs between machines


def _shadow(solids, camera: Camera, ids, points: Components, toward: Components, light, softness: float) -> Image:
    """Returns the share of one light that other objects block at each pixel, 0..1."""
    total = np.zeros_like(points[0])
    if not softness:
        return total
    covers = _shadow_rectangles(camera, solids, light, softness, total.shape)
    for index, (solid, where) in enumerate(zip(solids, covers, strict=True)):
        start = to_local(solid, *(p[where] - np.float32(c) for p, c in zip(points, solid.center, strict=True)))
        near, far, clearance = intersect(solid, start, to_local(solid, *(t[where] for t in toward)))
        cover = np.clip(0.5 + clearance / (softness * np.maximum(near, 0.1)), 0.0, 1.0)
        cover[(far < 0.0) | (ids[where] == index)] = 0.0
        total[where] = np.maximum(total[where], cover)
    return total


def _shadow_rectangles(camera: Camera, solids, light, softness: float, shape) -> list[tuple[slice, slice]]:
    """Returns image rectangles that cover each solid and its shadow on the ground."""
    corners = bounding_corners(solids, grow=2.0 * softness)
    lamp = np.array(light)
    corners[..., 2] = np.clip(corners[..., 2], 0.0, lamp[2] - 0.5)
    on_ground = lamp + (corners - lamp) * (lamp[2] / (lamp[2] - corners[..., 2:]))
    return image_rectangles(camera, np.concatenate([corners, on_ground], axis=1), shape[1], shape[0])


def _ground_occlusion(solids, camera: Camera, ids, points: Components) -> Image:
    """Returns the share of ambient light that reaches each pixel: less on the ground close to an object."""
    open_sky = np.ones_like(points[0])
    around = bounding_corners([solid._replace(radius=solid.radius * 2.0) for solid in solids])
    covers = image_rectangles(camera, around, ids.shape[1], ids.shape[0])
    for solid, where in zip(solids, covers, strict=True):
        dx, dy = points[0][where] - np.float32(solid.center[0]), points[1][where] - np.float32(solid.center[1])
        reach = np.clip(2.0 - np.sqrt(dx * dx + dy * dy) / np.float32(solid.radius), 0.0, 1.0)
        open_sky[where] *= np.where(ids[where] < 0, 1.0 - 0.5 * reach * reach, 1.0)
    return open_sky


def _highlight(normals: Components, toward: Components, view: Components, metal: np.ndarray) -> Image:
    """Computes a Blinn highlight: sharp and strong on metal, a faint sheen on rubber, none on the ground."""
    half = _components(t + v for t, v in zip(toward, view, strict=True))
    cosine = np.maximum(_dot(normals, half), 0.0) / np.sqrt(_dot(half, half))
    broad = _power(cosine, 4)
    return np.where(metal, 2.6 * _power(broad, 2), 0.03 * broad)


def _power(x: np.ndarray, doublings: int) -> np.ndarray:
    """Returns x to the power 2**doublings, by squaring."""
    for _ in range(doublings):
        x = x * x
    return x


def _mirrored(solids, table, own, points: Components, normals: Components, view: Components) -> Components:
    """Returns the light per channel that metal surface points mirror: other objects, else ground or studio."""
    twice = 2.0 * _dot(normals, view)
    direction = _components(twice * n - v for n, v in zip(normals, view, strict=True))
    light = _studio(points, direction)
    seen = np.full(own.shape, -1)
    nearest = np.full(own.shape, np.inf, np.float32)
    for index, solid in enumerate(solids):
        start = to_local(solid, *(p - np.float32(c) for p, c in zip(points, solid.center, strict=True)))
        near, _, clearance = intersect(solid, start, to_local(solid, *direction))
        hit = (clearance > 0.0) & (near > 0.0) & (near < nearest) & (own != index)
        nearest = np.where(hit, near, nearest)
        seen[hit] = index
    return _components(np.where(seen < 0, light, np.float32(0.7) * table[seen, k]) for k in range(3))


def _studio(points: Components, direction: Components) -> np.ndarray:
    """Returns the mirrored background: ground, darker near the contact, or above it a room with bright strips."""
    x, y, z = direction
    reach = points[2] / np.maximum(-z, 0.05)  # distance to the ground
    ground = 0.05 + 1.05 * reach / (reach + 0.8)
    strips = np.abs((x - y) / (np.abs(z) + 0.3) % 2.0 - 1.0)  # a triangle wave over the ceiling, 0..1
    return np.where(z < 0.0, ground, 0.35 + 1.6 * np.clip(strips * 2.5 - 0.6, 0.0, 1.0))


def _to_bytes(rgb: Components, supersample: int) -> UInt8[np.ndarray, "H W 3"]:
    """Averages each pixel's rays and returns display bytes (gamma 2)."""
    out = np.empty((rgb[0].shape[0] // supersample, rgb[0].shape[1] // supersample, 3), np.uint8)
    for k, channel in enumerate(rgb):
        channel = np.clip(channel, 0.0, 1.0)
        total = sum(channel[i::supersample, j::supersample] for i in range(supersample) for j in range(supersample))
        out[..., k] = np.sqrt(total * np.float32(1.0 / supersample**2)) * np.float32(255.0) + np.float32(0.5)
    return out
