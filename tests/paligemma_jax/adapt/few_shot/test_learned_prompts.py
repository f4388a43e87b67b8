"""Prompts of both kinds of dual encoder against plain loops over their layers; what is refused; what trains."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import paligemma_jax as pg
from paligemma_jax.adapt.few_shot.learned_prompts import TRAINABLE, attach_prompts, check_texts, detach_prompts
from paligemma_jax.adapt.few_shot.prompt_config import PromptConfig
from paligemma_jax.adapt.few_shot.prompted_towers import insert_placeholders
from paligemma_jax.models.dual_encoder import DualEncoder, DualEncoderConfig, unit
from paligemma_jax.models.text_encoder import TextConfig
from paligemma_jax.models.variants import variant
from paligemma_jax.models.vit import ViTConfig
from train_jax.core import param_tree, patterns
from train_jax.core.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")

# Towers that differ in depth, width and heads.
CLIP = DualEncoderConfig(
    ViTConfig(12, 4, 16, 3, 24, 2, class_token=True, activation="quick_gelu"),
    TextConfig(31, 9, 12, 2, 20, 3, causal=True, pool="eos", eos_token=30, activation="quick_gelu"),
    embed_dim=10,
    pool="class",
    image_projection=True,
    projection_bias=False,
    initial_bias=None,
)
SIGLIP = DualEncoderConfig(ViTConfig(12, 4, 16, 3, 24, 2), TextConfig(31, 9, 12, 2, 20, 3), embed_dim=16)
BASES = {"clip": CLIP, "map": SIGLIP, "gap": SIGLIP.replace(pool="gap")}
FREE = PromptConfig(3, 2, depth=2, vision_depth=2, coupled=False, text_adapter=5, image_adapter=4, text_mix=0.3)
COUPLED = PromptConfig(2, 2, depth=2, text_adapter=5, image_adapter=4)
SHALLOW = PromptConfig(2, 2, depth=1)
TOKENS = jnp.asarray([[1, 5, 6, 7, 8, 9, 30, 0, 0], [1, 5, 6, 7, 11, 12, 13, 14, 30]])
IMAGES = jnp.asarray(np.random.default_rng(1).standard_normal((2, 12, 12, 3)), jnp.float32)


@pytest.fixture(scope="module")
def bases(make_random):
    """Random weights; attach to `nnx.clone`s."""
    return {name: make_random(abstract(config)) for name, config in BASES.items()}


def abstract(config, prompts=None):
    def make():
        model = DualEncoder(config, rngs=nnx.Rngs(0))
        return model if prompts is None else attach_prompts(model, prompts, rngs=nnx.Rngs(1))

    return nnx.eval_shape(make)


def with_prompts(base, config):
    """Prompts and adapters of large random values, so that they matter."""
    model = attach_prompts(nnx.clone(base), config, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(2)
    drawn = {path: 0.5 * rng.standard_normal(leaf.shape) for path, leaf in prompts_of(model).items()}
    return param_tree.assign(model, {path: jnp.asarray(leaf, jnp.float32) for path, leaf in drawn.items()})


def prompts_of(model):
    arrays = param_tree.flatten(model)
    return {path: arrays[path] for path in patterns.select(TRAINABLE, arrays)}


@jax.jit
def run(model):
    return model(IMAGES, TOKENS)


@jax.jit
def run_frozen(model):
    return model(IMAGES, TOKENS, prompts=False)


@jax.jit
def run_block(stack, k, x, mask):
    graph, state = nnx.split(stack)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[k], state))(x, mask=mask)


def through(stack, x, prompts, place, mask=None):
    """The blocks one after another; before the k-th, `place` is given its prompts, if it has any."""
    for k in range(len(stack.layer_norm1.scale)):
        if 0 < k < len(prompts):
            x = x.at[:, place].set(jnp.broadcast_to(prompts[k][None], x[:, place].shape))
        x = run_block(stack, k, x, mask)
    return x


def adapt(z, adapter, mix):
    if adapter is None:
        return z
    relu, down, up = jax.nn.relu, adapter.down_kernel[...], adapter.up_kernel[...]
    return mix * relu(relu(z @ down) @ up) + (1 - mix) * z


def vision_prompts_by_hand(learned):
    if learned.vision is not None:
        return learned.vision[...]
    maps = zip(learned.coupling.kernel[...], learned.coupling.bias[...], strict=True)
    return jnp.stack(
        [text @ kernel + bias[None] for text, (kernel, bias) in zip(learned.text[...], maps, strict=False)]
    )


def image_by_hand(model, x):
    """From the patches with their positions."""
    tower, learned = model.vision, model.prompts
    prompts = vision_prompts_by_hand(learned)
    number = x.shape[1]
    x = jnp.concatenate([x, jnp.broadcast_to(prompts[:1], (2, *prompts.shape[1:]))], axis=1)
    if model.config.pool == "class":
        x = tower.pre_layernorm(x)
    x = tower.post_layernorm(through(tower.layers, x, prompts, slice(number, None)))[:, :number]
    z = {"map": lambda: model.image_head(x), "gap": lambda: x.mean(1), "class": lambda: x[:, 0]}[model.config.pool]()
    z = model.image_projection(z) if model.config.image_projection else z
    return unit(adapt(z, learned.image_adapter, learned.config.image_mix))


def text_by_hand(model):
    tower, learned = model.text, model.prompts
    prompts, M = learned.text[...], learned.config.text_tokens
    first = jnp.broadcast_to(prompts[:1], (2, *prompts.shape[1:]))
    words, causal = tower.token_embedding(TOKENS), model.config.text.causal
    if causal:
        x = jnp.concatenate([words[:, :1], first, words[:, 1 + M :]], axis=1)
    else:
        x = jnp.concatenate([first, words[:, : 9 - M - 1], words[:, -1:]], axis=1)
    place = slice(1, 1 + M) if causal else slice(0, M)
    mask = jnp.tri(9, dtype=bool)[None].repeat(2, 0) if causal else None
    x = through(tower.layers, x + tower.position_embedding[...][None], prompts, place, mask)
    x = tower.final_layer_norm(x)
    pooled = x[jnp.arange(2), jnp.asarray([6, 8])] if causal else x[:, -1]
    return unit(adapt(model.text_projection(pooled), learned.text_adapter, learned.config.text_mix))


@jax.jit
def by_hand(model, x):
    return image_by_hand(model, x), text_by_hand(model)


@pytest.mark.parametrize(
    ("name", "config"),
    [("clip", FREE), ("map", COUPLED), ("gap", SHALLOW)],
    ids=["clip-free", "map-coupled", "gap-shallow"],
)
def test_embeddings_are_those_of_a_loop_over_layers(bases, name, config):
    model = with_prompts(bases[name], config)
    images, texts, out = run(model)
    expected = by_hand(model, out["vision/embedded"])
    np.testing.assert_allclose(images, expected[0], rtol=0, atol=3e-6)
    np.testing.assert_allclose(texts, expected[1], rtol=0, atol=3e-6)
    assert out["vision/encoded"].shape == run_frozen(model)[2]["vision/encoded"].shape  # without the prompts'
    for tuned, frozen in zip((images, texts), run_frozen(model)[:2], strict=True):
        assert float(jnp.abs(tuned - frozen).max()) > 1e-3


@pytest.mark.parametrize("name", BASES)
def test_without_prompts_the_model_equals_the_base_exactly(bases, name):
    base = bases[name]
    model = with_prompts(base, COUPLED)
    before, after = param_tree.flatten(base), param_tree.flatten(model)
    assert set(before) == {path for path in after if not path.startswith("prompts/")}
    for path, array in before.items():
        np.testing.assert_array_equal(array, after[path], err_msg=path)
    expected = run(base)[:2]
    for other in (run_frozen(model), run(detach_prompts(model))):
        for ours, theirs in zip(other[:2], expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert set(param_tree.flatten(model)) == set(before)


def test_prompts_cost_nothing_where_they_are_not_used(bases):
    """The program of the frozen branch, and of a model without prompts, is the one of the base; shallow ones are not
    looked for in every layer."""

    def program(model, **options):
        return jax.jit(lambda model: model(IMAGES, TOKENS, **options)[:2]).lower(model).as_text()

    base = bases["clip"]
    assert program(with_prompts(base, COUPLED), prompts=False) == program(base, prompts=False) == program(base)
    shallow, deep = (program(with_prompts(base, config)) for config in (SHALLOW, COUPLED))
    selects, loops = (
        [each.count(f"stablehlo.{operation}") for each in (program(base), shallow, deep)]
        for operation in ("select", "while")
    )
    assert selects[0] == selects[1] < selects[2]
    assert loops[0] == loops[1] == loops[2] == 2  # one over the layers of each tower


def loss_and_gradients(model, **options):
    """Of the trained arrays, with the config's options changed."""
    changed = abstract(model.config.replace(both=options), model.prompts.config)
    graph, arrays = nnx.graphdef(changed), param_tree.flatten(model)
    chosen = prompts_of(model)

    def loss(chosen):
        images, texts, _ = param_tree.merge(graph, arrays | chosen)(IMAGES, TOKENS)
        return jnp.square(images @ texts.T - 1.0).sum()

    return jax.jit(jax.value_and_grad(loss))(chosen)


def test_unrolled_and_rematerialised_it_is_the_same(bases):
    model = with_prompts(bases["clip"], FREE)
    value, gradients = loss_and_gradients(model)
    for path in ("prompts/text", "prompts/vision"):  # every layer's own prompts matter
        assert (np.abs(gradients[path]).max(axis=(1, 2)) > 1e-5).all()
    assert all(float(jnp.abs(gradient).max()) > 0 for gradient in gradients.values())
    again, others = loss_and_gradients(model, unroll=True, remat="block")
    np.testing.assert_allclose(again, value, rtol=1e-6)
    for path, gradient in gradients.items():
        np.testing.assert_allclose(others[path], gradient, rtol=1e-4, atol=1e-6, err_msg=path)


def test_the_last_block_alone_has_its_prompts(bases):
    """A SigLIP's unrolled text tower computes one position of its last block, which has prompts of its own here."""
    model = with_prompts(bases["map"], COUPLED)
    assert not model.config.text.last_block_pools
    arrays, unrolled = param_tree.flatten(model), abstract(model.config.replace(text={"unroll": True}), COUPLED)
    assert unrolled.config.text.last_block_pools and COUPLED.depth == model.config.text.depth
    encode = jax.jit(lambda model: model.encode_text(TOKENS)[0])
    again = encode(param_tree.merge(nnx.graphdef(unrolled), arrays))
    np.testing.assert_allclose(again, encode(model), rtol=0, atol=1e-6)


def test_a_base_has_no_parts_to_ask_for(bases):
    with pytest.raises(TypeError, match="the model has no part 'prompts', but prompts=True: leave it out, or attach"):
        bases["gap"](IMAGES, TOKENS, prompts=True)
    with pytest.raises(TypeError, match="promts"):  # a name that is not its part's
        with_prompts(bases["gap"], SHALLOW)(IMAGES, TOKENS, promts=False)


def test_placeholders_for_prompts():
    tokens = jnp.asarray([[1, 5, 6, 7, 8, 2, 2], [1, 5, 6, 7, 8, 9, 2]])
    mask = jnp.asarray([[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]])
    moved, seen = insert_placeholders(tokens, mask, 2, 0)
    np.testing.assert_array_equal(moved[:, 2:], [[1, 5, 6, 7, 2], [1, 5, 6, 7, 2]])  # the last stays last
    np.testing.assert_array_equal(seen, [[1, 1, 1, 1, 1, 1, 0], [1] * 7])
    kept, seen = insert_placeholders(tokens, None, 2, 1)
    np.testing.assert_array_equal(kept, tokens)
    assert seen is None
    with pytest.raises(ValueError, match="texts have 7 tokens, expected more than the 7"):
        insert_placeholders(tokens, None, 6, 1)


def test_a_mask_does_not_hide_prompts(bases):
    """SigLIP with its padding masked: prompts are real, wherever the padding was."""
    model = with_prompts(bases["map"], COUPLED)
    encode = jax.jit(lambda model, tokens, mask: model.encode_text(tokens, mask)[0])
    full, other = TOKENS, TOKENS.at[:, 7].set(3)
    mask = jnp.asarray([[1] * 5 + [0] * 3 + [1]] * 2)
    np.testing.assert_array_equal(encode(model, full, mask), encode(model, other, mask))
    assert float(jnp.abs(encode(model, full, mask) - encode(model, full, None)).max()) > 1e-3


def test_initial_values_of_prompts(bases):
    model = attach_prompts(nnx.clone(bases["clip"]), COUPLED, init_words=[7, 4, 9, 7], rngs=nnx.Rngs(0))
    table = bases["clip"].text.token_embedding.embedding[...]
    np.testing.assert_array_equal(model.prompts.text[...][0], table[jnp.asarray([7, 4])])
    fewer = attach_prompts(nnx.clone(bases["clip"]), PromptConfig(depth=2, vision_depth=1), rngs=nnx.Rngs(0)).prompts
    np.testing.assert_allclose(fewer.vision_prompts(), vision_prompts_by_hand(fewer), rtol=0, atol=1e-6)
    assert fewer.vision_prompts().shape == (1, 2, 16)
    wide = abstract(variant("clip-b16-224"), PromptConfig())
    drawn = attach_prompts(nnx.clone(bases["clip"]), PromptConfig(7, 7, 2, image_adapter=400), rngs=nnx.Rngs(0)).prompts
    assert float(jnp.std(drawn.text[...])) == pytest.approx(0.02, rel=0.15)
    for kernel, inputs in ((drawn.coupling.kernel, 12), (drawn.image_adapter.up_kernel, 400)):
        assert float(jnp.abs(kernel[...]).max()) == pytest.approx(inputs**-0.5, rel=0.05)
    assert {path: leaf.shape for path, leaf in param_tree.abstract(wide).items() if path.startswith("prompts")} == {
        "prompts/text": (9, 2, 512),
        "prompts/coupling/kernel": (9, 512, 768),
        "prompts/coupling/bias": (9, 768),
    }


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("zero_shot", 0),
        ("coop", 4 * 512),
        ("maple", 9 * (2 * 512 + 512 * 768 + 768)),
        ("adapters", 2 * 2 * 512 * 128),
        ("coprompt", 9 * (2 * 512 + 512 * 768 + 768) + 2 * 2 * 512 * 128),
        ("full", 149_620_737),
    ],
)
def test_what_trains_by_each_method_on_clip_b16(name, number):
    method = pg.few_shot_method(name)

    def make():
        model = DualEncoder(variant("clip-b16-224"), rngs=nnx.Rngs(0))
        return pg.attach_method(model, method, rngs=nnx.Rngs(1))

    shapes = param_tree.abstract(nnx.eval_shape(make))
    chosen = [] if method.trainable is None else patterns.select(method.trainable, shapes)
    assert sum(shapes[path].size for path in chosen) == number
    assert all(shapes[path].dtype == jnp.float32 for path in chosen)


def test_methods_by_name():
    assert list(pg.FEW_SHOT_METHODS) == ["zero_shot", "coop", "maple", "adapters", "coprompt", "full"]
    assert [name for name, method in pg.FEW_SHOT_METHODS.items() if method.consistency] == ["coprompt"]
    changed = pg.few_shot_method("coprompt", depth=2, text_adapter=3)
    assert changed.prompts == PromptConfig(depth=2, text_adapter=3, image_adapter=128) and changed.consistency
    with pytest.raises(UserError, match=r"method 'copromt' is unknown, .*; did you mean 'coprompt'"):
        pg.few_shot_method("copromt")
    with pytest.raises(UserError, match="depht is given to the method 'maple', expected one of text_tokens"):
        pg.few_shot_method("maple", depht=2)
    with pytest.raises(UserError, match="depth is given to the method 'full', expected nothing"):
        pg.few_shot_method("full", depth=2)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(text_tokens=-1), "config.text_tokens=-1, expected 0 or more"),
        (dict(text_tokens=0, vision_tokens=0), "both adapters are 0, expected one to be learned"),
        (dict(image_mix=1.5), "config.image_mix=1.5, expected a number from 0 to 1"),
        (dict(depth=3), "depth is 3, expected 1 to 2, the layers of its tower"),
        (dict(depth=0), "config.depth=0, expected 1 or more"),
        (dict(text_tokens=0, coupled=False, depth=4), "vision_depth is 4, expected 1 to 3"),
        (dict(depth=2, vision_depth=3), "vision_depth is 3, expected at most depth, 2, of coupled prompts"),
        (dict(vision_tokens=3), "text_tokens is 2 and vision_tokens is 3, expected equal numbers"),
        (dict(text_tokens=8, vision_tokens=0), "text_tokens is 8, expected less than 8"),
    ],
)
def test_configs_that_do_not_fit_are_refused(bases, changes, sentence):
    base = nnx.clone(bases["clip"])
    with pytest.raises(UserError, match=sentence):
        attach_prompts(base, dataclasses.replace(SHALLOW, **changes), rngs=nnx.Rngs(0))
    assert type(base) is DualEncoder


def test_user_errors_of_attach_prompts(bases):
    base = nnx.clone(bases["clip"])
    for words in ([3], [3, 31], [-1, 3]):
        with pytest.raises(UserError, match="expected 2 ids or more below 31"):
            attach_prompts(base, SHALLOW, init_words=words, rngs=nnx.Rngs(0))
    attach_prompts(base, SHALLOW, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="has prompts already: detach them"):
        attach_prompts(base, SHALLOW, rngs=nnx.Rngs(0))


def test_prompts_that_would_replace_class_names_are_refused(bases):
    model = attach_prompts(nnx.clone(bases["clip"]), dataclasses.replace(FREE, text_tokens=3), rngs=nnx.Rngs(0))
    check_texts(model, np.asarray(TOKENS))  # three words are shared, a fourth is not
    for row in ([1, 5, 6, 8, 9, 30, 0, 0, 0], [1, 5, 6, 30, 0, 0, 0, 0, 0]):
        with pytest.raises(UserError, match="text 1 ends or differs from text 0 within its first 3 tokens"):
            check_texts(model, np.asarray([TOKENS[0], row]))
    check_texts(with_prompts(bases["map"], COUPLED), np.asarray([[5, 2], [6, 2]]))  # room is made there
    check_texts(bases["clip"], np.asarray([[1, 5, 30], [1, 6, 30]]))
