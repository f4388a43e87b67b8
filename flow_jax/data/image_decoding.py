"""Picture files as training data: decoded by PIL, the middle cut to a square, resized with antialiasing."""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from train_jax.core.row_errors import BadRow

MODES = {1: "L", 3: "RGB"}  # PIL's, by channels


def decode(data: bytes, size: int, channels: int) -> UInt8[np.ndarray, "{size} {size} {channels}"]:
    """The bytes of a file as a square picture.

    EXIF's orientation is applied, alpha dropped, grey made RGB or RGB grey; of an animation the first frame counts. The
    largest square in the middle is resized by PIL's bicubic kernel, which widens where it shrinks; a picture of that
    size already keeps its values.

    Raises:
      BadRow: the bytes are no complete picture, or one of more than 8 bits a channel.
    """
    try:
        with Image.open(io.BytesIO(data)) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
    except UnidentifiedImageError:
        raise BadRow(f"no picture format that is known ({len(data)} bytes): replace the file.") from None
    except Exception as error:  # PIL's plugins raise SyntaxError, struct.error, ValueError and more on corrupt bytes
        raise BadRow(f"cannot decode the picture ({len(data)} bytes): {error}: replace the file.") from error
    if image.mode.startswith("I") or image.mode == "F":
        raise BadRow(f"the picture's mode is {image.mode}, expected 8 bits a channel: convert the file.")
    image = image.convert(MODES[channels])
    if image.size != (size, size):
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.array(image, np.uint8).reshape(size, size, channels)
