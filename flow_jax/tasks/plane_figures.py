"""Pictures of a flow in the plane: samples, density, learned field, trajectories, and the flow as an animation."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image

from flow_jax.callables import call_now

Points = Float[np.ndarray, "n 2"]
Trajectories = Float[np.ndarray, "T n 2"]
Velocity = Callable[[jax.Array, jax.Array], jax.Array]

_TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)
_MARGIN = 1.1  # axes reach this far beyond the data


def half_width(*points: Points) -> float:
    """Of a square around the origin that shows all points but the odd one."""
    return _MARGIN * max(float(np.quantile(np.abs(x), 0.999)) for x in points)


def draw_samples(path: Path, data: Points, samples: Points, noise: Points) -> None:
    """Noise, samples and held-out data side by side, on the same axes."""
    reach = half_width(data)
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    titles = ("x_0, what the flow starts from", "x_1, sampled", "x_1, held-out data")
    for axes, points, title in zip(figure.subplots(1, 3), (noise, samples, data), titles, strict=True):
        axes.scatter(*points.T, s=2, alpha=0.4, linewidths=0)
        _square(axes, reach, title)
    figure.savefig(path, dpi=120)


def draw_density(path: Path, data: Points, log_density: Callable[[Points], np.ndarray], cells: int = 64) -> None:
    """The model's density, exp(log p) on a grid, beside a histogram of the data on the same scale.

    Args:
      data: some ten points a cell, or the histogram is nothing but noise.
      log_density: log p of points [n, 2], in nats, [n].
      cells: of the grid, a side.
    """
    reach = half_width(data)
    edges = np.linspace(-reach, reach, cells + 1)
    centres = (edges[:-1] + edges[1:]) / 2
    grid = np.stack(np.meshgrid(centres, centres), axis=-1).reshape(-1, 2).astype(np.float32)
    model = np.exp(np.asarray(log_density(grid))).reshape(cells, cells)
    counts = np.histogram2d(data[:, 1], data[:, 0], bins=(edges, edges), density=True)[0]
    top = float(np.quantile(model, 0.995))
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for axes, values, title in zip(
        figure.subplots(1, 2), (model, counts), ("exp(log p)", "held-out data"), strict=True
    ):
        image = axes.imshow(values, origin="lower", extent=(-reach, reach, -reach, reach), vmin=0, vmax=top)
        axes.set_title(title)
    figure.colorbar(image, ax=figure.axes, label="density per unit of area")
    figure.savefig(path, dpi=120)


def draw_field(path: Path, velocity: Velocity, trajectories: Trajectories, times: Float[np.ndarray, " T"]) -> None:
    """The learned field at five times, with the points that are there then.

    Args:
      trajectories: positions of the same points at `times`.
    """
    reach = half_width(trajectories[0], trajectories[-1])
    line = np.linspace(-reach, reach, 19, dtype=np.float32)
    grid = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
    figure = Figure(figsize=(4 * len(_TIMES), 4.2), layout="constrained")
    for axes, t in zip(figure.subplots(1, len(_TIMES)), _TIMES, strict=True):
        arrows = np.asarray(call_now(velocity, jnp.float32(t), jnp.asarray(grid)))
        points = trajectories[np.abs(times - t).argmin()]
        axes.scatter(*points.T, s=2, alpha=0.3, linewidths=0, color="tab:orange")
        axes.quiver(*grid.T, *arrows.T, angles="xy", width=0.003)
        _square(axes, reach, f"t = {t:g}")
    figure.savefig(path, dpi=100)


def draw_trajectories(path: Path, trajectories: Trajectories, lines: int = 300) -> None:
    """The ways of the first points from noise to data."""
    shown = trajectories[:, :lines]
    figure = Figure(figsize=(6, 6.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(shown[..., 0], shown[..., 1], color="gray", linewidth=0.4, alpha=0.6)
    axes.scatter(*shown[0].T, s=5, label="t = 0", color="tab:blue", zorder=2)
    axes.scatter(*shown[-1].T, s=5, label="t = 1", color="tab:orange", zorder=2)
    axes.legend(loc="upper right")
    _square(axes, half_width(shown[0], shown[-1]), "from noise to data")
    figure.savefig(path, dpi=120)


def animate(path: Path, trajectories: Trajectories, pixels: int = 320, milliseconds: int = 60) -> None:
    """The flow as an animated GIF; it rests at its end, then begins anew.

    Args:
      trajectories: positions at evenly spaced times, a frame each.
    """
    reach = half_width(trajectories[0], trajectories[-1])
    colors = (matplotlib.colormaps["viridis"](np.linspace(0, 1, 256))[:, :3] * 255).astype(np.uint8)
    frames = []
    for points in trajectories:
        places = ((points + reach) / (2 * reach) * pixels).astype(int)
        places = places[((places >= 0) & (places < pixels)).all(1)]
        counts = np.zeros((pixels, pixels))
        np.add.at(counts, (pixels - 1 - places[:, 1], places[:, 0]), 1.0)
        for axis in (0, 1):  # a point is three pixels wide, or it would not be seen
            counts = counts + np.roll(counts, 1, axis) + np.roll(counts, -1, axis)
        levels = np.minimum(255, 60 * counts).astype(np.uint8)
        frames.append(Image.fromarray(colors[levels]))
    waits = [milliseconds] * (len(frames) - 1) + [1500]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=waits, loop=0)


def _square(axes, reach: float, title: str) -> None:
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", title=title)
