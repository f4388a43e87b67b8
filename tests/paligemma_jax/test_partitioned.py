"""PaliGemma's, SigLIP's and CoPrompt's programs divided over 8 devices, see tests/partitioned.py."""

import jax
import numpy as np
import pytest

from paligemma_jax.generate import generate
from tests import partitioned
from tests.paligemma_jax.mini import CLEVR, ROOT, save_small_siglip, task_of
from tests.partitioned import MESHES, ONE, Case
from train_jax import model_state, sharding
from train_jax.core import row_sharding

SIGLIP = str(ROOT / "configs/siglip.py")
EMBEDDINGS = ((8,), (8, 16), (16,), (64,), (16, 64))


@pytest.fixture(scope="module")
def cases(mini_options, make_random, tmp_path_factory) -> dict[str, Case]:
    vqa = mini_options | {"batch_size": 64, "eval.batch_size": 64, "cache_features": False}
    dual = {"batch_size": 64, "model.path": str(save_small_siglip(make_random, tmp_path_factory.mktemp("dual")))}
    pairs = dual | {"init.vision": None, "data.text_length": 16, "loss.chunk_size": 4}
    many = {"batch_size": 512, "embed_micro_batch": 256}
    return {
        "vqa": Case(CLEVR, vqa, evaluates=True),
        "nf4": Case(CLEVR, vqa | {"model.quantize": "nf4"}),
        "micro-batches": Case(CLEVR, vqa | {"micro_batch": 32, "model.remat": "block"}, passes=4),
        "full": Case(CLEVR, vqa | {"adapter.name": "none"}),
        "sigmoid": Case(SIGLIP, pairs, EMBEDDINGS, evaluates=True),
        "softmax": Case(SIGLIP, pairs | {"loss.name": "softmax"}, EMBEDDINGS),
        "embedded in micro-batches": Case(SIGLIP, pairs | many, ((64,), (16, 64)), passes=6),
        "coprompt": Case(str(ROOT / "configs/coprompt.py"), dual, (*EMBEDDINGS, (16, 48))),
        "pretraining": Case(str(ROOT / "configs/pretrain.py:smoke"), {"batch_size": 16}),
        "pretraining of the tower": Case(str(ROOT / "configs/pretrain.py:vision,smoke"), {"batch_size": 16}),
    }


CASES = (
    "vqa",
    "nf4",
    "micro-batches",
    "full",
    "sigmoid",
    "softmax",
    "embedded in micro-batches",
    "coprompt",
    "pretraining",
    "pretraining of the tower",
)


@pytest.mark.parametrize("mesh", partitioned.MESHES)
@pytest.mark.parametrize("name", CASES)
def test_programs_are_divided(cases, name, mesh, monkeypatch):
    partitioned.check(cases[name], mesh, monkeypatch)


def test_greedy_answers_are_those_of_one_device(mini_options):
    """To the token, with prompts padded on either side, of rows and weights split over 8 devices."""
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (16, 24, 24, 3)).astype(np.float32)
    tokens = rng.integers(3, 1700, (16, 12)).astype(np.int32)
    real = np.arange(12)[None] < rng.integers(4, 13, (16, 1))
    real[::2] = real[::2, ::-1]

    def answers(sizes):
        task = task_of(mini_options | {f"mesh.{axis}": size for axis, size in sizes.items()})
        model = model_state.build(task, task.mesh).model()
        rows = sharding.batch_sharding(task.mesh, accumulate=False)
        with row_sharding.over(task.mesh):
            return np.asarray(generate(model, *jax.device_put((images, tokens, real), rows), 8, eos_id=-1))

    one = answers(ONE)
    assert len(np.unique(one, axis=0)) > 8
    for mesh in MESHES.values():
        np.testing.assert_array_equal(answers(mesh), one)
