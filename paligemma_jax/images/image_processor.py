"""transformers' image processors of SigLIP and CLIP: their JSON, its defaults, and what of it is supported.

preprocessor_config.json holds one (releases up to 4), or processor_config.json at its key image_processor (5). What a
file leaves out is the default of its own class, in transformers and here.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from paligemma_jax.files.side_files import Keys, account, refusal
from train_jax.core.errors import UserError

HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Numbers as PIL and the key `resample` count the kernels.
PIL_KERNELS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
KERNELS = {number: name for name, number in PIL_KERNELS.items()}

ROUNDED = 1e-3  # how far a file's rescale_factor may be from 1/255, relative to it, as a decimal that was cut
FLOAT32 = 1e-6  # and how far without a difference in pixels of float32

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
    """What `Preprocessing` needs: size, method, mean, std, crop and resized.

    Args:
      values: the JSON object of an image processor. A null stands for the default, but switches a step off (do_resize
        and such), as in transformers; within a size it is no entry.
      family: the class that stands for one that names none, SIGLIP or CLIP.
      file, section: where it stands, for messages.

    Raises:
      UserError: a step that these classes do not take, or a value that makes no sense, with file, key and value.
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
    """Mean and deviation of pixels from 0 to 1, in which a rescale_factor that was rounded is contained."""
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
    """The fields size, crop and resized."""
    found = _side(given["size"], given["default_to_square"])
    if found is None:
        raise refused("size", "one square size, {'height': N, 'width': N}, or the short side's, {'shortest_edge': N}")
    resized, short = found
    if not given["do_center_crop"]:
        if short:
            raise refused("size", "a height and a width where nothing is cropped, or pictures keep their shape")
        return {"size": resized, "crop": False, "resized": None}
    side, no_square = _side(given["crop_size"], square=True) or (0, True)
    if no_square or side > resized:
        raise refused("crop_size", f"one square size, at most the {resized} pixels that images are resized to")
    return {"size": side, "crop": short, "resized": None if side == resized else resized}


def _side(size: Any, square: bool) -> tuple[int, bool] | None:
    """Pixels a side, and whether they are those of the short side; None for what is neither.

    Args:
      size: N, [N, N], {"height": N, "width": N} or {"shortest_edge": N}.
      square: whether N alone is the side of a square, and not the short side.
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
