"""Reads the JSON of transformers' image processors of SigLIP and CLIP, with their defaults.

It is in preprocessor_config.json (releases up to 4), or in processor_config.json under the key image_processor (5).
Keys that a file leaves out take the default of its class, in transformers and here.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from paligemma_jax.files.side_files import KnownKeys, account, refusal
from train_jax.core.errors import UserError

HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Numbers of the kernels in PIL and under the key `resample`.
PIL_KERNELS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
KERNELS = {number: name for name, number in PIL_KERNELS.items()}

ROUNDED = 1e-3  # largest relative difference of rescale_factor from 1/255: a rounded decimal
FLOAT32 = 1e-6  # relative difference that does not change float32 pixels

SIGLIP, CLIP = "SiglipImageProcessor", "CLIPImageProcessor"
DEFAULTS: dict[str, dict[str, Any]] = {
    SIGLIP: {
        "size": {"height": 224, "width": 224},
        "do_center_crop": False,
        "crop_size": None,
        "resample": PIL_KERNELS["bicubic"],
        "image_mean": HALF,
        "image_std": HALF,
    },
    CLIP: {
        "size": {"shortest_edge": 224},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "resample": PIL_KERNELS["bicubic"],
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    },
}
# Names of these classes in files.
CLASSES = {SIGLIP: SIGLIP, CLIP: CLIP, "CLIPFeatureExtractor": CLIP, "SiglipFeatureExtractor": SIGLIP} | {
    f"{name}{variant}": name for name in (SIGLIP, CLIP) for variant in ("Fast", "Pil")
}
KEYS = KnownKeys(
    read=frozenset(
        {*DEFAULTS[CLIP], "default_to_square", "feature_extractor_type", "image_processor_type", "rescale_factor"}
    ),
    only={
        "do_resize": (True,),
        "do_rescale": (True,),
        "do_normalize": (True,),
        "do_pad": (False,),
        "antialias": (True,),
    },
    idle=frozenset(
        {
            "_processor_class",
            "_valid_processor_keys",  # names of arguments, in files of 4.38 to 4.45
            "backend",
            "data_format",
            "device",
            "disable_grouping",
            "do_convert_rgb",  # images are RGB here
            "image_seq_length",  # follows from the tower
            "input_data_format",
            "pad_size",  # of do_pad
            "processor_class",
            "return_tensors",
        }
    ),
)


def read_fields(values: Mapping[str, Any], family: str, file: str, section: str = "") -> dict[str, Any]:
    """Returns the fields of `Preprocessing`: size, method, mean, std, crop and resized.

    Args:
      values: the JSON object of an image processor. As in transformers, null means the default, except that it switches
        a step off (do_resize and such); within a size, null means no entry.
      family: the class to assume if the object names none, SIGLIP or CLIP.
      file, section: the object's file and key, for messages.

    Raises:
      UserError: a step that these classes do not have, or an invalid value, with file, key and value.
    """
    account(values, KEYS, file, section)
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if values.get(key, True) is None:
            raise refusal(file, section + key, None, "True, as null switches the step off")
    given = {key: value for key, value in values.items() if value is not None}
    for key in ("image_processor_type", "feature_extractor_type"):
        name = given.get(key, family)
        if not isinstance(name, str) or name not in CLASSES:
            raise refusal(file, section + key, name, f"{SIGLIP} or {CLIP}", "use a folder of those families")
    name = CLASSES[given.get("image_processor_type") or given.get("feature_extractor_type") or family]
    off = {"do_center_crop": False} if values.get("do_center_crop", True) is None else {}
    given = DEFAULTS[name] | {"default_to_square": False, "rescale_factor": 1 / 255} | given | off

    def refused(key: str, expected: str):
        return refusal(file, section + key, given.get(key), expected, "use a folder of SigLIP or CLIP, or correct it")

    if type(given["resample"]) is not int or given["resample"] not in KERNELS:
        raise refused("resample", f"one of {', '.join(map(str, KERNELS))} (nearest, lanczos, bilinear, bicubic)")
    for key in ("do_center_crop", "default_to_square"):
        if type(given[key]) is not bool:
            raise refused(key, "true or false")
    mean, std = _moments(given, refused)
    return {"method": KERNELS[given["resample"]], "mean": mean, "std": std} | _sizes(given, refused)


def _moments(given: Mapping[str, Any], refused: Callable[[str, str], UserError]) -> list[tuple[float, ...]]:
    """Returns mean and deviation of pixels in 0 to 1; a rounded rescale_factor is folded into them."""
    scale = given["rescale_factor"]
    if not _is_number(scale) or abs(scale * 255 - 1) > ROUNDED:
        raise refused("rescale_factor", "1/255")
    unit = 1.0 if abs(scale * 255 - 1) <= FLOAT32 else scale * 255
    moments = []
    for key in ("image_mean", "image_std"):
        numbers = [given[key]] * 3 if _is_number(given[key]) else given[key]
        if not isinstance(numbers, (list, tuple)) or len(numbers) != 3 or not all(map(_is_number, numbers)):
            raise refused(key, "three numbers")
        moments.append(tuple(number / unit for number in numbers))
    if not all(moments[1]):
        raise refused("image_std", "numbers other than 0")
    return moments


def _sizes(given: Mapping[str, Any], refused: Callable[[str, str], UserError]) -> dict[str, Any]:
    """Returns the fields size, crop and resized."""
    side = _side(given["size"], given["default_to_square"])
    if side is None:
        raise refused("size", "one square size, {'height': N, 'width': N}, or the short side's, {'shortest_edge': N}")
    resized, short = side
    if not given["do_center_crop"]:
        if short:
            raise refused("size", "a height and a width where nothing is cropped, or images keep their shape")
        return {"size": resized, "crop": False, "resized": None}
    side, no_square = _side(given["crop_size"], square=True) or (0, True)
    if no_square or side > resized:
        raise refused("crop_size", f"one square size, at most the {resized} pixels that images are resized to")
    return {"size": side, "crop": short, "resized": None if side == resized else resized}


def _side(size: Any, square: bool) -> tuple[int, bool] | None:
    """Returns the pixels a side, and whether it is the short side; None for any other value.

    Args:
      size: N, [N, N], {"height": N, "width": N} or {"shortest_edge": N}.
      square: whether a bare N is the side of a square; otherwise it is the short side.
    """
    if type(size) is int:
        size = [size, size] if square else {"shortest_edge": size}
    if isinstance(size, (list, tuple)) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    edges = {key: value for key, value in size.items() if value is not None} if isinstance(size, dict) else {}
    if edges.keys() not in ({"height", "width"}, {"shortest_edge"}) or not all(map(_is_side, edges.values())):
        return None
    first, *others = edges.values()
    return (first, "shortest_edge" in edges) if others in ([], [first]) else None


def _is_side(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
