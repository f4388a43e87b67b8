"""Questions about synthetic scenes, which are rendered on first use and cached."""

from pathlib import Path

from ml_collections import ConfigDict

from paligemma_jax.data.sources.clevr import ClevrQuestions, prepare_clevr
from paligemma_jax.data.sources.folder_lock import locked
from paligemma_jax.data.sources.splits import Progress
from paligemma_jax.data.synthetic_clevr.build import VERSION, build_tree, is_built


def open_questions(data: ConfigDict, split: str, progress: Progress) -> ClevrQuestions:
    """Opens the questions of a split, rendering the scenes on first use; see splits.open_source."""
    return ClevrQuestions(_rendered(data, progress), split, data.prompt)


def synthetic_folder(data: ConfigDict) -> Path:
    """Returns the cache folder of the synthetic set with these numbers and this generator version."""
    numbers = (data.image_size, data.num_train_scenes, data.num_validation_scenes, data.questions_per_scene)
    name = "-".join(map(str, ("synthetic", f"v{VERSION}", *numbers, data.scene_seed)))
    return Path(data.cache_dir).expanduser() / name


def _rendered(data: ConfigDict, progress: Progress) -> Path:
    """Returns the folder of the synthetic set with these numbers, rendering and preparing it on first use."""
    size, numbers = data.image_size, (data.num_train_scenes, data.num_validation_scenes)
    folder = synthetic_folder(data)
    with locked(folder):
        for split, number in zip(("train", "val"), numbers, strict=True):
            if is_built(folder / "CLEVR", split):
                continue
            with progress(f"rendering {number} {split} scenes") as on_progress:
                build_tree(
                    folder / "CLEVR",
                    split,
                    number,
                    data.questions_per_scene,
                    size,
                    size,
                    data.scene_seed,
                    progress=on_progress,
                    workers=data.build_workers,
                )
        return prepare_clevr(folder / "CLEVR", folder / "prepared")
