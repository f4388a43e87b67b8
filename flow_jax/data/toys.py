"""Toy distributions in the plane: seeded draws, float32 [n, 2].

checkerboard     eight squares of side 2 on [-4, 4]^2 (as in Lipman et al. 2023)
8gaussians       on a circle of radius 5, standard deviation sqrt(0.1) (as in torchcfm)
moons            two half circles, noise 0.2, scaled by 3 and shifted by -1 (as in torchcfm)
spirals          two arms of one and a half turns, noise 0.1
gaussian         standard normal, the usual noise

`draw` also takes the import path of a function `draw_points(rng, n)` of your own.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from flow_jax.argument_checks import check_whole
from train_jax.core.errors import UserError
from train_jax.core.import_path import check_arguments, named

Draws = Float[np.ndarray, "n 2"]


def _checkerboard(rng: np.random.Generator, n: int) -> np.ndarray:
    x = rng.uniform(-4.0, 4.0, n)
    column = np.floor(x / 2.0)  # -2, -1, 0, 1
    row = 2 * rng.integers(0, 2, n) - 2 + column % 2  # two of the four rows, by the column's colour
    return np.stack([x, 2.0 * row + rng.uniform(0.0, 2.0, n)], axis=1)


def _gaussians(rng: np.random.Generator, n: int) -> np.ndarray:
    angle = rng.integers(0, 8, n) * (np.pi / 4.0)
    centres = 5.0 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return centres + np.sqrt(0.1) * rng.standard_normal((n, 2))


def _moons(rng: np.random.Generator, n: int) -> np.ndarray:
    angle, lower = np.pi * rng.random(n), rng.integers(0, 2, n)
    x = np.where(lower, 1.0 - np.cos(angle), np.cos(angle))
    y = np.where(lower, 0.5 - np.sin(angle), np.sin(angle))
    return 3.0 * (np.stack([x, y], axis=1) + 0.2 * rng.standard_normal((n, 2))) - 1.0


def _spirals(rng: np.random.Generator, n: int) -> np.ndarray:
    turn = 3.0 * np.pi * np.sqrt(rng.random(n))  # with the root, points are uniform along the arm
    arm = np.where(rng.integers(0, 2, n), 1.0, -1.0)
    radius = 4.0 * turn / (3.0 * np.pi)
    points = (arm * radius)[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    return points + 0.1 * rng.standard_normal((n, 2))


def _gaussian(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.standard_normal((n, 2))


TOYS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "checkerboard": _checkerboard,
    "8gaussians": _gaussians,
    "moons": _moons,
    "spirals": _spirals,
    "gaussian": _gaussian,
}


def draw(name: str, n: int, seed: tuple[int, ...] | int) -> Draws:
    """Draws n points of a distribution; they depend only on name, n and seed.

    Args:
      name: a key of TOYS, or the import path, module:function, of a function of a numpy generator and n that returns
        real numbers [n, 2].
      n: number of points.
      seed: of the generator.

    Raises:
      UserError: the name is unknown, n or the seed is not a whole number, or the function returns something else.
    """
    check_whole("n", n, 0)
    if not isinstance(name, str) or (name not in TOYS and ":" not in name):
        raise UserError(
            f"the distribution is {name!r}, expected one of {', '.join(TOYS)}, or the import path of your own "
            "function, module:function: change it."
        )
    for number in seed if isinstance(seed, tuple) else (seed,):
        check_whole("seed", number, 0)
    rng = np.random.Generator(np.random.PCG64(seed))
    return (TOYS[name](rng, n) if name in TOYS else _own(name, rng, n)).astype(np.float32)


def _own(name: str, rng: np.random.Generator, n: int) -> np.ndarray:
    """Returns the points of a user's function, named by its import path."""
    function = named("the distribution", name, {})
    check_arguments(f"the distribution {name!r}", function, "rng", "n")
    points = np.asarray(function(rng, n))
    if points.shape != (n, 2) or not np.issubdtype(points.dtype, np.number) or not np.isfinite(points).all():
        raise UserError(
            f"the distribution {name!r} returned an array {points.dtype} {list(points.shape)}, expected finite real "
            f"numbers [{n}, 2]: correct the function."
        )
    return points
