"""Camera and ray geometry of the synthetic scenes: projection, ray-shape intersection, visibility, bounding boxes.

Vectors are three numpy arrays, one per component (x, y, z), which is faster here than a trailing axis of 3. Elementwise
IEEE operations (no BLAS, no pow, no exp) give the same bits on every machine.

World units are CLEVR's: x and y on the ground, z up, objects within [-3, 3]. The image always shows CLEVR's 3:2 window;
a size of another aspect ratio squeezes that window, exactly as PaliGemma's preprocessing squeezes a 480x320 file into a
square. Normalised image positions therefore do not depend on the size.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int, Int16

from paligemma_jax.data.synthetic_clevr.attributes import SIZES

WINDOW = (480, 320)  # width, height of the official images; `pixel_coords` of a scene refer to it
_TAN_X = 16.0 / 35.0  # half-width of the window at depth 1: Blender's 35 mm lens before a 32 mm sensor
_TAN_Y = _TAN_X * WINDOW[1] / WINDOW[0]
_CUBE = 0.8  # half edge of a cube in radii of its size, so that its diagonal keeps CLEVR's minimum distance

_BEVEL = 0.14  # share of a half edge that is shaded as rounded, like CLEVR's smooth cubes and cylinders

# A circle of 64 points, rounded because the last bit of a cosine differs between C libraries.
_COS, _SIN = (np.array([round(f(math.pi * k / 32), 9) for k in range(64)]) for f in (math.cos, math.sin))

Vector = tuple[float, float, float]
Components = tuple[np.ndarray, np.ndarray, np.ndarray]


class Camera(NamedTuple):
    """Position and orthonormal axes in world units; `forward` points into the image."""

    location: Vector
    right: Vector
    up: Vector
    forward: Vector


class Solid(NamedTuple):
    """An object as the ray caster uses it; `cos`, `sin` turn world directions into a cube's own frame."""

    shape: str
    center: Vector
    radius: float  # half width; for a cube, half its edge
    cos: float
    sin: float


def look_at(location: Vector, target: Vector = (0.0, 0.0, 0.0)) -> Camera:
    """Returns a camera at `location` that looks at `target` with a level horizon."""
    fx, fy, fz = (t - p for t, p in zip(target, location, strict=True))
    length, flat = math.sqrt(fx * fx + fy * fy + fz * fz), math.sqrt(fx * fx + fy * fy)
    forward = (fx / length, fy / length, fz / length)
    right = (fy / flat, -fx / flat, 0.0)
    up = (-forward[2] * fx / flat, -forward[2] * fy / flat, flat / length)
    return Camera(location, right, up, forward)


def camera_of(scene: dict) -> Camera:
    """Returns the camera that a scene was sampled with."""
    x, y, z = scene["view"]["camera"]
    return look_at((x, y, z))


def half_height(shape: str, size: str) -> float:
    """Returns the height of an object's centre above the ground, in world units."""
    return SIZES[size] * (_CUBE if shape == "cube" else 1.0)


def solid_of(item: dict) -> Solid:
    """Returns the solid of one entry of a scene's `objects`."""
    angle = math.radians(item["rotation"])
    # Rounded, because the last bit of a cosine differs between C libraries.
    cos, sin = round(math.cos(angle), 9), round(math.sin(angle), 9)
    return Solid(item["shape"], tuple(item["3d_coords"]), half_height(item["shape"], item["size"]), cos, sin)


def project(camera: Camera, points: Float64[np.ndarray, "N 3"]) -> Float64[np.ndarray, "N 3"]:
    """Maps world points to (x, y, depth): x right, y down in fractions of the window (0..1), depth in world units."""
    rx, ry, rz = (points[:, k] - camera.location[k] for k in range(3))
    right, up, depth = (
        rx * axis[0] + ry * axis[1] + rz * axis[2] for axis in (camera.right, camera.up, camera.forward)
    )
    return np.stack([0.5 + 0.5 * right / (depth * _TAN_X), 0.5 - 0.5 * up / (depth * _TAN_Y), depth], axis=-1)


def pixel_rays(camera: Camera, width: int, height: int) -> Components:
    """Returns directions through the pixel centres, three float32 [height, width], of length 1 along `forward`."""
    u = ((np.arange(width) * 2 + 1) / width - 1.0) * _TAN_X
    v = (1.0 - (np.arange(height) * 2 + 1) / height) * _TAN_Y
    x, y, z = (
        (camera.forward[k] + u[None, :] * camera.right[k] + v[:, None] * camera.up[k]).astype(np.float32)
        for k in range(3)
    )
    return x, y, z


def to_local(solid: Solid, x, y, z):
    """Turns world directions into the solid's own frame (about the vertical; only a cube's differs)."""
    if solid.shape != "cube":
        return x, y, z
    return x * solid.cos + y * solid.sin, y * solid.cos - x * solid.sin, z


def to_world(solid: Solid, x, y, z):
    """Turns directions back; the inverse of `to_local`."""
    if solid.shape != "cube":
        return x, y, z
    return x * solid.cos - y * solid.sin, x * solid.sin + y * solid.cos, z


def intersect(solid: Solid, origin, direction):
    """Computes where rays enter and leave a solid, and by how much they hit it.

    `origin` is relative to the centre; both are in the solid's frame (`to_local`), and their components broadcast.
    Returns (near, far, clearance). near and far are ray parameters, meaningless on a miss. clearance is positive on a
    hit, negative on a miss, and near the silhouette about the distance to it (in world units for directions of length
    1), as soft shadows need.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        if solid.shape == "cube":
            slabs = [_slab(o, d, solid.radius) for o, d in zip(origin, direction, strict=True)]
            near = np.maximum(np.maximum(slabs[0][0], slabs[1][0]), slabs[2][0])
            far = np.minimum(np.minimum(slabs[0][1], slabs[1][1]), slabs[2][1])
            return near, far, far - near
        axes = 3 if solid.shape == "sphere" else 2
        near, far, clearance = _round(origin[:axes], direction[:axes], solid.radius)
        if solid.shape == "cylinder":
            bottom, top = _slab(origin[2], direction[2], solid.radius)
            near, far = np.maximum(near, bottom), np.minimum(far, top)
            clearance = np.minimum(clearance, far - near)
        return near, far, clearance


def _slab(origin, direction, half: float):
    """Returns where rays cross the planes at -half and +half of one axis: (first, second)."""
    inverse = 1.0 / direction
    a, b = (-half - origin) * inverse, (half - origin) * inverse
    return np.minimum(a, b), np.maximum(a, b)


def _round(origin, direction, radius: float):
    """Intersects rays with a circle (two components) or sphere (three): (first, second, radius - closest distance)."""
    a = sum(d * d for d in direction)
    b = sum(o * d for o, d in zip(origin, direction, strict=True))
    c = sum(o * o for o in origin) - radius * radius
    middle, reach = -b / a, (b * b - a * c) / a
    half = np.sqrt(np.maximum(reach, 0.0) / a)
    return middle - half, middle + half, radius - np.sqrt(np.maximum(radius * radius - reach, 0.0))


def local_normal(solid: Solid, x, y, z):
    """Returns outward unit normals at surface points (about the centre, in the solid's frame), with rounded edges."""
    if solid.shape == "sphere":
        return x / solid.radius, y / solid.radius, z / solid.radius
    flat = solid.radius * (1.0 - _BEVEL)
    if solid.shape == "cylinder":
        rim = np.maximum(np.sqrt(x * x + y * y), 1e-6)
        side = np.maximum(rim - flat, 0.0) / rim
        nx, ny = x * side, y * side
    else:
        nx, ny = (np.sign(v) * np.maximum(np.abs(v) - flat, 0.0) for v in (x, y))
    nz = np.sign(z) * np.maximum(np.abs(z) - flat, 0.0)
    length = np.sqrt(nx * nx + ny * ny + nz * nz)
    return nx / length, ny / length, nz / length


def bounding_corners(solids: list[Solid], grow: float = 0.0) -> Float64[np.ndarray, "solids 8 3"]:
    """Returns world corners of a cuboid around each solid (a cube's own corners), `grow` world units larger."""
    steps = np.array([[(i >> k & 1) * 2 - 1 for k in range(3)] for i in range(8)], np.float64)
    rows = []
    for solid in solids:
        x, y, z = to_world(solid, *(steps * (solid.radius + grow)).T)
        rows += [x + solid.center[0], y + solid.center[1], z + solid.center[2]]
    return np.array(rows, np.float64).reshape(-1, 3, 8).transpose(0, 2, 1)


def image_rectangles(
    camera: Camera, points: Float64[np.ndarray, "solids N 3"], width: int, height: int
) -> list[tuple[slice, slice]]:
    """Returns, for each row of points, the slices (rows, columns) of an image that cover their projected hull."""
    seen = project(camera, points.reshape(-1, 3)).reshape(points.shape)[..., :2] * (width, height)
    low = np.maximum(seen.min(axis=1).astype(int) - 1, 0)
    high = np.maximum(np.minimum(seen.max(axis=1).astype(int) + 2, (width, height)), low)
    return [(slice(y0, y1), slice(x0, x1)) for (x0, y0), (x1, y1) in zip(low.tolist(), high.tolist(), strict=True)]


def cast(
    scene: dict, width: int, height: int
) -> tuple[Int16[np.ndarray, "H W"], Float32[np.ndarray, "H W"], Components]:
    """Casts one ray per pixel: (object index, -1 for ground; ray parameter of the hit; ray directions)."""
    camera = camera_of(scene)
    rays = pixel_rays(camera, width, height)
    nearest = (np.float32(-camera.location[2]) / rays[2]).astype(np.float32)  # the ground, which fills the window
    ids = np.full((height, width), -1, np.int16)
    solids = [solid_of(item) for item in scene["objects"]]
    covers = image_rectangles(camera, bounding_corners(solids), width, height)
    for index, (solid, where) in enumerate(zip(solids, covers, strict=True)):
        origin = to_local(solid, *(np.float32(p - c) for p, c in zip(camera.location, solid.center, strict=True)))
        near, _, clearance = intersect(solid, origin, to_local(solid, *(d[where] for d in rays)))
        hit = (clearance > 0) & (near < nearest[where])
        nearest[where] = np.where(hit, near, nearest[where])
        ids[where] = np.where(hit, np.int16(index), ids[where])
    return ids, nearest, rays


def visible_pixels(scene: dict, width: int = 96, height: int = 64) -> Int[np.ndarray, " objects"]:
    """Returns the number of pixels of a `width` x `height` image that show each object."""
    ids, _, _ = cast(scene, width, height)
    return np.bincount(ids.ravel() + 1, minlength=len(scene["objects"]) + 1)[1:]


def boxes(scene: dict) -> Float64[np.ndarray, "objects 4"]:
    """Returns the box [y0, x0, y1, x1] of each whole object, even if hidden, as fractions of the image, clipped."""
    camera = camera_of(scene)
    rows = [project(camera, _outline(camera, solid_of(item)))[:, :2] for item in scene["objects"]]
    corners = np.array([[*seen.min(axis=0)[::-1], *seen.max(axis=0)[::-1]] for seen in rows], np.float64)
    return np.clip(corners.reshape(-1, 4), 0.0, 1.0)


def _outline(camera: Camera, solid: Solid) -> Float64[np.ndarray, "N 3"]:
    """Returns world points that span the solid's projection: corners, rims, or a sphere's circle of tangent rays."""
    if solid.shape == "cube":
        return bounding_corners([solid])[0]
    r = solid.radius
    if solid.shape == "cylinder":
        ring = np.stack([_COS * r, _SIN * r, np.zeros_like(_COS)], axis=-1)
        return np.concatenate([ring - (0.0, 0.0, r), ring + (0.0, 0.0, r)]) + solid.center
    toward = look_at(camera.location, solid.center)  # axes of a view with the sphere in its middle
    distance = math.sqrt(sum((p - c) ** 2 for p, c in zip(camera.location, solid.center, strict=True)))
    ring = math.sqrt(1.0 - (r / distance) ** 2) * r
    across = _COS[:, None] * np.array(toward.right) + _SIN[:, None] * np.array(toward.up)
    return np.array(solid.center) - np.array(toward.forward) * (r * r / distance) + across * ring
