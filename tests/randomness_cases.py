"""Small configs of every task with all of its randomness switched on, for tests/test_randomness.py.

A new task needs a case here, or the test fails.
"""

import contextlib
import dataclasses
import importlib
import inspect
import json
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

import flow_jax
import paligemma_jax
from paligemma_jax.tasks.contrastive import task as contrastive
from paligemma_jax.tasks.pretraining import scene_task
from tests.paligemma_jax.conftest import randomised
from tests.paligemma_jax.mini import MINI, ROOT, config_of, png, save_small_siglip
from tests.paligemma_jax.tasks.contrastive.test_task import SMALL, variant
from tests.train_jax.toy_task import PATH, toy_config
from train_jax.task import Task

BATCH = 8


@dataclasses.dataclass(frozen=True)
class Case:
    """A run of a task.

    Attributes:
      options: of the config by dotted key.
      config: its file in configs/, with its argument; "" for the toy task.
      whole: part of the message that refuses micro-batches, for a loss that needs all rows of a batch.
      elsewhere: more options for computations other than in one batch on one device.
      random_step: whether the step uses random keys, and not only the data.
    """

    options: dict[str, Any]
    config: str = ""
    whole: str = ""
    elsewhere: dict[str, Any] = dataclasses.field(default_factory=dict)
    random_step: bool = True

    def make(self, **changes: Any) -> ConfigDict:
        """Returns the config with changes by dotted key."""
        options = {"batch_size": BATCH, "data.threads": 0} | self.options | changes
        if self.config:
            return config_of(options, str(ROOT / "configs" / self.config))
        return toy_config(**{key.replace(".", "__"): value for key, value in options.items()})


def task_paths() -> set[str]:
    """Returns the import paths of all tasks in the packages."""
    result = {PATH}
    for package in (flow_jax, paligemma_jax):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name.endswith("__main__"):
                continue
            for name, value in vars(importlib.import_module(module.name)).items():
                own = inspect.isclass(value) and value.__module__ == module.name and not inspect.isabstract(value)
                if own and issubclass(value, Task):
                    result.add(f"{module.name.removesuffix('.task')}:{name}")  # packages export their task
    return result


FLOW = {"model.width": 16, "model.depth": 2, "data.num_examples": 100}
IMAGES = {
    "coupling.name": "exact",
    "data.name": "shapes",
    "data.num_examples": 30,
    "data.image_size": 8,
    "data.flip": True,
    "model.dropout": 0.3,
    "model.label_dropout": 0.5,
    "model.unet.width": 8,
    "model.unet.head_width": 8,
    "model.unet.multipliers": "(1,)",
    "model.unet.attention": "()",
}
SCENES = {"data.num_scenes": 8, "data.num_held_out": 6, "data.build_workers": 1}
DRAWN = {
    "data.image_size": 8,
    "siglip": None,
    "times": "stratified",
    "model.label_dropout": 0.5,
    "model.dropout": 0.3,
    "model.dit.width": 16,
    "model.dit.depth": 1,
    "model.dit.num_heads": 2,
}
LORA = {
    "cache_features": False,
    "adapter.targets": r".*(q_proj|o_proj)",
    "adapter.dropout": 0.3,
    "consistency.weight": 1.0,
    "consistency.on": "both",
    "consistency.prompts": "(('caption en','a red cube'),('describe en','small'),('detect ball','two'))",
}
GATES = {"adapter.name": "diff_pruning", "adapter.dropout": 0.0}
TEXTS = {"data.text_length": 32, "data.num_segments": 3, "init_from": "()", "optimizer.rates": "()"}
PAIRS = SCENES | {"data.text_length": 24, "init.vision": None}
IN_PARTS = {"embed_micro_batch": 4}
FEW = {"data.name": "images", "shots": 2, "prompts.text_adapter": 3, "prompts.image_adapter": 3}

CASES = {
    PATH: {"dropout": Case({"model.dropout": 0.5})},
    "flow_jax.tasks.plane:PlaneFlow": {
        "noise on the way": Case(
            FLOW | {"coupling.name": "exact", "times": "stratified", "path.name": "cfm"}, "flow_2d.py"
        ),
        "exact in groups": Case(
            FLOW | {"coupling.name": "exact", "coupling.group": 4, "times": "logit_normal"}, "flow_2d.py"
        ),
        "entropic in groups": Case(
            FLOW | {"coupling.name": "sinkhorn", "coupling.group": 2, "path.name": "schroedinger_bridge"}, "flow_2d.py"
        ),
        "entropic": Case(FLOW | {"coupling.name": "sinkhorn"}, "flow_2d.py", "which pairs the rows of a step"),
    },
    "flow_jax.tasks.images:ImageFlow": {
        "by class": Case(IMAGES, "flow_images.py:smoke"),
        "without labels": Case(IMAGES | {"coupling.group": 2, "data.conditional": False}, "flow_images.py:smoke"),
    },
    "paligemma_jax.tasks.text_to_image:TextToImage": {"attributes": Case(SCENES | DRAWN, "flow_clevr.py:dit,smoke")},
    "paligemma_jax.tasks.vqa:VQA": {
        "LoRA and consistency": Case(LORA, "clevr.py"),
        "gates": Case(GATES, "clevr.py"),
    },
    "paligemma_jax.tasks.pretraining:Pretraining": {
        "texts": Case(SCENES | TEXTS, "pretrain.py", "the loss of the patch heads is a mean", random_step=False),
    },
    "paligemma_jax.tasks.pretraining.vision:VisionPretraining": {
        "patches": Case(SCENES, "pretrain.py:vision", "the loss of the patch heads is a mean", random_step=False),
    },
    "paligemma_jax.tasks.contrastive:Contrastive": {
        "some negatives": Case(
            PAIRS | {"loss.negatives": 3, "init.bias": 0.0}, "siglip.py", "the loss is of all pairs", IN_PARTS
        ),
        "softmax": Case(
            PAIRS | {"loss.name": "softmax"}, "siglip.py", "the loss is of all pairs", IN_PARTS, random_step=False
        ),
    },
    "paligemma_jax.tasks.coprompt:CoPrompt": {"views and sentences": Case(FEW, "coprompt.py", random_step=False)},
}


@contextlib.contextmanager
def small_models() -> Iterator[None]:
    """Makes new models smaller than "tiny" within the context."""
    small = variant("tiny").replace(vision=SMALL | {"image_size": 24}, text=SMALL, embed_dim=16)
    small = dataclasses.replace(small, preprocessing=dataclasses.replace(small.preprocessing, size=24))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contrastive, "variant", lambda name: small)
        patch.setattr(scene_task, "variant", lambda name: MINI)
        yield


def places(task: str, folder: Path, mini_options: dict) -> dict[str, Any]:
    """Returns options that name the files of a task, and writes the files if necessary."""
    if task.endswith(":VQA"):
        return mini_options
    if task.endswith(":CoPrompt"):
        return few_images(folder)
    return {"data.cache_dir": str(folder)} if task.startswith("paligemma_jax") else {}


def few_images(folder: Path) -> dict[str, str]:
    """Writes classes with descriptions, and a model to tune on them."""
    save_small_siglip(randomised, folder / "siglip")
    classes = ("red", "green ball", "blue", "gray cube")
    for number, name in enumerate(classes):
        (folder / "toys" / name).mkdir(parents=True)
        for index in range(6):
            (folder / "toys" / name / f"{index}.png").write_bytes(png(6 * number + index))
    sentences = {name: [f"a {name}", f"one {name}", f"the {name} is small"] for name in classes}
    (folder / "toys.json").write_text(json.dumps(sentences))
    named = {"data.source": "toys", "data.descriptions": "toys.json", "model.path": "siglip"}
    return {key: str(folder / name) for key, name in named.items()}
