"""A PaliGemma and a CLEVR small enough to train and evaluate in seconds, and running the entry points on them."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import train
from paligemma_jax import weights
from paligemma_jax.data.records import Record, RecordSource
from paligemma_jax.data.sources.synthetic import synthetic_folder
from paligemma_jax.data.tokenizers.paligemma import load_tokenizer
from paligemma_jax.images.preprocessing import Preprocessing
from paligemma_jax.models.dual_encoder import DualEncoder
from paligemma_jax.models.gemma import GemmaConfig
from paligemma_jax.models.paligemma import PaliGemma, PaliGemmaConfig
from paligemma_jax.models.variants import variant
from paligemma_jax.models.vit import ViTConfig
from paligemma_jax.weights.hugging_face import paligemma as hugging_face
from tests.fast_compile import compiling_fast
from train_jax.config import command_line
from train_jax.core import param_tree
from train_jax.parallel import sharding

ROOT = Path(__file__).parents[2]
CLEVR = str(ROOT / "configs/clevr.py")
MINI = PaliGemmaConfig(
    vision=ViTConfig(image_size=24, patch_size=12, width=16, depth=1, mlp_dim=32, num_heads=2),
    decoder=GemmaConfig(vocab_size=1792, width=32, depth=2, mlp_dim=32, num_heads=4, head_dim=8),
    preprocessing=Preprocessing.siglip(24),
)
SCENES = {
    "data.image_size": 24,
    "data.num_train_scenes": 8,
    "data.num_validation_scenes": 4,
    "data.questions_per_scene": 5,
    "data.build_workers": 1,
    "data.tune_fraction": 0.25,
    "data.prefix_length": 56,
    "data.suffix_length": 4,
}
SHORT = {
    "batch_size": 8,
    "total_steps": 12,
    "log_steps": 4,
    "eval_steps": 6,
    "checkpoint_steps": 6,
    "mesh.data": 1,
    "eval.batch_size": 8,
    "eval.max_new_tokens": 4,
    "adapter.dropout": 0.1,
    "data.threads": 0,
    "optimizer.learning_rate": 0.1,
    "eval.candidates": "yes|no|1|2|red|blue|cube|small|metal",
}


@pytest.fixture(scope="session")
def mini_folder(tmp_path_factory):
    """The model as transformers saves it, with random weights, and its tokenizer."""
    folder = tmp_path_factory.mktemp("mini")
    tokenizer = load_tokenizer("tiny")
    rng = np.random.default_rng(0)
    shapes = param_tree.abstract(nnx.eval_shape(lambda: PaliGemma(MINI, rngs=nnx.Rngs(0))))
    arrays = {path: 0.3 * rng.standard_normal(leaf.shape).astype(np.float32) for path, leaf in shapes.items()}
    hugging_face.save(folder, MINI, arrays, tokenizer.image_id)
    (folder / "preprocessor_config.json").write_text(json.dumps(MINI.preprocessing.to_hugging_face()))
    (folder / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    return folder


@pytest.fixture(scope="session")
def mini_options(mini_folder, tmp_path_factory):
    """Overrides by dotted key that make configs/clevr.py a run of seconds."""
    cache = tmp_path_factory.mktemp("cache")
    return {"model.path": str(mini_folder), "data.cache_dir": str(cache)} | SCENES | SHORT


@pytest.fixture(scope="session")
def mini_run(mini_options, tmp_path_factory, compiled_folder):
    """The workdir of a finished run; read-only."""
    workdir = tmp_path_factory.mktemp("runs") / "clevr"
    with compiling_fast(compiled_folder):
        train_main(workdir, mini_options)
    return workdir


def arguments(workdir: Path | None, options: dict, *more: str, config: str | None = CLEVR) -> list[str]:
    """A command line."""
    places = [f"--config={config}"] * (config is not None) + [f"--workdir={workdir}"] * (workdir is not None)
    return [str(ROOT / "train.py"), *places, *(f"--config.{key}={value}" for key, value in options.items()), *more]


def train_main(workdir: Path, options: dict, *more: str, config: str = CLEVR) -> None:
    """train.py in this process."""
    train.main(arguments(workdir, options, "--progress=none", *more, config=config))


def config_of(options: dict, config: str = CLEVR):
    """The config of a command line."""
    return command_line.load_from_flags(arguments(None, options, config=config))[0]


def task_of(options: dict, config: str = CLEVR):
    """The task of a command line."""
    from paligemma_jax.tasks.vqa.task import VQA  # slow to import

    settings = config_of(options, config)
    return VQA(settings, sharding.make_mesh(settings.mesh))


def prepared_scenes(options: dict) -> Path:
    """Returns the tree that the scenes of a run are read from."""
    return synthetic_folder(config_of(options).data) / "prepared"


def mistake(capsys, options: dict, workdir: Path, *more: str, config: str = CLEVR, main=train.main) -> str:
    """Returns the sentence that a failing command line ends with; its exit status is 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command_line.run(main, arguments(workdir, options, *more, config=config))
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert len(lines) == 1
    return lines[0].partition(": error: ")[2]


def read_lines(file: Path) -> list[dict]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_rows(folder: Path, split: str, rows: list[dict]) -> None:
    """A JSONL split."""
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Rows(RecordSource):
    """Records in a list, as a source."""

    fingerprint = "rows"

    def __init__(self, records: list[Record]):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]

    def image_numbers(self) -> np.ndarray:
        return np.array([record.image_index for record in self.records])


def save_small_siglip(make_random, folder: Path) -> Path:
    """A small SigLIP with the tiny tokenizer, as transformers saves it; `make_random` is the fixture."""
    sizes = dict(width=16, depth=1, mlp_dim=24, num_heads=2)
    config = variant("tiny").replace(vision=sizes | {"image_size": 24}, text=sizes | {"length": 16}, embed_dim=16)
    config = dataclasses.replace(config, preprocessing=dataclasses.replace(config.preprocessing, size=24))
    model = make_random(nnx.eval_shape(lambda: DualEncoder(config, rngs=nnx.Rngs(0))))
    weights.save_hugging_face(model, folder, "tiny")
    return folder


def png(seed: int) -> bytes:
    """An image of noise."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 24, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def mini_rows():
    """Thirteen questions about five images, three for each but the last."""
    questions = ("How many red cubes are there?", "What color is the large sphere?", "Is there a small thing?")
    answers = ("2", "red", "yes")
    return Rows(
        [
            Record(png(i // 3), f"{i // 3}.png", i // 3, f"answer en {questions[i % 3]}", answers[(i + i // 3) % 3])
            for i in range(13)
        ]
    )
