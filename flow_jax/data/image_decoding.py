"""Decodes image files with PIL: the central square, resized with antialiasing."""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from train_jax.core.row_errors import BadRow

MODES = {1: "L", 3: "RGB"}  # PIL's, by channels


def decode(data: bytes, size: int, channels: int) -> UInt8[np.ndarray, "{size} {size} {channels}"]:
    """Decodes the bytes of a file to a square image.

    The EXIF orientation is applied, alpha is dropped, grey is converted to RGB or RGB to grey, and only the first frame
    of an animation is used. The largest central square is resized by PIL's bicubic filter with antialiasing; an image
    that has the size already keeps its values.

    Raises:
      BadRow: the bytes are not a complete image, or one with more than 8 bits per channel.
    """
    try:
        with Image.open(io.BytesIO(data)) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
    except UnidentifiedImageError:
        raise BadRow(f"unknown image format ({len(data)} bytes): replace the file.") from None
    except Exception as error:  # PIL's plugins raise SyntaxError, struct.error, ValueError and more on corrupt bytes
        raise BadRow(f"cannot decode the image ({len(data)} bytes): {error}: replace the file.") from error
    if image.mode.startswith("I") or image.mode == "F":
        raise BadRow(f"the image's mode is {image.mode}, expected 8 bits per channel: convert the file.")
    image = image.convert(MODES[channels])
    if image.size != (size, size):
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.array(image, np.uint8).reshape(size, size, channels)
