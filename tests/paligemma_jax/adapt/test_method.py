"""The protocol of all methods: attached, trained, exported, loaded, merged and detached."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paligemma_jax.adapt.few_shot.methods import LearnedPrompts
from paligemma_jax.adapt.few_shot.prompt_config import PromptConfig
from paligemma_jax.adapt.peft.methods import KEEP_BASE, METHODS, attached_to
from paligemma_jax.models.dual_encoder import DualEncoder, DualEncoderConfig
from paligemma_jax.models.text_encoder import TextConfig
from paligemma_jax.models.vit import ViTConfig
from train_jax.core import param_tree, patterns
from train_jax.core.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")

OPTIONS = {
    "lora": dict(rank=2, dora=True, rank_pattern=((".*layers/0/.*", 1),)),
    "bottleneck": dict(size=3),
    "prefix": dict(size=3),
    "prompt": dict(size=3),
}
METHODS_WITH_OPTIONS = [kind(**OPTIONS.get(name, {})) for name, kind in METHODS.items()]
METHODS_WITH_OPTIONS.append(LearnedPrompts(PromptConfig(2, 2, depth=2, text_adapter=3)))
DUAL = DualEncoderConfig(ViTConfig(12, 4, 16, 2, 24, 2), TextConfig(64, 8, 12, 2, 20, 3), embed_dim=16)
NOT_MERGEABLE = {"bottleneck", "prefix", "prompt", "prompts"}


@pytest.fixture(scope="module")
def dual(make_random):
    return make_random(nnx.eval_shape(lambda: DualEncoder(DUAL, rngs=nnx.Rngs(0))))


@pytest.fixture
def base(method, request):
    return request.getfixturevalue("dual" if isinstance(method, LearnedPrompts) else "small_model")


@jax.jit
def outputs(model, batch):
    if isinstance(model, DualEncoder):
        return model(batch["images"], batch["tokens"])[:2]
    return model(**batch)[0]


def step(method, model, batch):
    """Returns the model after a step of gradient descent of what trains."""
    graph, arrays = param_tree.split(model)
    trained = {path: arrays[path] for path in patterns.select(method.trainable, arrays)}

    def loss(trained):
        model = param_tree.merge(graph, arrays | trained)
        return sum(jnp.abs(each - 1.0).mean() for each in jax.tree.leaves(outputs(model, batch)))

    gradients = jax.jit(jax.grad(loss))(trained)
    return param_tree.merge(graph, arrays | jax.tree.map(lambda x, gradient: x - 0.5 * gradient, trained, gradients))


def assert_close(ours, theirs, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), ours, theirs)


@pytest.mark.parametrize("method", METHODS_WITH_OPTIONS, ids=lambda method: method.name)
def test_a_method_keeps_the_protocol(method, base, small_batch):
    graph, arrays_before = nnx.graphdef(base), {path: np.array(each) for path, each in param_tree.flatten(base).items()}
    before = outputs(base, small_batch)
    model = step(method, method.attach(nnx.clone(base), nnx.Rngs(1)), small_batch)
    tuned = outputs(model, small_batch)
    assert max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (tuned, before)), strict=True)) > 1e-3
    assert_close(param_tree.flatten(base), arrays_before, 0)  # nothing of it was changed in place

    arrays = {name: np.asarray(array) for name, array in method.export(model).items()}
    assert_close(outputs(method.load(nnx.clone(base), arrays), small_batch), tuned, 1e-6)

    if method.name in NOT_MERGEABLE:
        with pytest.raises(
            UserError, match=r"^the model has .*, which no plain model can hold, as .*: keep the run, or"
        ):
            method.merge(nnx.clone(model))
    else:
        merged = method.merge(nnx.clone(model))
        assert nnx.graphdef(merged) == graph
        assert_close(outputs(merged, small_batch), tuned, 2e-5)

    if method.keeps_base:
        detached = method.detach(model)
        assert nnx.graphdef(detached) == graph
        assert_close(param_tree.flatten(detached), arrays_before, 0)
    else:
        with pytest.raises(
            UserError, match=f"^{method.name} trains parameters of the base, so nothing can be detached"
        ):
            method.detach(model)


@pytest.mark.parametrize("method", METHODS_WITH_OPTIONS[:-1], ids=lambda method: method.name)
def test_an_attached_method_is_recognised(method, small_model):
    assert attached_to(small_model) == []
    attached = attached_to(method.attach(nnx.clone(small_model), nnx.Rngs(1)))
    assert attached == ([] if method.name == "bitfit" else [type(method)])


def test_methods_that_keep_the_base():
    assert set(METHODS) - set(KEEP_BASE) == {"bitfit", "last_layers"}


def test_arrays_of_another_model_are_refused(small_model):
    lora = METHODS["lora"](rank=2)
    arrays = lora.export(lora.attach(nnx.clone(small_model), nnx.Rngs(0)))
    with pytest.raises(UserError, match=r"\(2, 32, 2\) for .*q_proj/lora_a where the model has \(2, 32, 3\)"):
        METHODS["lora"](rank=3).load(nnx.clone(small_model), arrays)
