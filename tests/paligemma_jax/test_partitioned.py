"""PaliGemma's, SigLIP's and CoPrompt's programs divided over 8 devices, see tests/partitioned.py."""

import pytest

from tests import partitioned
from tests.paligemma_jax.mini import CLEVR, ROOT, save_small_siglip
from tests.partitioned import Case

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
