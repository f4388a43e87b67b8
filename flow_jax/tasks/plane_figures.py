"""Figures of a flow in the plane: samples, density, learned field, trajectories, and an animation."""

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
_MARGIN = 1.1  # ratio of the axes' limits to the data's


def half_width(*points: Points) -> float:
    """Returns the half width of a square around the origin that contains 99.9 % of the coordinates."""
    return _MARGIN * max(float(np.quantile(np.abs(x), 0.999)) for x in points)


def draw_samples(path: Path, data: Points, samples: Points, noise: Points) -> None:
    """Draws noise, samples and held-out data side by side, with the same limits."""
    reach = half_width(data)
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    titles = ("x_0, what the flow starts from", "x_1, sampled", "x_1, held-out data")
    for axes, points, title in zip(figure.subplots(1, 3), (noise, samples, data), titles, strict=True):
        axes.scatter(*points.T, s=2, alpha=0.4, linewidths=0)
        _square(axes, reach, title)
    figure.savefig(path, dpi=120)


def draw_density(path: Path, data: Points, log_density: Callable[[Points], np.ndarray], cells: int = 64) -> None:
    """Draws the model's density on a grid beside a histogram of the data, on the same scale.

    Args:
      path: of the file.
      data: about ten points per cell or more; with fewer the histogram is noisy.
      log_density: points [n, 2] -> log p in nats [n].
      cells: number of cells along each side of the grid.
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
    """Draws the learned field at five times, with the samples at these times.

    Args:
      path: of the file.
      velocity: the model.
      trajectories: positions of the samples at `times`.
      times: increasing.
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
    """Draws the trajectories of the first samples from noise to data."""
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
    """Draws the flow as an animated GIF, which pauses at its end and repeats.

    Args:
      path: of the file.
      trajectories: positions at evenly spaced times, one per frame.
      pixels: side of the image.
      milliseconds: duration of a frame.
    """
    reach = half_width(trajectories[0], trajectories[-1])
    colors = (matplotlib.colormaps["viridis"](np.linspace(0, 1, 256))[:, :3] * 255).astype(np.uint8)
    frames = []
    for points in trajectories:
        cells = ((points + reach) / (2 * reach) * pixels).astype(int)
        cells = cells[((cells >= 0) & (cells < pixels)).all(1)]
        counts = np.zeros((pixels, pixels))
        np.add.at(counts, (pixels - 1 - cells[:, 1], cells[:, 0]), 1.0)
        for axis in (0, 1):  # makes a point three pixels wide, so that it is visible
            counts = counts + np.roll(counts, 1, axis) + np.roll(counts, -1, axis)
        levels = np.minimum(255, 60 * counts).astype(np.uint8)
        frames.append(Image.fromarray(colors[levels]))
    durations = [milliseconds] * (len(frames) - 1) + [1500]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def _square(axes, reach: float, title: str) -> None:
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", title=title)
