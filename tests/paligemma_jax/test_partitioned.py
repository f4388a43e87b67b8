"""PaliGemma's, SigLIP's and CoPrompt's programs divided over 8 devices, see tests/partitioned.py."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paligemma_jax.adapt.lora.adapter import attach_lora
from paligemma_jax.adapt.peft.diff_pruning import attach_diff
from paligemma_jax.adapt.quantization.quantize import quantize
from paligemma_jax.generation.generate import _generate, generate
from paligemma_jax.generation.token_sampling import make_sampler
from paligemma_jax.models.gemma import Gemma, GemmaConfig
from paligemma_jax.models.paligemma import PaliGemma, PaliGemmaConfig, Projector
from paligemma_jax.models.pooling import MAPHead
from paligemma_jax.models.text_encoder import TextConfig, TextEncoder
from paligemma_jax.models.vit import ViTConfig
from paligemma_jax.tasks.common import SHARDING_RULES
from tests import partitioned
from tests.paligemma_jax.mini import CLEVR, ROOT, save_small_siglip, task_of
from tests.partitioned import MESHES, ONE, Case
from tests.placed_model import placed_model
from train_jax.core import param_tree, row_sharding
from train_jax.parallel import sharding
from train_jax.system.memory import step_memory

SIGLIP = str(ROOT / "configs/siglip.py")
LARGE = ((64,), (16, 64), (16,), (512,), (16, 512), (2, 16), (8, 16))
EMBEDDINGS = ((8,), (8, 16), (16,), (64,), (16, 64), (2, 16))  # the last is of the query of a pooling head


@pytest.fixture(scope="module")
def cases(mini_options, make_random, tmp_path_factory) -> dict[str, Case]:
    vqa = mini_options | {"batch_size": 64, "eval.batch_size": 64, "cache_features": False}
    # The loop over chunks of supervised tokens counts once: one chunk holds all tokens, on 1 and on 8 devices.
    vqa |= {"data.prefix_length": 61, "loss.chunk_size": 64 * 64}
    dual = {"batch_size": 64, "model.path": str(save_small_siglip(make_random, tmp_path_factory.mktemp("dual")))}
    pairs = dual | {"init.vision": None, "data.text_length": 16, "loss.chunk_size": 4}
    many = {"batch_size": 1024, "embed_micro_batch": 512}
    return {
        "vqa": Case(CLEVR, vqa, evaluates=True),
        "nf4": Case(CLEVR, vqa | {"model.quantize": "nf4"}),
        "micro-batches": Case(CLEVR, vqa | {"micro_batch": 16, "model.remat": "block"}, passes=8),
        "full": Case(CLEVR, vqa | {"adapter.name": "none"}),
        "sigmoid": Case(SIGLIP, pairs | {"batch_size": 512}, LARGE, evaluates=True),
        "softmax": Case(SIGLIP, pairs | {"loss.name": "softmax", "batch_size": 512}, LARGE),
        "embedded in micro-batches": Case(SIGLIP, pairs | many, ((128,), (16, 128), (2, 16)), passes=6),
        # The frozen tower encodes every image in a separate pass.
        "coprompt": Case(str(ROOT / "configs/coprompt.py"), dual, (*EMBEDDINGS, (16, 48)), passes=3),
        "pretraining": Case(str(ROOT / "configs/pretrain.py:smoke"), {"batch_size": 16}),
        # Compared as a loop, as the stack is where weights are gathered; unrolled, one device takes less memory.
        "pretraining of the tower": Case(
            str(ROOT / "configs/pretrain.py:vision,smoke"), {"batch_size": 64, "model.unroll": False}
        ),
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


@pytest.mark.parametrize("name", ["clevr.py:3b,qlora", "siglip.py:b16", "flow_clevr.py"])
def test_a_device_holds_its_share_of_the_parameters(name):
    """Also where a task wraps its model: a rule that matches no path would leave it whole on every device, unsaid."""
    assert partitioned.held_share(Case(str(ROOT / "configs" / name), {}), "fsdp") <= 1.1


def test_greedy_answers_are_those_of_one_device(mini_options):
    """With prompts padded on either side, and rows and weights split over 8 devices."""
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (16, 24, 24, 3)).astype(np.float32)
    tokens = rng.integers(3, 1700, (16, 12)).astype(np.int32)
    real = np.arange(12)[None] < rng.integers(4, 13, (16, 1))
    real[::2] = real[::2, ::-1]

    def answers(sizes):
        task = task_of(mini_options | {f"mesh.{axis}": size for axis, size in sizes.items()})
        model = placed_model(task).model()
        rows = sharding.batch_sharding(task.mesh, accumulate=False)
        with row_sharding.use_mesh(task.mesh):
            return np.asarray(generate(model, *jax.device_put((images, tokens, real), rows), 8, eos_id=-1))

    one = answers(ONE)
    assert len(np.unique(one, axis=0)) > 8
    for mesh in MESHES.values():
        np.testing.assert_array_equal(answers(mesh), one)


SMALL = PaliGemmaConfig(
    ViTConfig(image_size=24, patch_size=12, width=32, depth=2, mlp_dim=64, num_heads=2),
    GemmaConfig(
        vocab_size=56, width=40, depth=3, mlp_dim=96, num_heads=2, head_dim=16, sliding_window=5, post_norms=True
    ),
)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("sampler", ["temperature", "top_k", "nucleus", "beam", "greedy"])
def test_samplers_choose_for_their_own_rows(sampler, mesh):
    """Logits, caches and hypotheses are not exchanged; weights come once a pass; answers are those of one device."""
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (16, 24, 24, 3)).astype(np.float32)
    tokens, real = rng.integers(3, 56, (16, 6)).astype(np.int32), np.arange(6)[None] < rng.integers(2, 7, (16, 1))
    real[::2] = real[::2, ::-1]
    options = {"top_k": {"top_k": 5}, "beam": {"num_beams": 3}, "greedy": {"draft_tokens": 2}}
    chosen = make_sampler(sampler, **options.get(sampler, {}))

    def answered(sizes):
        devices = sharding.make_mesh(sizes | {"tensor": 1})
        model = PaliGemma(SMALL, rngs=nnx.Rngs(0))
        places, _ = sharding.shardings(devices, SHARDING_RULES, param_tree.abstract(model))
        graph, arrays = param_tree.split(row_sharding.mark(model, places))
        model = param_tree.merge(graph, jax.device_put(arrays, places))
        inputs = jax.device_put((images, tokens, real), sharding.batch_sharding(devices, accumulate=False))

        def program(model, images, tokens, real):  # no EOS, rows from 0 on, 5 tokens
            return _generate(model, images, None, tokens, real, -1, chosen, jax.random.key(3), 0, 5, None, False)[0]

        compiled = jax.jit(row_sharding.with_mesh(devices, program)).lower(model, *inputs).compile()
        return partitioned.read(compiled), np.asarray(compiled(model, *inputs)), arrays

    (_, expected, arrays), (divided, answers, _) = answered(ONE), answered(MESHES[mesh])
    np.testing.assert_array_equal(answers, expected)
    assert len(np.unique(expected, axis=0)) > 8
    gathered = partitioned.arrays_of({path: x.shape for path, x in arrays.items()})
    assert {size for _, size in divided.exchanged} <= {(), *gathered}
    for size, number in gathered.items():
        assert divided.exchanged["all-gather", size] <= (1 + 5) * number  # in the prefill, and for each token
    assert divided.exchanged["all-gather", (40, 56)] <= 1


class Stack(nnx.Module):
    """A decoder with many weights, to be given few rows."""

    def __init__(self, remat: str):
        sizes = dict(vocab_size=16, width=64, depth=DEPTH, mlp_dim=512, num_heads=8, head_dim=8)
        config = GemmaConfig(**sizes, remat=remat, unroll=True, dtype="bfloat16")
        self.decoder = Gemma(config, rngs=nnx.Rngs(0))


DEPTH, PROJECTIONS = 24, r"decoder/layers/.*_proj"
ADAPTED = {
    "plain": lambda model: model,
    "nf4": lambda model: quantize(model, "nf4", targets="decoder/layers/mlp/.*"),
    "lora": lambda model: attach_lora(model, PROJECTIONS, 2, dropout=0.1, rngs=nnx.Rngs(0)),
    "dora": lambda model: attach_lora(model, PROJECTIONS, 2, dora=True, rngs=nnx.Rngs(0)),
    "dora with dropout": lambda model: attach_lora(model, PROJECTIONS, 2, dropout=0.1, dora=True, rngs=nnx.Rngs(0)),
    "diff pruning": lambda model: attach_diff(model, PROJECTIONS),
} | {
    f"dora on {kind}": lambda model, kind=kind: attach_lora(
        quantize(model, kind, targets=PROJECTIONS), PROJECTIONS, 2, dora=True, rngs=nnx.Rngs(0)
    )
    for kind in ("nf4", "int8", "int4")
}


def gradient_of(kind: str, remat: str):
    """A loss of a stack over 8 devices in parts: of what trains and of rows, given what does not; shapes of these."""
    mesh = sharding.make_mesh(MESHES["fsdp"] | {"tensor": 1})
    model = nnx.eval_shape(lambda: ADAPTED[kind](Stack(remat)))
    places, _ = sharding.shardings(mesh, SHARDING_RULES, param_tree.abstract(model))
    graph, arrays = param_tree.split(row_sharding.mark(model, places))
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[path]) for path, x in arrays.items()}
    trained = {path: x for path, x in shapes.items() if kind == "plain" or re.search("/(lora_|diff|log_alpha)", path)}
    frozen = {path: x for path, x in shapes.items() if path not in trained}

    def loss(trained, x, frozen):
        mask, positions = jnp.ones((8, 3, 3), bool), jnp.broadcast_to(jnp.arange(3)[None], (8, 3))
        keys = jax.random.split(jax.random.key(0), 8)
        decoder = param_tree.merge(graph, trained | frozen).decoder
        return jnp.square(decoder(x, positions, mask, dropout_keys=keys)[0]).sum()

    rows = jax.ShapeDtypeStruct((8, 3, 64), np.float32, sharding=sharding.batch_sharding(mesh, accumulate=False))
    return mesh, loss, (trained, rows, frozen)


@pytest.mark.parametrize("remat", ["none", "dots", "block"])
@pytest.mark.parametrize("kind", ADAPTED)
def test_no_stack_of_weights_is_held_whole(kind, remat):
    """Every kernel is gathered once forwards and once backwards, a layer at a time, also where layers are unrolled."""
    mesh, loss, shapes = gradient_of(kind, remat)
    compiled = jax.jit(row_sharding.with_mesh(mesh, jax.grad(loss, (0, 1)))).lower(*shapes).compile()
    exchanged = partitioned.read(compiled).exchanged
    arrays = {path: x.shape for path, x in (shapes[0] | shapes[2]).items()}
    for size, number in partitioned.arrays_of(arrays).items():
        assert exchanged["all-gather", size] <= 2 * number
    assert step_memory(compiled).temp < DEPTH * 3 * 64 * 512 * 4  # the MLPs of all layers in float32


@pytest.mark.parametrize("remat", ["none", "dots", "block"])
@pytest.mark.parametrize("kind", ADAPTED)
def test_nothing_made_of_weights_is_kept_for_the_backward_pass(kind, remat):
    """Neither gathered kernels nor W + z d, A B, or what codes stand for: of such a size, kernels alone are there."""
    mesh, loss, shapes = gradient_of(kind, remat)
    kept = partitioned.kept(mesh, loss, shapes)
    stored = [x for x in jax.tree.leaves(shapes) if x.shape[0] == DEPTH]
    for size in (64 * 64, 64 * 512):  # no activation has this size
        assert sum(x.size == DEPTH * size for x in kept) <= sum(x.size == DEPTH * size for x in stored)
    if remat == "none":  # of the MLP, gate, up and their product are kept, in the compute dtype
        hidden = [x.dtype for x in kept if x.shape == (DEPTH, 8, 3, 512) and x.dtype != bool]
        assert hidden.count(jnp.dtype(jnp.bfloat16)) >= 2
        assert len(hidden) <= 3 or "dora" in kind  # which scales outputs, in float32


class Alone(nnx.Module):
    """What of a dual encoder and of a PaliGemma is in no stack, or is taken out of one."""

    def __init__(self):
        sizes = dict(width=64, mlp_dim=256, num_heads=4)
        self.image_head = MAPHead(ViTConfig(**sizes), rngs=nnx.Rngs(0))
        tower, decoder = ViTConfig(**sizes), GemmaConfig(width=128, depth=1)
        self.projector = Projector(PaliGemmaConfig(tower, decoder), rngs=nnx.Rngs(0))
        self.text = TextEncoder(TextConfig(vocab_size=48, length=7, depth=1, unroll=True, **sizes), rngs=nnx.Rngs(0))


def test_modules_in_no_stack_gather_their_weights_again():
    mesh = sharding.make_mesh(MESHES["fsdp"] | {"tensor": 1})
    model = nnx.eval_shape(Alone)
    places, _ = sharding.shardings(mesh, SHARDING_RULES, param_tree.abstract(model))
    graph, arrays = param_tree.split(row_sharding.mark(model, places))
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[path]) for path, x in arrays.items()}

    def loss(arrays, x, tokens):
        model = param_tree.merge(graph, arrays)
        return model.image_head(x).sum() + jnp.square(model.projector(x)).sum() + model.text(tokens)[0].sum()

    rows = sharding.batch_sharding(mesh, accumulate=False)
    x = jax.ShapeDtypeStruct((8, 5, 64), np.float32, sharding=rows)
    tokens = jax.ShapeDtypeStruct((8, 7), np.int32, sharding=rows)
    kept = partitioned.kept(mesh, loss, (shapes, x, tokens))
    whole = [x for x in kept if x.size in (64 * 64, 64 * 256, 64 * 128)]
    assert len(whole) <= sum(x.size in (64 * 64, 64 * 256, 64 * 128) for x in shapes.values())
    step = jax.jit(row_sharding.with_mesh(mesh, jax.grad(loss, (0, 1))))
    exchanged = partitioned.read(step.lower(shapes, x, tokens).compile()).exchanged
    assert exchanged["all-gather", (64, 128)] == 1 + 1  # the projector's
    assert exchanged["all-gather", (64, 256)] <= 2 * 4  # of two MLPs
