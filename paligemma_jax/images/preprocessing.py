"""Turns an encoded image into model input, as the checkpoint's family does.

The two families resize differently, and the results are not interchangeable: big_vision uses `tf.image.resize`
(bilinear at half-pixel centres, by default without antialiasing, cast back to uint8 by truncation), transformers uses
PIL (bicubic, always antialiased, rounded). Both then scale [0, 255] to the range that the tower was trained on.

Decoding gives RGB uint8 for all families. Where libraries differ:
- EXIF orientation is applied, so a phone's photograph is upright (CLEVR's images have none);
- alpha is dropped, not composited, as both families do (CLEVR's PNGs are RGBA, fully opaque);
- 16 bits per channel keep their high byte (PIL's own conversion of grey images would saturate);
- grey, palette and CMYK images are converted to RGB; an animation gives its first frame;
- floating-point images have no defined range and are refused.
"""

import dataclasses
import io
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from paligemma_jax.images import image_processor, tf_resize
from paligemma_jax.images.image_processor import CLIP_MEAN, CLIP_STD, HALF, PIL_KERNELS
from train_jax.core.errors import UserError
from train_jax.core.row_errors import BadRow


def decode(data: bytes) -> UInt8[np.ndarray, "height width 3"]:
    """Decodes a PNG, JPEG or other file that PIL reads to RGB, 0 to 255; details in the module's docstring.

    Raises:
      BadRow: if the bytes are no complete image, or an image of a refused kind.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except UserError:
        raise
    except UnidentifiedImageError:
        raise BadRow(f"cannot decode the image ({len(data)} bytes): unknown format; replace the file.") from None
    except Exception as error:  # PIL's plugins raise SyntaxError, struct.error, ValueError and more on corrupt bytes.
        raise BadRow(f"cannot decode the image ({len(data)} bytes): {error}; replace the file.") from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "F":
        raise BadRow("the image has floating-point pixels, expected 8 or 16 bits per channel; convert the file.")
    if image.mode.startswith("I"):  # 16-bit grey, which PIL also opens as 32-bit "I".
        grey = (np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.array(image.convert("RGB"))


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How one checkpoint family turns RGB uint8 into model input; `to_dict` stores it in `config.json`.

    Attributes:
      size: side of the square output, in pixels.
      source: the family whose resize is reproduced: "big_vision" (tf.image.resize) or "transformers" (PIL).
      method: resize kernel: "bilinear" for big_vision; a key of `PIL_KERNELS` for transformers.
      antialias: whether shrinking widens the kernel; PIL always does.
      mean: per channel, subtracted after scaling to [0, 1].
      std: per channel, the divisor after that; mean 0.5 and std 0.5 give the range [-1, 1].
      crop: False squashes the image to the square; True resizes its short side and crops the centre (CLIP).
      resized: side in pixels (with `crop`, the short side) before the centre of `size` is cut out; None: `size`.

    Raises:
      UserError: for a combination that the source does not have.
    """

    size: int
    source: Literal["big_vision", "transformers"] = "big_vision"
    method: str = "bilinear"
    antialias: bool = False
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    crop: bool = False
    resized: int | None = None

    def __post_init__(self):
        if self.size < 1 or len(self.mean) != 3 or len(self.std) != 3 or not all(self.std):
            raise UserError(
                f"preprocessing has size {self.size}, mean {self.mean} and std {self.std}, expected a positive size, "
                "three means and three non-zero deviations; change them."
            )
        if self.source == "big_vision":
            ok = self.method == "bilinear" and not self.crop and self.resized is None
        else:
            ok = self.source == "transformers" and self.method in PIL_KERNELS and self.antialias
        if not ok:
            raise UserError(
                f"preprocessing source={self.source!r}, method={self.method!r}, antialias={self.antialias}, "
                f"crop={self.crop} is unknown, expected big_vision with bilinear and no crop or transformers with one "
                f"of {sorted(PIL_KERNELS)} and antialias; choose one of these."
            )

        if self.resized is not None and self.resized <= self.size:
            raise UserError(
                f"preprocessing cuts {self.size} pixels out of images of {self.resized}, expected larger images: "
                "remove resized, or change it."
            )

    @classmethod
    def big_vision(cls, size: int, antialias: bool = False) -> "Preprocessing":
        """Returns big_vision's preprocessing (PaliGemma, SigLIP): `resize(size[, antialias])|value_range(-1, 1)`."""
        return cls(size, "big_vision", "bilinear", antialias)

    @classmethod
    def siglip(cls, size: int) -> "Preprocessing":
        """Returns transformers' preprocessing (PaliGemma, SigLIP; SiglipImageProcessor): PIL bicubic to a square."""
        return cls(size, "transformers", "bicubic", True)

    @classmethod
    def clip(cls, size: int = 224) -> "Preprocessing":
        """Returns the preprocessing of CLIP: PIL bicubic on the short side, centre crop, CLIP's mean and std."""
        return cls(size, "transformers", "bicubic", True, CLIP_MEAN, CLIP_STD, crop=True)

    @staticmethod
    def decode(data: bytes) -> UInt8[np.ndarray, "height width 3"]:
        """Decodes bytes to RGB uint8; the same for every family. Raises BadRow."""
        return decode(data)

    def resize(self, image: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "size size 3"]:
        """Brings an RGB image to `size` x `size`, still 0 to 255."""
        if self.source == "big_vision":
            # big_vision casts the float result back to the image's dtype: truncation, not rounding.
            return tf_resize.bilinear(image, (self.size, self.size), self.antialias).astype(np.uint8, order="C")
        height = width = self.resized or self.size
        if self.crop:
            short, long = sorted(image.shape[:2])
            long = int(height * long / short)  # transformers truncates here.
            height, width = (height, long) if image.shape[0] < image.shape[1] else (long, width)
        top, left = (height - self.size) // 2, (width - self.size) // 2
        return self._resize_pil(image, height, width)[top : top + self.size, left : left + self.size]

    def _resize_pil(self, image: np.ndarray, height: int, width: int) -> np.ndarray:
        return np.array(Image.fromarray(image).resize((width, height), PIL_KERNELS[self.method]))

    def normalize(self, images: UInt8[np.ndarray | Array, "*batch 3"]) -> Float[np.ndarray | Array, "*batch 3"]:
        """Scales RGB 0 to 255 to the tower's range, float32; numpy gives numpy; JAX arrays work under jit."""
        channels = (1,) * (images.ndim - 1) + (3,)
        mean, std = (np.asarray(v, np.float32).reshape(channels) for v in (self.mean, self.std))
        return (images.astype(np.float32) / np.float32(255) - mean) / std

    def apply(self, image: UInt8[np.ndarray, "height width 3"]) -> Float[np.ndarray, "size size 3"]:
        """Resizes and normalises one RGB image; float32, in [-1, 1] for PaliGemma and SigLIP."""
        return np.asarray(self.normalize(self.resize(image)))

    def at(self, size: int) -> "Preprocessing":
        """Returns the same preprocessing for another output size; the cropped share stays."""
        resized = self.resized and max(round(size * self.resized / self.size), size + 1)
        return dataclasses.replace(self, size=size, resized=resized)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values, without those that are None; `from_dict` is the inverse."""
        fields = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}
        return {name: value for name, value in fields.items() if value is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessing":
        """Reads what `to_dict` wrote. Raises UserError for unknown fields or a missing size."""
        fields = {field.name for field in dataclasses.fields(cls)}
        if not {"size"} <= set(values) <= fields:
            raise UserError(
                f"the preprocessing entry has keys {sorted(values)}, expected size and any of {sorted(fields)}; "
                "correct config.json."
            )
        arguments: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**arguments)

    @classmethod
    def from_hugging_face(
        cls,
        config: dict[str, Any],
        family: str = image_processor.SIGLIP,
        file: str = "preprocessor_config.json",
        section: str = "",
    ) -> "Preprocessing":
        """Reads the JSON of transformers' image processor of a SigLIP, PaliGemma or CLIP.

        Arguments: see image_processor.read_fields.

        Raises:
          UserError: for steps that these three families do not have (other size kinds, kernels or scales).
        """
        return cls(source="transformers", antialias=True, **image_processor.read_fields(config, family, file, section))

    def to_hugging_face(self) -> dict[str, Any]:
        """Returns the `preprocessor_config.json` for transformers; `from_hugging_face` is its inverse.

        Transformers has no resize like big_vision's without antialiasing; PIL's bilinear, the closest, is named.
        """
        cut, pixels = self.crop or self.resized is not None, self.resized or self.size
        resize: dict[str, Any] = {"size": {"height": pixels, "width": pixels}, "do_center_crop": cut}
        if self.crop:
            resize["size"] = {"shortest_edge": pixels}
        if cut:
            resize["crop_size"] = {"height": self.size, "width": self.size}
        return {
            "image_processor_type": image_processor.CLIP if cut else image_processor.SIGLIP,
            "do_convert_rgb": True,
            "do_resize": True,
            **resize,
            "resample": PIL_KERNELS[self.method],
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }


@runtime_checkable
class WithPreprocessing(Protocol):
    """A model's config, such as PaliGemmaConfig or DualEncoderConfig."""

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How images are prepared; every model that is read from files has one."""
        ...


def preprocessing_of(config: WithPreprocessing) -> Preprocessing:
    """Returns how images are prepared for a model.

    Raises:
      ValueError: the config has none, as that of a model made by hand may.
    """
    if config.preprocessing is None:
        raise ValueError("the model has no preprocessing, expected one in its config: set config.preprocessing.")
    return config.preprocessing
