"""Every method but LoRA: what trains, that nothing else does, generation with a cache, and the way to disk and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paligemma_jax import generate
from paligemma_jax.adapt.method import Method
from paligemma_jax.adapt.peft import diff_pruning
from paligemma_jax.adapt.peft.methods import METHODS
from paligemma_jax.generation.candidate_scoring import score_candidates
from paligemma_jax.models.paligemma import PaliGemma, variant
from paligemma_jax.weights.adapters.method_folder import load_adapter, save_adapter
from tests.paligemma_jax.mini import MINI
from train_jax.core import param_tree, patterns
from train_jax.core.errors import UserError

EXACT = ("bottleneck", "bitfit", "diff_pruning", "last_layers")  # change nothing at first
NAMES = [name for name in METHODS if name != "lora"]
SIZES = {"bottleneck": 3, "prefix": 5, "prompt": 4, "last_layers": 1}
L, D, K, H = MINI.decoder.depth, MINI.decoder.width, MINI.decoder.num_kv_heads, MINI.decoder.head_dim
NUMBERS = {
    "bottleneck": 2 * L * (2 * 3 * D + 3 + D),
    "prefix": 2 * L * 5 * K * H,
    "prompt": 4 * D,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fast(fast_compilation):
    """Much compiling, little computing."""


def base() -> PaliGemma:
    return PaliGemma(MINI, rngs=nnx.Rngs(0))


def method_of(name: str) -> Method:
    return METHODS[name](**({"size": SIZES[name]} if name in SIZES else {}))


def attach(name: str, model: PaliGemma) -> PaliGemma:
    return method_of(name).attach(model, nnx.Rngs(1))


def trained_paths(name: str, model: PaliGemma) -> list[str]:
    return patterns.select(method_of(name).trainable, param_tree.abstract(model), what="adapters")


def stirred(name: str) -> PaliGemma:
    """The method attached, what trains moved away from its start."""
    model = attach(name, base())
    rng, arrays = np.random.default_rng(2), param_tree.flatten(model)
    moved = {path: arrays[path] + 0.3 * rng.standard_normal(arrays[path].shape) for path in trained_paths(name, model)}
    return param_tree.assign(model, {path: jnp.asarray(leaf, jnp.float32) for path, leaf in moved.items()})


def inputs(rows: int = 2) -> dict[str, jax.Array]:
    rng = np.random.default_rng(3)
    tokens = rng.integers(3, 1700, (rows, 6))
    return {
        "images": jnp.asarray(rng.uniform(-1, 1, (rows, 24, 24, 3)), jnp.float32),
        "tokens": jnp.asarray(tokens),
        "mask_ar": jnp.asarray([[0, 0, 0, 0, 1, 1]] * rows),
    }


def logits(model: PaliGemma, **more) -> jax.Array:
    return jax.jit(lambda model, given: model(**given, **more)[0])(model, inputs())


@pytest.mark.parametrize("name", NAMES)
def test_only_its_parameters_have_gradients_and_they_are_as_many_as_it_says(name):
    model = attach(name, base())
    graph, arrays = param_tree.split(model)
    paths = trained_paths(name, model)
    if name in NUMBERS:
        assert sum(arrays[path].size for path in paths) == NUMBERS[name]
    assert all(arrays[path].dtype == jnp.float32 for path in paths)

    def loss(trained):
        out = param_tree.merge(graph, arrays | trained)(**inputs())[0]
        penalty = diff_pruning.expected_share(param_tree.merge(graph, arrays | trained)) if "diff" in name else 0.0
        return jnp.square(out).sum() + penalty

    gradients = jax.jit(jax.grad(loss))({path: arrays[path] for path in paths})
    alive = [path for path, gradient in gradients.items() if bool(jnp.any(gradient != 0))]
    # What is multiplied by a zero of the start waits for that to move: a bottleneck's first layer, a prefix's keys.
    waiting = ("down_kernel", "down_bias", "prefix_k")
    assert {path for path in paths if not path.endswith(waiting)} <= set(alive)


@pytest.mark.parametrize("name", EXACT)
def test_attaching_does_not_change_the_output(name):
    np.testing.assert_allclose(logits(attach(name, base())), logits(base()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_save_and_load(name, tmp_path):
    model = stirred(name)
    save_adapter(model, tmp_path, method_of(name))
    again = load_adapter(base(), tmp_path)
    np.testing.assert_allclose(logits(again), logits(model), rtol=0, atol=1e-6)
    held = sum(file.stat().st_size for file in tmp_path.iterdir())
    trained = 4 * sum(param_tree.abstract(model)[path].size for path in trained_paths(name, model))
    assert held < trained + 4000  # and nothing of the base


@pytest.mark.parametrize("name", NAMES)
def test_generation_with_a_cache_equals_reading_everything_again(name):
    model, given = stirred(name), inputs()
    prompt = given["tokens"][:, :4]
    tokens = generate(model, given["images"], prompt, max_new_tokens=4, eos_id=-1)
    read = jax.jit(lambda model, given: model(**given)[0])
    for step in range(4):
        text = jnp.concatenate([prompt, tokens[:, :step]], axis=1)
        causal = jnp.asarray([[0] * 4 + [1] * step] * 2)
        likeliest = read(model, given | {"tokens": text, "mask_ar": causal})[:, -1].argmax(-1)
        np.testing.assert_array_equal(likeliest, tokens[:, step])


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_candidates_are_scored_as_they_are_read_one_by_one(name):
    model, given = stirred(name), inputs()
    features = model.encode_image(given["images"])[0]
    candidates = jnp.asarray([[7, 8], [9, 10]])
    scores = score_candidates(model, features, given["tokens"][:, :4], None, candidates, jnp.ones((2, 2), bool))
    for index, candidate in enumerate(candidates):
        text = jnp.concatenate([given["tokens"][:, :4], jnp.tile(candidate, (2, 1))], axis=1)
        log_probs = jax.nn.log_softmax(model(given["images"], text, jnp.asarray([[0] * 4 + [1, 1]] * 2))[0])
        expected = log_probs[:, 3, candidate[0]] + log_probs[:, 4, candidate[1]]
        np.testing.assert_allclose(scores[:, index], expected, rtol=1e-4, atol=1e-4)


def test_last_layers_leave_the_first_ones_as_they_are():
    model, plain = attach("last_layers", base()), param_tree.flatten(base())
    for path, leaf in param_tree.flatten(model).items():
        if path.startswith("decoder/layers/"):
            np.testing.assert_array_equal(leaf, plain[path][: L - 1])
        if path.startswith("decoder/last_layers/"):
            np.testing.assert_array_equal(leaf, plain[path.replace("last_layers", "layers")][L - 1 :])


def test_gates_are_random_in_training_only():
    model, keys = stirred("diff_pruning"), jax.random.split(jax.random.key(0), 2)
    same = logits(model)
    np.testing.assert_array_equal(same, logits(model))
    drawn = [np.asarray(model(**inputs(), dropout_keys=keys)[0]) for keys in (keys, keys, keys[::-1])]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - drawn[2]).max() > 1e-3 and np.abs(drawn[0] - same).max() > 1e-3


def test_hard_concrete_gates_open_as_often_as_the_penalty_says():
    module = diff_pruning.DiffKernel(jnp.zeros((200, 300)), "k", 1)
    for log_alpha in (-3.0, 0.0, 2.0):
        module.log_alpha[...], module.difference[...] = jnp.full((200, 300), log_alpha), jnp.ones((200, 300))
        u = jax.random.uniform(jax.random.key(1), (200, 300), minval=1e-6, maxval=1 - 1e-6)
        opened = float((module._gated(u) > 0).mean())
        assert opened == pytest.approx(float(module.expected_nonzero()) / 60_000, abs=0.01)


def test_entries_of_closed_gates_are_not_saved(tmp_path):
    model = stirred("diff_pruning")
    module = next(iter(diff_pruning.diff_projections(model).values()))
    module.kernel.log_alpha[...] = jnp.full(module.kernel.shape, -9.0).at[0, 0].set(9.0)
    saved = diff_pruning.sparse_delta(model)
    path = next(iter(diff_pruning.diff_projections(model)))
    row = int(np.prod(module.kernel.shape[2:]))
    np.testing.assert_array_equal(saved[f"{path}/kernel/positions"], np.arange(row))


def test_user_errors(tmp_path):
    for name, size, expected in (
        ("bottleneck", 0, "the bottleneck's width is 0"),
        ("prefix", 0, "the prefix's length is 0"),
        ("prompt", -1, "the soft prompt's length is -1"),
        ("last_layers", L, f"the last {L} layers are to train, expected 1 to {L - 1}"),
    ):
        with pytest.raises(UserError, match=expected):
            METHODS[name](size=size).attach(base(), nnx.Rngs(0))
    for name in ("bottleneck", "prefix", "prompt", "last_layers", "diff_pruning"):
        with pytest.raises(UserError):
            attach(name, attach(name, base()))
    with pytest.raises(UserError, match=r"adapter.json names no method of lora, bottleneck, prefix"):
        load_adapter(base(), tmp_path)
    save_adapter(stirred("prefix"), tmp_path, method_of("prefix"))
    other = PaliGemma(MINI.replace(decoder={"head_dim": 16}), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="it is an adapter of another model; load it on its own base"):
        load_adapter(other, tmp_path)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("lora", 18 * 2 * 8 * (2048 + 2048)),
        ("bottleneck", 2 * 18 * (2 * 16 * 2048 + 16 + 2048)),
        ("prefix", 2 * 18 * 16 * 1 * 256),
        ("prompt", 16 * 2048),
        ("last_layers", 110_104_576),
        ("bitfit", 37 * 2048 + 2048 + 1152 * (1 + 27 * (4 + 2 * 2 + 1) + 2) + 27 * 4304),
    ],
)
def test_numbers_of_parameters_at_3b(name, number):
    method = METHODS[name]()
    make = lambda: method.attach(PaliGemma(variant("3b-224"), rngs=nnx.Rngs(0)), nnx.Rngs(1))  # noqa: E731
    shapes = param_tree.abstract(nnx.eval_shape(make))
    chosen = patterns.select(method.trainable, shapes, what="adapters")
    assert sum(shapes[path].size for path in chosen) == number
