"""Sweep over the consistency loss: what tuning on one family of questions does to the others and to captions.

    python train.py --config=configs/clevr_forgetting.py

tunes configs/clevr.py on questions for colours alone, without and with `config.consistency` at several weights, three
seeds each, and reports the change of the scores of all families and of captions (docs/consistency.md). It takes no
argument.
"""

from ml_collections import ConfigDict

from configs import clevr
from train_jax.config import parse_arg
from train_jax.sweep.seeds import over_seeds

PROMPTS = (
    ("caption en", "5 objects: a small red metal cube, a large blue rubber sphere, two large gray"),
    ("caption en", "a large green rubber cylinder, a small yellow metal sphere, a small purple rubber"),
    ("answer en How many things are there?", ""),
    ("answer en Are there any small metal cubes?", ""),
    ("answer en Are there more spheres than cubes?", ""),
    ("answer en What size is the rubber thing?", ""),
    ("answer en What is the large sphere made of?", ""),
    ("answer en What shape is the small metal thing?", ""),
    ("answer en Is the color of the sphere the same as the cube?", ""),
)
"""Pairs of a prefix and its continuation, of the kinds of text that are not tuned; used with any scene, true or not."""

CONSISTENCY = {
    "off": {},
    "weight-0.25": {"consistency.weight": 0.25},
    "weight-1": {"consistency.weight": 1.0},
    "weight-4": {"consistency.weight": 4.0},
    "prompts-1": {"consistency.weight": 1.0, "consistency.prompts": PROMPTS},
}
"""Overrides of each run, by its name."""


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the sweep; arg must be empty."""
    parse_arg(arg)
    config = clevr.get_config()
    config.data.families = ("query_color",)
    config.data.num_train_scenes = 1000  # 10,000 questions, about one in ten of them for a colour
    config.total_epochs = 4.0
    config.eval.captions = 100
    config.eval.controls = False
    config.sweep.runs = over_seeds(CONSISTENCY)
    config.sweep.metric = "change_untuned"
    config.sweep.more = ("change_tuned", "change_captions")
    return config
