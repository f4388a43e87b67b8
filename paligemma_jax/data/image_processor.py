"""transformers' image processors of SigLIP and CLIP: their JSON, its defaults, and what of it is supported.

preprocessor_config.json holds one (releases up to 4), or processor_config.json at its key image_processor (5). What a
file leaves out is the default of its own class, in transformers and here.
"""

import math
from collections.abc import Mapping
from typing import Any

from paligemma_jax.side_files import Keys, account, refusal

HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Numbers as PIL and the key `resample` count the kernels.
PIL_KERNELS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
KERNELS = {number: name for name, number in PIL_KERNELS.items()}

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
# How files call these classes.
CLASSES = {SIGLIP: SIGLIP, CLIP: CLIP, "CLIPFeatureExtractor": CLIP, "SiglipFeatureExtractor": SIGLIP} | {
    f"{name}{variant}": name for name in (SIGLIP, CLIP) for variant in ("Fast", "Pil")
}
KEYS = Keys(
    read=frozenset({*DEFAULTS[CLIP], "image_processor_type", "feature_extractor_type", "rescale_factor"}),
    only={
        "do_resize": (True,),
        "do_rescale": (True,),
        "do_normalize": (True,),
        "do_pad": (False,),
        "default_to_square": (False,),
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
    """What `Preprocessing` needs: size, method, mean, std and crop.

    Args:
      values: the JSON object of an image processor.
      family: the class that stands for one that names none, SIGLIP or CLIP.
      file, section: where it stands, for messages.

    Raises:
      UserError: a step that these classes do not take, or a value that makes no sense, with file, key and value.
    """
    account(values, KEYS, file, section)
    given = {key: value for key, value in values.items() if value is not None}
    for key in ("image_processor_type", "feature_extractor_type"):
        name = given.get(key, family)
        if name not in CLASSES:
            raise refusal(file, section + key, name, f"{SIGLIP} or {CLIP}", "use a folder of those families")
    name = CLASSES[given.get("image_processor_type") or given.get("feature_extractor_type") or family]
    given = DEFAULTS[name] | given

    def refused(key: str, expected: str):
        return refusal(file, section + key, given.get(key), expected, "use a folder of SigLIP or CLIP, or correct it")

    if given["resample"] not in KERNELS or type(given["resample"]) is not int:
        raise refused("resample", f"one of {', '.join(map(str, KERNELS))} (nearest, lanczos, bilinear, bicubic)")
    scale = given.get("rescale_factor", 1 / 255)
    if not _is_number(scale) or abs(scale - 1 / 255) > 1e-9:
        raise refused("rescale_factor", "1/255")
    means = {}
    for key in ("image_mean", "image_std"):
        numbers = [given[key]] * 3 if _is_number(given[key]) else given[key]
        if not isinstance(numbers, (list, tuple)) or len(numbers) != 3 or not all(map(_is_number, numbers)):
            raise refused(key, "three numbers")
        means[key] = tuple(float(number) for number in numbers)
    if type(given["do_center_crop"]) is not bool:
        raise refused("do_center_crop", "true or false")
    side, crop = _side(given["size"], name), given["do_center_crop"]
    if side is None:
        raise refused("size", "one square size, {'height': N, 'width': N}, or CLIP's {'shortest_edge': N}")
    side, short = side
    if crop and _square(given["crop_size"]) != side:
        raise refused("crop_size", f"the {side} pixels that images are resized to")
    if short and not crop:
        raise refused("size", "a height and a width where nothing is cropped, or pictures keep their shape")
    return {
        "size": side,
        "method": KERNELS[given["resample"]],
        "mean": means["image_mean"],
        "std": means["image_std"],
        "crop": short,
    }


def _side(size: Any, name: str) -> tuple[int, bool] | None:
    """Pixels a side, and whether they are those of the short side; None for what is neither."""
    if isinstance(size, int):  # of CLIP's first files; a SigLIP has none, transformers would keep pictures' shape
        size = {"shortest_edge": size} if name == CLIP else None
    if isinstance(size, dict) and size.keys() == {"shortest_edge"} and _is_side(size["shortest_edge"]):
        return size["shortest_edge"], True
    side = _square(size)
    return None if side is None else (side, False)


def _square(size: Any) -> int | None:
    """N of N, or of {"height": N, "width": N}."""
    sides = {size} if isinstance(size, int) else set(size.values()) if _has_both(size) else set()
    return sides.pop() if len(sides) == 1 and all(map(_is_side, sides)) else None


def _has_both(size: Any) -> bool:
    return isinstance(size, dict) and size.keys() == {"height", "width"} and all(map(_is_side, size.values()))


def _is_side(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
