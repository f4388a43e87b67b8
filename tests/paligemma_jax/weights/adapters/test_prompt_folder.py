"""Prompts on disk: restored on a fresh base bit for bit; errors."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import paligemma_jax as pg
from paligemma_jax.adapt.peft.prefixes import Prefix
from paligemma_jax.weights.adapters.method_folder import save_adapter
from train_jax.core import param_tree
from train_jax.core.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")
CONFIG = pg.PromptConfig(2, 2, depth=2, text_adapter=3, image_adapter=3)
MARK = "text/position_embedding"


@pytest.fixture(scope="module")
def trained(golden):
    """A CLIP with prompts; read-only."""
    return pg.attach_prompts(pg.load(golden / "coprompt/base"), CONFIG, rngs=nnx.Rngs(3))


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts") / "adapter"
    pg.weights.save_prompts(trained, folder)
    return folder


def refused(sentence, folder, model, **options):
    before = param_tree.abstract(model)
    with pytest.raises(UserError, match=sentence):
        pg.weights.load_prompts(model, folder, **options)
    assert param_tree.abstract(model) == before


def test_a_fresh_base_embeds_as_the_trained_one_to_the_bit(trained, saved, golden):
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 28, 28, 3)), jnp.float32)
    tokens = jnp.asarray([[1, 4, 5, 6, 98, 0, 0, 0, 0, 0, 0, 0]])
    run = jax.jit(lambda model: model(images, tokens)[:2])
    wanted = run(trained)
    for again in (
        pg.load(golden / "coprompt/base", adapter=saved),
        pg.weights.load_prompts(pg.load(golden / "coprompt/base"), saved),
    ):
        assert again.prompts.config == CONFIG
        for ours, theirs in zip(run(again), wanted, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_the_folder_holds_only_the_trained_arrays(trained, saved):
    stored = load_file(saved / "adapter.safetensors")
    assert set(stored) == {path for path in param_tree.flatten(trained) if path.startswith("prompts/")}
    assert {file.name for file in saved.iterdir()} == {"adapter.json", "adapter.safetensors"}


def test_a_base_in_less_precision_is_the_same_base(saved, golden, tmp_path):
    half = pg.load(golden / "coprompt/base", "bfloat16", param_dtype="bfloat16", adapter=saved)
    assert half.prompts.text.dtype == jnp.float32
    quantized = pg.load(golden / "coprompt/base", quantize="nf4", adapter=saved)
    pg.weights.save_prompts(quantized, tmp_path)
    pg.weights.load_prompts(pg.load(golden / "coprompt/base"), tmp_path)


def test_another_base_of_the_same_sizes_is_refused(saved, golden):
    base = pg.load(golden / "coprompt/base")
    base.text.position_embedding[...] += 0.1
    refused("was trained on another base: text/position_embedding differ", saved, base)


def test_a_base_of_other_sizes_is_refused_with_all_mismatches(saved, golden):
    other = pg.load(golden / "hf_clip")
    names = (
        r"\(2, 64, 64\) for prompts/coupling/kernel where the model has \(2, \d+, \d+\), .*prompts/text_adapter/up_k"
    )
    refused(names, saved, other)


def test_errors(trained, saved, golden, tmp_path, hugging_face_model):
    base = pg.load(golden / "coprompt/base")
    with pytest.raises(UserError, match="the model has no prompts"):
        pg.weights.save_prompts(base, tmp_path)
    refused("adapter.json holds no prompts of a dual encoder", tmp_path, base)
    refused("has prompts already", saved, trained)
    folder = shutil.copytree(saved, tmp_path / "changed")
    description = json.loads((saved / "adapter.json").read_text())
    for change in (
        dict(method="prefix"),
        *(dict(config=value) for value in (None, {"tokens": 3}, {"text_tokens": None}, {"depth": 1.5}, {"coupled": 1})),
        *(dict(base=value) for value in ([1], {MARK: "words"}, {MARK: [[1], [1, 2]]}, {MARK: {"a": 1}})),
    ):
        (folder / "adapter.json").write_text(json.dumps(description | change))
        refused("holds no prompts of a dual encoder", folder, base)
    for numbers in ([1, 2], [], 3.0):
        (folder / "adapter.json").write_text(json.dumps(description | {"base": {MARK: numbers}}))
        refused(f"was trained on another base: {MARK} differ", folder, base)
    folder = shutil.copytree(saved, tmp_path / "cut")
    (folder / "adapter.safetensors").write_bytes(b"short")
    refused("cannot be read", folder, base)
    prefix = Prefix(2)
    save_adapter(prefix.attach(nnx.clone(hugging_face_model), nnx.Rngs(0)), tmp_path / "prefix", prefix)
    refused("its method is 'prefix'", tmp_path / "prefix", base)
    with pytest.raises(UserError, match="names no method of lora, bottleneck"):
        pg.load(golden / "hf_paligemma", adapter=saved)


def test_formats_of_whole_models_refuse_prompts(trained, tmp_path):
    with pytest.raises(UserError, match="found prompts/coupling/bias"):
        pg.weights.save_hugging_face(trained, tmp_path / "a")
    with pytest.raises(UserError, match="found prompts/coupling/bias in it"):
        pg.weights.save_orbax(trained, tmp_path / "b")
