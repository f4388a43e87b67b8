"""Images of the classes of single synthetic objects, in CoOp's layout; rendered once and cached."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from paligemma_jax.data.few_shot.coop import read_coop, write_split_file
from paligemma_jax.data.few_shot.dataset import SPLITS, Example, FewShot
from paligemma_jax.data.synthetic_clevr.build import VERSION, encode_png, ordered_map
from paligemma_jax.data.synthetic_clevr.classes import CLASSES, class_scenes, describe
from paligemma_jax.data.synthetic_clevr.styles import PLAIN, STYLES, render_styled
from train_jax.core.errors import UserError
from train_jax.core.files import atomic

PER_CLASS = {"train": 16, "val": 4, "test": 10}


def synthetic_classes(
    cache_dir: str | Path,
    size: int,
    per_class: Mapping[str, int] = PER_CLASS,
    style: str = PLAIN,
    seed: int = 0,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> FewShot:
    """Returns the 96 classes of single objects (synthetic_clevr.classes); base classes are the first half.

    Base and novel classes differ in combinations of values. With `FewShot.ordered` by the names of
    `synthetic_clevr.classes.in_halves` they differ in colours, or in materials of shapes (`data.novel` of the config).

    Args:
      cache_dir: holds a folder for every set of these arguments.
      size: pixels a side.
      per_class: images per class in each split; a split with 0 or none is empty.
      style: of the images, a name in `styles.STYLES`; every style shows the same scenes.
      seed: of the scenes; scenes of different splits are disjoint.
      workers: processes that render; the images do not depend on their number.
      progress: called with images done and the total.

    Raises:
      UserError: an unknown style, or no images.
    """
    numbers = [per_class.get(split, 0) for split in SPLITS]
    if style not in STYLES or min(numbers) < 0 or not any(numbers):
        raise UserError(
            f"the style is {style!r} and the images per class are {dict(per_class)}, expected one of "
            f"{', '.join(STYLES)} and at least one image: change them."
        )
    name = "-".join(["classes", f"v{VERSION}", str(size), *map(str, numbers), str(seed), style])
    folder = Path(cache_dir).expanduser() / name
    if not folder.exists():
        try:
            _build(folder, size, dict(zip(SPLITS, numbers, strict=True)), style, seed, workers, progress)
        except OSError:  # another process was first, and its set is the same
            if not folder.exists():
                raise
    return read_coop(folder)


def class_descriptions() -> dict[str, tuple[str, ...]]:
    """Returns sentences about every class under both of its names, as in a file of descriptions."""
    return {name: describe(values) for values in CLASSES for name in (values.name, values.in_other_words)}


def _build(folder: Path, size: int, numbers: dict[str, int], style: str, seed: int, workers: int, progress) -> None:
    """Writes the set to a temporary folder and renames it at the end, so that an existing folder is complete."""
    with atomic(folder) as draft:
        for values in CLASSES:
            (draft / "images" / _folder(values.name)).mkdir(parents=True)
        splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
        jobs = [
            (split, label, scene)
            for split, number in numbers.items()
            for label, scene in class_scenes(seed, f"classes-{split}", number)
        ]
        images = ordered_map(partial(_render, size, style), [scene for _, _, scene in jobs], workers)
        for done, ((split, label, scene), png) in enumerate(zip(jobs, images, strict=True), start=1):
            name = f"{_folder(CLASSES[label].name)}/{split}_{scene['image_index']:06d}.png"
            (draft / "images" / name).write_bytes(png)
            splits[split].append(Example(name, label))
            if progress:
                progress(done, len(jobs))
        names = tuple(values.name for values in CLASSES)
        examples = {split: tuple(rows) for split, rows in splits.items()}
        write_split_file(FewShot(folder.name, draft / "images", names, examples), draft)


def _render(size: int, style: str, scene: dict) -> bytes:
    return encode_png(render_styled(scene, size, size, STYLES[style]))


def _folder(name: str) -> str:
    return name.replace(" ", "_")
