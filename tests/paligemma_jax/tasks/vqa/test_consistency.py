"""config.consistency: its terms against plain ones, the frozen branch, meshes and micro-batches, memory, mistakes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paligemma_jax.adapt.lora.adapter import attach_lora
from paligemma_jax.adapt.peft.methods import KEEP_BASE, base_of
from paligemma_jax.data import prompts
from paligemma_jax.losses import token_cross_entropy
from paligemma_jax.models.paligemma import PaliGemma
from tests.paligemma_jax.mini import MINI, mistake, task_of
from tests.paligemma_jax.training import SMOOTH, Training, long_answers, planned_memory
from train_jax.core import param_tree
from train_jax.step import randomness

pytestmark = pytest.mark.usefixtures("fast_compilation")
PLAIN = {"cache_features": False, "model.unroll": False, "data.suffix_length": 8, "adapter.dropout": 0.0}
TEXTS = (("caption en", "3 objects: a small red cube"), ("answer en How many things?", ""), ("caption en", ""))
BOTH = {"adapter.targets": ".*", "consistency.weight": 0.5, "consistency.on": "both", "consistency.temperature": 2.0}


@pytest.fixture(scope="module")
def options(mini_options):
    return mini_options | SMOOTH | PLAIN


def micro_batch(training: Training) -> dict[str, jax.Array]:
    """The first of a step."""
    return {name: jnp.asarray(rows[0]) for name, rows in training.batch(0).items() if name != "bad"}


# The terms.


def plain_divergence(model, base, batch, temperature):
    """Of every row's supervised tokens, with logits of the whole batch."""
    arrays = prompts.training_arrays(batch)
    images = model.config.preprocessing.normalize(batch["image"])
    inputs = images, arrays["tokens"], arrays["mask_ar"], arrays["mask_input"]
    p, q = (jax.nn.log_softmax(each(*inputs)[0] / temperature) for each in (base, model))
    weights = arrays["weights"] * batch["weight"][:, None]
    return temperature**2 * (weights * (jnp.exp(p) * (p - q)).sum(-1)).sum(), weights.sum()


@pytest.fixture(scope="module")
def moved(options):
    """A training whose adapters are away from zero, after one step with consistency."""
    training = Training(options | BOTH, long_answers())
    return training, training.run(1)[0], training.run(1)[0]


def test_new_adapters_have_zero_distance(moved):
    _, first, second = moved
    for part in ("answers", "images"):
        assert abs(first[f"consistency_{part}"]) < 1e-6 < second[f"consistency_{part}"]


def test_terms_equal_plain_ones(moved):
    training = moved[0]
    model, batch = training.placed.model(training.state.params), micro_batch(training)
    keys = randomness.row_keys(0, jnp.int32(0), len(batch["weight"]))
    loss, metrics = jax.jit(training.task.loss)(model, batch, keys)
    base = base_of(model, "lora")
    answers, normalizer = jax.jit(plain_divergence, static_argnums=3)(model, base, batch, 2.0)
    images = model.config.preprocessing.normalize(batch["image"])
    tuned, frozen = (each.encode_image(images)[0] for each in (model, base))
    cosines = (tuned * frozen).sum(-1) / (jnp.linalg.norm(tuned, axis=-1) * jnp.linalg.norm(frozen, axis=-1))
    rows = prompts.training_arrays(batch)["weights"].sum(1) * batch["weight"]
    np.testing.assert_allclose(metrics["consistency_answers"], (answers, normalizer), rtol=1e-4)
    distance = (rows * (1 - cosines).mean(1)).sum()
    np.testing.assert_allclose(metrics["consistency_images"], (distance, normalizer), rtol=1e-3)
    task = task_of(training.options | {"consistency.weight": 0.0})
    alone = jax.jit(task.loss)(model, batch, keys)[0]
    np.testing.assert_allclose(loss - alone, 0.5 * (answers + distance), rtol=1e-3)


def test_weight_zero_gives_the_program_without_consistency(options):
    """Whatever else is set: compared with the loss written out."""
    task = task_of(options | BOTH | {"consistency.weight": 0.0})
    training = Training(options | {"adapter.targets": ".*"}, long_answers())
    model, batch = training.placed.model(training.state.params), micro_batch(training)
    graph, arrays = param_tree.split(model)

    def loss(arrays, batch, keys):
        return task.loss(param_tree.merge(graph, arrays), batch, keys)[0]

    def without(arrays, batch, keys):
        model, inputs = param_tree.merge(graph, arrays), prompts.training_arrays(batch)
        features = model.encode_image(model.config.preprocessing.normalize(batch["image"]), keys)[0]
        hidden, _ = model.hidden(features, inputs["tokens"], inputs["mask_ar"], inputs["mask_input"], keys)
        weights = inputs["weights"] * batch["weight"][:, None]
        return token_cross_entropy(hidden, model.decoder.embed_tokens.embedding[...], inputs["targets"], weights)

    keys = randomness.row_keys(0, jnp.int32(0), len(batch["weight"]))
    compiled = [jax.jit(jax.grad(f)).lower(arrays, batch, keys).compile() for f in (loss, without)]
    assert len({each.cost_analysis()["flops"] for each in compiled}) == 1
    assert len({each.memory_analysis().temp_size_in_bytes for each in compiled}) == 1
    for path, gradient in compiled[0](arrays, batch, keys).items():
        np.testing.assert_array_equal(gradient, compiled[1](arrays, batch, keys)[path], err_msg=path)


# The frozen branch.


@pytest.mark.parametrize("name", KEEP_BASE)
def test_the_frozen_branch_is_the_base_to_the_bit(options, name):
    """Before and after a step of every method that leaves the base as it is; no array is copied."""
    changes = {"adapter.name": name, "consistency.weight": 1.0}
    training = Training(options | changes, long_answers())
    base = {path: np.array(leaf) for path, leaf in param_tree.flatten(task_of(options | changes).base()).items()}
    start = training.trained()
    training.run(1)
    assert any((array != start[path]).any() for path, array in training.trained().items())
    model = training.placed.model(training.state.params)
    frozen = param_tree.flatten(base_of(model, name))
    assert frozen.keys() == base.keys()
    for path, array in frozen.items():
        np.testing.assert_array_equal(array, base[path], err_msg=path)
    held = {id(leaf) for leaf in training.placed.frozen.values()}
    assert all(id(leaf) in held for leaf in frozen.values())


def test_no_gradient_goes_through_the_frozen_branch(moved):
    """Were it not stopped, the base's own weights would have another gradient: theirs is of the tuned branch alone."""
    training = moved[0]
    model, batch = training.placed.model(training.state.params), micro_batch(training)
    graph, arrays = param_tree.split(model)
    keys = randomness.row_keys(0, jnp.int32(0), len(batch["weight"]))
    base = base_of(model, "lora")
    chosen = {path: arrays[path] for path in ("projector/linear/kernel", "decoder/layers/self_attn/v_proj/kernel")}

    def ours(chosen):
        return training.task.loss(param_tree.merge(graph, arrays | chosen), batch, keys)[1]["consistency_answers"][0]

    def plain(chosen):
        return plain_divergence(param_tree.merge(graph, arrays | chosen), base, batch, 2.0)[0]

    got, want = (jax.jit(jax.grad(f))(chosen) for f in (ours, plain))
    for path in chosen:
        scale = float(jnp.abs(want[path]).max())
        np.testing.assert_allclose(got[path], want[path], rtol=1e-2, atol=1e-3 * scale, err_msg=path)


# Meshes, micro-batches, half precision, prompts.


@pytest.fixture(scope="module")
def with_prompts(options):
    """Options of a run on prompts, with dropout; and its two steps on one device."""
    given = options | BOTH | {"adapter.dropout": 0.1, "consistency.prompts": TEXTS}
    given |= {"adapter.targets": "projector/linear|decoder/.*/q_proj"}
    training = Training(given, long_answers())
    means = training.run(2)
    return given, means, training.trained()


def test_two_steps_are_the_same_in_micro_batches_on_a_mesh(with_prompts):
    given, expected, trained = with_prompts
    parts = {"micro_batch": 4, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    training = Training(given | parts, long_answers())
    for result, reference in zip(training.run(2), expected, strict=True):
        for name in ("loss", "consistency_answers", "consistency_images"):
            np.testing.assert_allclose(result[name], reference[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert expected[1]["consistency_answers"] > 1e-5
    for path, array in training.trained().items():
        np.testing.assert_allclose(array, trained[path], rtol=1e-3, atol=2e-5, err_msg=path)


def test_steps_in_float16_are_clean_and_near_float32(with_prompts):
    given, expected, _ = with_prompts
    training = Training(given | {"compute_dtype": "float16"}, long_answers())
    losses = [means["loss"] for means in training.run(2)]
    guard = jax.device_get(training.state.guard)
    assert guard.total == 0  # a first loss scale that is too large is no fault
    np.testing.assert_allclose(losses, [means["loss"] for means in expected], rtol=0.01)


def test_prompts_are_drawn_by_the_key_of_the_row_alone(options):
    from paligemma_jax.tasks.vqa.consistency import _draw, _tokenize

    task = task_of(options)
    texts = _tokenize(task.tokenizer, TEXTS)
    lengths = [len(task.tokenizer.encode(suffix)) for _, suffix in TEXTS]
    assert texts["weights"].sum(1).tolist() == [count + 1 for count in lengths]  # one more than the tokens
    keys = randomness.row_keys(0, jnp.int32(3), 64)
    whole, part = _draw(texts, keys), _draw(texts, keys[10:20])
    for name, rows in whole.items():
        np.testing.assert_array_equal(rows[10:20], part[name])
    assert {tuple(row) for row in whole["tokens"].tolist()} == {tuple(row) for row in texts["tokens"].tolist()}


# Memory.


@functools.cache
def abstract_model(vocab: int, **sizes: int):
    """Structure and shapes of a model with adapters, every block rematerialised."""
    config, graphs = MINI.replace(decoder={"vocab_size": vocab} | sizes, both={"remat": "block"}), []

    def make():
        graph, arrays = param_tree.split(attach_lora(PaliGemma(config, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)))
        graphs.append(graph)
        return arrays

    arrays = jax.eval_shape(make)
    return graphs[0], arrays


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vocab", "sizes"),
    [(257_152, {}), (1792, {"width": 256, "depth": 8, "mlp_dim": 1024})],
    ids=["vocabulary", "layers"],
)
def test_memory_of_a_step_grows_by_less_than_half(mini_options, vocab, sizes):
    """Where logits, and where the layers' activations are most of it; the weights are there once."""
    given = mini_options | PLAIN | {"data.prefix_length": 64, "data.suffix_length": 32, "loss.chunk_size": 64}
    plain, consistent = (
        planned_memory(task_of(given | changes), *abstract_model(vocab, **sizes), micro=2, rows=4)
        for changes in ({}, {"consistency.weight": 1.0})
    )
    assert consistent.temp < 1.5 * plain.temp, (plain, consistent)
    assert consistent.argument == plain.argument + 8  # the sum and the count of its metric


# Mistakes.


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"consistency.weight": -1.0}, "config.consistency.weight=-1.0, expected 0 or more: change it"),
        ({"consistency.temperature": 0.0}, "config.consistency.temperature=0.0, expected a number above 0: change it"),
        ({"consistency.on": "text"}, "config.consistency.on='text', expected one of answers, images, both: change it"),
        ({"consistency.kind": "l2"}, "config.consistency.kind='l2', expected one of cosine, l1, mse: change it"),
        ({"consistency.prompts": ("caption en",)}, "consistency.prompts holds 'caption en', expected pairs of a prefix "
         "and a continuation, such as (('caption en', 'a small'),): correct it."),
        ({"consistency.weight": 1.0, "adapter.name": "bitfit"}, "consistency.weight is 1.0 beside "
         "adapter.name='bitfit', which trains parameters of the base, so that no frozen model is left, expected one of "
         "lora, bottleneck, prefix, prompt, diff_pruning: change one of the two."),
        ({"consistency.weight": 1.0, "consistency.on": "both"}, "consistency.on is 'both' but nothing of the tower or "
         "the projector trains, so the image features do not change: set consistency.on=answers, or let "
         "adapter.targets reach one of them."),
    ],
)  # fmt: skip
def test_mistakes(mini_options, tmp_path, capsys, changes, sentence):
    assert mistake(capsys, mini_options | changes, tmp_path / "run") == sentence
