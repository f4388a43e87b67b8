"""PaliGemma's, SigLIP's and CoPrompt's programs divided over 8 devices, see tests/partitioned.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paligemma_jax.adapt.lora import attach_lora
from paligemma_jax.adapt.quantize import quantize
from paligemma_jax.generate import generate
from paligemma_jax.models.gemma import Gemma, GemmaConfig
from paligemma_jax.tasks.common import SHARDING_RULES
from tests import partitioned
from tests.paligemma_jax.mini import CLEVR, ROOT, save_small_siglip, task_of
from tests.partitioned import MESHES, ONE, Case
from train_jax import model_state, params, sharding
from train_jax.core import row_sharding
from train_jax.memory import step_memory

SIGLIP = str(ROOT / "configs/siglip.py")
LARGE = ((64,), (16, 64), (16,), (512,), (16, 512), (2, 16), (8, 16))
EMBEDDINGS = ((8,), (8, 16), (16,), (64,), (16, 64), (2, 16))  # the last is of the query of a pooling head


@pytest.fixture(scope="module")
def cases(mini_options, make_random, tmp_path_factory) -> dict[str, Case]:
    vqa = mini_options | {"batch_size": 64, "eval.batch_size": 64, "cache_features": False}
    vqa |= {
        "data.prefix_length": 61
    }  # 64 places that are supervised: chunks of the loss are whole on 1 and on 8 devices
    dual = {"batch_size": 64, "model.path": str(save_small_siglip(make_random, tmp_path_factory.mktemp("dual")))}
    pairs = dual | {"init.vision": None, "data.text_length": 16, "loss.chunk_size": 4}
    many = {"batch_size": 512, "embed_micro_batch": 256}
    return {
        "vqa": Case(CLEVR, vqa, evaluates=True),
        "nf4": Case(CLEVR, vqa | {"model.quantize": "nf4"}),
        "micro-batches": Case(CLEVR, vqa | {"micro_batch": 32, "model.remat": "block"}, passes=4),
        "full": Case(CLEVR, vqa | {"adapter.name": "none"}),
        "sigmoid": Case(SIGLIP, pairs | {"batch_size": 512}, LARGE, evaluates=True),
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


class Stack(nnx.Module):
    """A decoder with many weights, to be given few rows."""

    def __init__(self, remat: str):
        sizes = dict(vocab_size=16, width=64, depth=6, mlp_dim=512, num_heads=8, head_dim=8)
        config = GemmaConfig(**sizes, remat=remat, unroll=True, dtype="bfloat16")
        self.decoder = Gemma(config, rngs=nnx.Rngs(0))


def stack_of(kind: str, remat: str) -> Stack:
    if kind == "nf4":
        return quantize(Stack(remat), "nf4", targets="decoder/layers/mlp/.*")
    attach = attach_lora if kind == "lora" else lambda model, *_, **__: model
    return nnx.eval_shape(lambda: attach(Stack(remat), "decoder/layers/.*_proj", 2, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("remat", ["none", "dots", "block"])
@pytest.mark.parametrize("kind", ["plain", "nf4", "lora"])
def test_no_stack_of_weights_is_held_whole(kind, remat):
    """Every kernel is gathered once forwards and once backwards, a layer at a time, also where layers are unrolled."""
    mesh = sharding.make_mesh(MESHES["fsdp"] | {"tensor": 1})
    model = stack_of(kind, remat)
    places, _ = sharding.shardings(mesh, SHARDING_RULES, params.abstract(model))
    graph, arrays = params.split(row_sharding.mark(model, places))
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[path]) for path, x in arrays.items()}
    trained = {path: x for path, x in shapes.items() if kind == "plain" or "/lora_" in path}
    frozen = {path: x for path, x in shapes.items() if path not in trained}

    def loss(trained, frozen, x):
        mask, positions = jnp.ones((8, 4, 4), bool), jnp.broadcast_to(jnp.arange(4)[None], (8, 4))
        return jnp.square(params.merge(graph, trained | frozen).decoder(x, positions, mask)[0]).sum()

    rows = jax.ShapeDtypeStruct((8, 4, 64), np.float32, sharding=sharding.batch_sharding(mesh, accumulate=False))
    step = jax.jit(row_sharding.within(mesh, jax.grad(loss, (0, 2))))
    compiled = step.lower(trained, frozen, rows).compile()
    kernel = shapes["decoder/layers/mlp/up_proj/kernel" + ("/codes" if kind == "nf4" else "")].shape[1:]
    alike = 2 if kind == "nf4" else 3  # in a layer: gate and up, and unless in codes, which lie by outputs, down
    assert partitioned.read(compiled).exchanged["all-gather", partitioned.sizes(kernel)] == 2 * 6 * alike
    assert step_memory(compiled).temp < 6 * 3 * 64 * 512 * 4  # the MLPs of all layers in float32
