"""Random augmentations of an image: resized crop, flip, colour jitter and rotation, each optional.

Colour jitter suits classes that do not differ by colour. Only mild crops and rotations keep small objects whole:
`SCENES_LIGHT` and `SCENES_STRONG` are for the synthetic scenes, whose classes also differ by size.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance

from paligemma_jax.images.preprocessing import Preprocessing
from train_jax.core.config_keys import key
from train_jax.core.errors import UserError

_ASPECT = 4 / 3  # largest aspect ratio of a crop, either way
_TRIES = 10


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Ranges of the random augmentations; the default changes nothing.

    The fields are also config keys (train_jax/core/config_keys.py).

    Attributes:
      crop: smallest share of the image's area that a crop keeps; the share is uniform up to 1, the aspect ratio at most
        4 : 3. 1: no crop.
      flip: mirrors half of the views left to right.
      color_jitter: strength s, 0 to 1: brightness, contrast and saturation are multiplied by a factor in 1 +- s, then
        the hue is turned by up to s / 4 of the circle; 0: colours stay. 0.8 is SimCLR's strength (Chen et al. 2020:
        1 +- 0.8 s, hue 0.2 s).
      rotation: largest angle in degrees; corners are filled with the image's mean colour. 0: no rotation.

    Raises:
      UserError: a number out of range.
    """

    crop: float = key(1.0, "smallest share of the image's area that a crop keeps; 1 = no crop", above=0, maximum=1)
    flip: bool = key(False, "whether half of the views are mirrored from left to right")
    color_jitter: float = key(0.0, "strength of random changes of colour; 0 = none", minimum=0, maximum=1)
    rotation: float = key(0.0, "largest angle of a random rotation, in degrees; 0 = none", minimum=0, maximum=180)

    def __post_init__(self):
        if not (0 < self.crop <= 1 and 0 <= self.color_jitter <= 1 and 0 <= self.rotation <= 180):
            raise UserError(
                f"an augmentation has crop={self.crop}, color_jitter={self.color_jitter} and rotation={self.rotation}, "
                "expected a share above 0 and up to 1, a strength from 0 to 1, and 0 to 180 degrees: change them."
            )

    def view(
        self, image: UInt8[np.ndarray, "height width 3"], preprocessing: Preprocessing, rng: np.random.Generator
    ) -> UInt8[np.ndarray, "size size 3"]:
        """Returns one view at the model's size; without augmentation, the result of `preprocessing.resize`.

        A crop is resized to the square whatever its aspect ratio, with the kernel of the preprocessing.
        """
        pil = Image.fromarray(image)
        if self.rotation:
            pil = _rotated(pil, rng.uniform(-self.rotation, self.rotation))
        if self.crop < 1:
            pil = pil.crop(_box(*pil.size, self.crop, rng))
            preprocessing = dataclasses.replace(preprocessing, crop=False, resized=None)
        view = preprocessing.resize(np.array(pil))
        if self.flip and rng.random() < 0.5:
            view = np.ascontiguousarray(view[:, ::-1])
        return _jittered(view, self.color_jitter, rng) if self.color_jitter else view


NONE = Augmentation()
LIGHT = Augmentation(crop=0.08, flip=True)  # CoOp's
STRONG = Augmentation(crop=0.08, flip=True, color_jitter=0.4, rotation=30.0)
SCENES_LIGHT = Augmentation(crop=0.8, flip=True)
SCENES_STRONG = Augmentation(crop=0.7, flip=True, rotation=15.0)


def _rotated(pil: Image.Image, degrees: float) -> Image.Image:
    mean = tuple(int(value) for value in np.asarray(pil).mean((0, 1)))
    return pil.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=mean)


def _box(width: int, height: int, smallest: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Returns (left, top, right, bottom) of a random crop, or of the whole image if none of a few tries fits."""
    for _ in range(_TRIES):
        area = rng.uniform(smallest, 1.0) * width * height
        aspect = math.exp(rng.uniform(-1.0, 1.0) * math.log(_ASPECT))
        w, h = (max(1, round(math.sqrt(value))) for value in (area * aspect, area / aspect))
        if w <= width and h <= height:
            left, top = (int(rng.integers(room + 1)) for room in (width - w, height - h))
            return left, top, left + w, top + h
    return 0, 0, width, height


def _jittered(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    pil = Image.fromarray(image)
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        pil = change(pil).enhance(rng.uniform(1.0 - strength, 1.0 + strength))
    hue, saturation, value = pil.convert("HSV").split()
    turn = round(256 * rng.uniform(-strength / 4, strength / 4))
    hue = Image.fromarray((np.asarray(hue).astype(np.int32) + turn).astype(np.uint8))  # a circle of 256 steps
    return np.array(Image.merge("HSV", (hue, saturation, value)).convert("RGB"))
