"""Other styles of a scene: light, background and sensor change, object positions do not.

For tests of domain generalisation: a model is tuned on the plain style and tested on the others.
"""

import copy
import zlib
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from paligemma_jax.data.synthetic_clevr.renderer import render

_NOISE = zlib.crc32(b"sensor noise")


class Style(NamedTuple):
    """A style; the default is the renderer's own.

    Attributes:
      light: factor for all light, per channel (linear).
      ground: display value of the ground 0..1, per channel; None: the scene's own.
      turned: whether the lights are on the other side of the scene, so that shadows fall the other way.
      noise: standard deviation of sensor noise in display values 0..255, per pixel and channel.
      shrink: factor by which the image is reduced before it is enlarged again.
    """

    light: tuple[float, float, float] = (1.0, 1.0, 1.0)
    ground: tuple[float, float, float] | None = None
    turned: bool = False
    noise: float = 0.0
    shrink: int = 1


PLAIN = "plain"
STYLES = {
    PLAIN: Style(),
    "dim": Style(light=(0.25, 0.25, 0.25)),
    "bright": Style(light=(1.8, 1.8, 1.8)),
    "warm": Style(light=(1.25, 0.95, 0.6)),
    "turned": Style(turned=True),
    "dark_floor": Style(ground=(0.2, 0.2, 0.2)),
    "wood_floor": Style(ground=(0.6, 0.45, 0.3)),
    "noise": Style(noise=25.0),
    "low_resolution": Style(shrink=2),
}


def render_styled(scene: dict, width: int, height: int, style: Style) -> UInt8[np.ndarray, "height width 3"]:
    """Renders a scene in a style, as a function of both; the plain style equals `render` to the bit."""
    light = style.light if style.light != Style().light else None
    image = render(_restyled(scene, style), width, height, light=light)
    if style.shrink > 1:
        small = Image.fromarray(image).resize((width // style.shrink, height // style.shrink), Image.Resampling.BOX)
        image = np.array(small.resize((width, height), Image.Resampling.BILINEAR))
    return _noisy(image, style.noise, scene) if style.noise else image


def _restyled(scene: dict, style: Style) -> dict:
    """Returns the scene with the style's ground and lights; objects and camera stay."""
    view = copy.deepcopy(scene["view"])
    if style.ground is not None:
        view["ground"] = style.ground
    if style.turned:  # by 180 degrees about the vertical
        view["lights"] = {name: [-x, -y, z] for name, (x, y, z) in view["lights"].items()}
    return scene | {"view": view}


def _noisy(image: np.ndarray, deviation: float, scene: dict) -> np.ndarray:
    """Adds nearly normal noise, seeded by the scene's name: sums of four bytes, exact on every machine."""
    seed = zlib.crc32(f"{scene['split']}/{scene['image_index']}".encode())
    rng = np.random.Generator(np.random.PCG64((_NOISE, seed)))
    total = rng.integers(0, 256, (*image.shape, 4)).sum(-1) - 510.0
    unscaled = np.sqrt(4 * (256**2 - 1) / 12)  # standard deviation of the sum
    return np.clip(np.rint(image + total * (deviation / unscaled)), 0, 255).astype(np.uint8)
