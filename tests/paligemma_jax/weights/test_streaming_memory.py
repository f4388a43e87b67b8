"""Memory of reading a checkpoint, measured in a separate process on files of half a gigabyte."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from paligemma_jax.models.gemma import GemmaConfig
from paligemma_jax.models.paligemma import PaliGemma, PaliGemmaConfig
from paligemma_jax.models.vit import ViTConfig
from paligemma_jax.weights.big_vision import paligemma as big_vision
from paligemma_jax.weights.big_vision.npz import write_npz
from paligemma_jax.weights.hugging_face import paligemma as hugging_face
from paligemma_jax.weights.name_table import stacked, write_rows
from train_jax.core import param_tree

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc/self/status"),
]

CONFIG = PaliGemmaConfig(
    vision=ViTConfig(image_size=28, patch_size=14, width=128, depth=2, mlp_dim=256, num_heads=4),
    decoder=GemmaConfig(
        vocab_size=65_536, width=1024, depth=20, mlp_dim=2880, num_heads=8, head_dim=128, dtype="bfloat16"
    ),
)
ROOT = Path(__file__).parents[3]

# The peak since the process began; a small model is read first to exclude imports, backend and first compilations.
SCRIPT = """
import json, sys
from paligemma_jax.weights.reader import load
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
options = json.loads(sys.argv[3])
load(sys.argv[1], "bfloat16", **options)
before = peak()
model = load(sys.argv[2], "bfloat16", **options)
print(peak() - before)
"""


@pytest.fixture(scope="module")
def abstract():
    return param_tree.abstract(
        nnx.eval_shape(lambda: PaliGemma(CONFIG.replace(both=dict(param_dtype="bfloat16")), rngs=nnx.Rngs(0)))
    )


@pytest.fixture(scope="module")
def stored(abstract):
    """Bytes of the model in bfloat16, and of its largest layer."""
    sizes = {path: 2 * leaf.size for path, leaf in abstract.items()}
    layer = sum(size // CONFIG.decoder.depth for path, size in sizes.items() if stacked(path) and "decoder" in path)
    assert sum(sizes.values()) >= 500e6
    return sum(sizes.values()), layer


@pytest.fixture(scope="module")
def files(abstract, tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    arrays = {path: np.ones(leaf.shape, leaf.dtype) for path, leaf in abstract.items()}
    hugging_face.save(folder / "hugging_face", CONFIG, arrays, image_token=0)
    write_npz(folder / "x.npz", write_rows(big_vision.rows(), arrays, "x.npz"))
    return {"hugging_face": folder / "hugging_face", "big_vision": folder / "x.npz"}


def peak_of_loading(golden, path, **options):
    """Returns the bytes above those that the process held before."""
    arguments = [sys.executable, "-c", SCRIPT, str(golden / "hf_paligemma"), str(path), json.dumps(options)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, timeout=550)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("kind", ["hugging_face", "big_vision"])
def test_loading_needs_little_more_memory_than_the_model(golden, files, stored, kind):
    total, layer = stored
    assert peak_of_loading(golden, files[kind]) <= 1.1 * total + layer


def test_quantising_while_loading_never_holds_the_plain_model(golden, files, stored):
    """The result is under half of it (the embedding stays plain); the rest is the quantiser's work on one layer."""
    assert peak_of_loading(golden, files["hugging_face"], quantize="nf4") < stored[0]
