"""peft folders: parity with peft's logits, round trips, all options of target modules, hostile files."""

import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import paligemma_jax as pg
from paligemma_jax.adapt.lora.adapter import TRAINABLE, attach_lora, detach_lora, lora_projections, merge_lora
from paligemma_jax.models.projection import projections
from paligemma_jax.weights import load_peft, save_peft
from paligemma_jax.weights.adapters.peft_config import read_config
from train_jax.core import param_tree
from train_jax.core.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")
ADAPTERS = ("qo", "seven", "lm_only", "rslora", "dora")
CONFIG, ARRAYS = "adapter_config.json", "adapter_model.safetensors"
Q = "model.language_model.layers.{}.self_attn.q_proj"


def logits(model, inputs):
    graph, arrays = param_tree.split(model)
    return np.asarray(jax.jit(lambda arrays, inputs: param_tree.merge(graph, arrays)(**inputs)[0])(arrays, inputs))


def content(folder):
    return json.loads((folder / CONFIG).read_text()), load_file(folder / ARRAYS)


def assert_equal_content(folder, other):
    (config, arrays), (other_config, other_arrays) = content(folder), content(other)
    assert config == other_config and arrays.keys() == other_arrays.keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(array, other_arrays[key], err_msg=key, strict=True)


def assert_same_adapters(model, expected):
    ours, theirs = param_tree.flatten(model), param_tree.flatten(expected)
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        np.testing.assert_array_equal(array, theirs[path], err_msg=path, strict=True)
    adapters, others = lora_projections(model), lora_projections(expected)
    assert adapters.keys() == others.keys()
    for path, module in adapters.items():
        mine, yours = module.lora_spec, others[path].lora_spec
        assert (mine.ranks, mine.rslora) == (yours.ranks, yours.rslora)
        assert mine.scales == yours.scales and module.lora_dropout == others[path].lora_dropout


# Parity with peft, at the tolerances of the golden's README.


@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_and_merged_logits_equal_peft(golden, peft_case, name):
    model = pg.load(golden / "hf_paligemma", adapter=golden / f"hf_peft_lora/adapter_{name}")
    trained = sum(array.size for path, array in param_tree.flatten(model).items() if re.fullmatch(TRAINABLE, path))
    assert trained == peft_case.stored[f"{name}_params"][0]
    real, text = peft_case.real, slice(peft_case.patches, None)
    active = logits(model, peft_case.inputs)[real]
    np.testing.assert_allclose(active, peft_case.stored[f"{name}_logits"][:, text][real], rtol=0, atol=2e-4)
    merged = merge_lora(model)
    if f"{name}_merged_q1" in peft_case.stored:
        kernel = merged.decoder.layers.self_attn.q_proj.kernel[...][1].reshape(64, 64).T
        np.testing.assert_allclose(kernel, peft_case.stored[f"{name}_merged_q1"], rtol=0, atol=1e-5)
    result = logits(merged, peft_case.inputs)[real]
    np.testing.assert_allclose(result, peft_case.stored[f"{name}_merged_logits"][:, text][real], rtol=0, atol=2e-4)


# Round trips.


@pytest.mark.parametrize("name", ADAPTERS)
def test_read_then_write_gives_back_the_file(golden, hugging_face_model, tmp_path, name):
    folder = golden / f"hf_peft_lora/adapter_{name}"
    save_peft(load_peft(nnx.clone(hugging_face_model), folder), tmp_path)
    assert_equal_content(folder, tmp_path)
    assert (tmp_path / CONFIG).read_bytes() == (folder / CONFIG).read_bytes()


def drawn(model, seed=0):
    """Draws B and magnitudes, so that the adapters have an effect."""
    rng, arrays = np.random.default_rng(seed), {}
    for path, module in lora_projections(model).items():
        b = 0.1 * rng.standard_normal(module.lora_b.shape, np.float32)
        for layer, rank in enumerate(module.lora_spec.ranks):
            (b if len(module.lora_spec.ranks) == 1 and b.ndim == 1 + len(module.out_shape) else b[layer])[rank:] = 0
        arrays[f"{path}/lora_b"] = jnp.asarray(b)
        if module.lora_magnitude is not None:
            magnitude = module.lora_magnitude[...]
            arrays[f"{path}/lora_magnitude"] = magnitude * rng.uniform(0.5, 1.5, magnitude.shape).astype(np.float32)
    return param_tree.assign(model, arrays)


OURS = {
    "the default": {},
    "one tower": dict(targets=r"vision/layers/self_attn/.*", rank=3, alpha=5.5),
    "both towers, as peft": dict(targets=r".*/(q_proj|o_proj)", rslora=True, dropout=0.1),
    "everything, the convolution too": dict(targets=r".*", rank=2),
    "everything with DoRA": dict(targets=r".*", rank=2, dora=True),
    "some layers": dict(targets=r"decoder/.*", layers=[0, 2]),
    "some layers with DoRA": dict(targets=r"decoder/.*/(q|v)_proj", layers=[1], dora=True, rslora=True),
    "ranks and alphas that differ": dict(
        targets=r"(decoder|vision)/.*/[qv]_proj|projector/linear",
        rank=4,
        rank_pattern={r"decoder/layers/1/.*": 6, r".*/v_proj": 2, r"projector/.*": 1},
        alpha_pattern={r"decoder/layers/0/.*/q_proj": 3.25},
    ),
    "all of it": dict(
        targets=r".*/layers/.*",
        layers=[1, 2],
        rank=2,
        rank_pattern={r".*/layers/2/.*": 5},
        alpha_pattern={r"vision/.*": 7},
        rslora=True,
        dora=True,
    ),
}


@pytest.mark.parametrize(
    "case, release",
    [(case, None) for case in OURS] + [("one tower", "4.52"), ("all of it", "4.52"), ("all of it", "4.41")],
)
def test_write_then_read_gives_back_the_adapter(hugging_face_model, tmp_path, case, release):
    model = drawn(attach_lora(nnx.clone(hugging_face_model), rngs=nnx.Rngs(0), **OURS[case]))
    save_peft(model, tmp_path / "a", base="base", release=release)
    read = load_peft(nnx.clone(hugging_face_model), tmp_path / "a")
    assert_same_adapters(read, model)
    save_peft(read, tmp_path / "b")
    assert_equal_content(tmp_path / "a", tmp_path / "b")
    config, arrays = content(tmp_path / "a")
    assert config["base_model_name_or_path"] == "base"
    assert all(key.startswith("base_model.model.") for key in arrays)
    stem = {None: "model.language_model.layers", "4.52": "model.language_model.layers"}
    decoder = [key for key in arrays if "language_model" in key]
    expected = stem.get(release, "language_model.model.layers")
    assert all(key.startswith(f"base_model.model.{expected}.") for key in decoder)


@pytest.mark.parametrize("case", ["ranks and alphas that differ", "all of it", "everything with DoRA"])
def test_merged_equals_unmerged(hugging_face_model, peft_case, case):
    model = drawn(attach_lora(nnx.clone(hugging_face_model), rngs=nnx.Rngs(0), **OURS[case]))
    before, base = logits(model, peft_case.inputs), logits(hugging_face_model, peft_case.inputs)
    after = logits(merge_lora(model), peft_case.inputs)
    real = peft_case.real
    np.testing.assert_allclose(after[real], before[real], rtol=0, atol=2e-4)
    assert np.abs(before - base)[real].max() > 0.1


def test_the_padding_of_lower_ranks_is_not_written(hugging_face_model, tmp_path):
    pattern = {r"decoder/layers/1/.*": 6}
    model = attach_lora(nnx.clone(hugging_face_model), "decoder/.*/q_proj", 4, rank_pattern=pattern, rngs=nnx.Rngs(0))
    save_peft(model, tmp_path)
    config, arrays = content(tmp_path)
    shapes = {key.removeprefix("base_model.model."): array.shape for key, array in arrays.items()}
    ranks = {0: 4, 1: 6, 2: 4}
    expected = {f"{Q.format(i)}.lora_A.weight": (r, 64) for i, r in ranks.items()}
    assert shapes == expected | {f"{Q.format(i)}.lora_B.weight": (64, r) for i, r in ranks.items()}
    assert config["r"] == 4 and config["rank_pattern"] == {Q.format(1): 6}


def test_adapters_that_changed_since_they_were_read_get_a_new_config(golden, hugging_face_model, tmp_path):
    model = load_peft(nnx.clone(hugging_face_model), golden / "hf_peft_lora/adapter_lm_only")
    attach_lora(model, "projector/linear", rank=8, alpha=32, rngs=nnx.Rngs(0))
    save_peft(model, tmp_path)
    assert_same_adapters(load_peft(nnx.clone(hugging_face_model), tmp_path), model)
    assert any("multi_modal_projector" in key for key in content(tmp_path)[1])


# Files made by a test, whose effect is computed by hand on the base's weights.


def write_folder(folder, arrays, **options):
    folder.mkdir(exist_ok=True)
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]} | options
    (folder / CONFIG).write_text(json.dumps(values))
    save_file(arrays, folder / ARRAYS)
    return folder


def pair(rng, name, inputs=64, outputs=64, rank=2):
    """A and B of one module."""
    return {
        f"base_model.model.{name}.lora_A.weight": rng.standard_normal((rank, inputs)).astype(np.float32),
        f"base_model.model.{name}.lora_B.weight": rng.standard_normal((outputs, rank)).astype(np.float32),
    }


def q_pairs(ranks, name=Q):
    rng = np.random.default_rng(0)
    return {key: a for layer, rank in ranks.items() for key, a in pair(rng, name.format(layer), rank=rank).items()}


@pytest.mark.parametrize(
    "ranks, alphas, options",
    [
        (
            {0: 2, 1: 5, 2: 2},
            {0: 3, 1: 3, 2: 4},
            {"rank_pattern": {r"layers\.1\.self_attn\.q_proj": 5}, "alpha_pattern": {"2.self_attn.q_proj": 4}},
        ),
        ({1: 2}, {1: 3}, {"layers_to_transform": 1}),
        ({0: 2, 2: 2}, {0: 3, 2: 3}, {"layers_to_transform": [0, 2], "layers_pattern": "layers"}),
        ({0: 2, 2: 2}, {0: 3, 2: 3}, {"layers_to_transform": [0, 2], "layers_pattern": ""}),
        ({1: 2}, {1: 3}, {"layers_to_transform": 1, "layers_pattern": ["blocks", "(model.language_model.)layers"]}),
        ({0: 2, 1: 2}, {0: 3, 1: 3}, {"exclude_modules": r".*layers\.2\..*"}),
        ({0: 3}, {0: 3}, {"target_modules": [Q.format(0)], "layers_to_transform": [2], "r": 3}),
        ({0: 2, 2: 2}, {0: 3, 2: 3}, {"target_modules": r".*language_model\.layers\.[02]\.self_attn\.q_proj"}),
    ],
)
@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_scales_and_layers_are_those_of_the_config(
    golden, hugging_face_model, tmp_path, ranks, alphas, options, rslora
):
    arrays = q_pairs(ranks)
    if "exclude_modules" in options:
        options = options | {"exclude_modules": r".*(layers\.2|vision_tower)\..*"}
    elif "target_modules" not in options:
        options = options | {"exclude_modules": r".*vision_tower.*"}
    model = load_peft(nnx.clone(hugging_face_model), write_folder(tmp_path, arrays, use_rslora=rslora, **options))
    stored = load_file(golden / "hf_paligemma/model.safetensors")
    kernel = projections(merge_lora(model))["decoder/layers/self_attn/q_proj"].kernel[...]
    for layer in range(3):
        weight = stored[f"language_model.model.layers.{layer}.self_attn.q_proj.weight"]
        if layer in ranks:
            name = f"base_model.model.{Q.format(layer)}"
            scale = alphas[layer] / (math.sqrt(ranks[layer]) if rslora else ranks[layer])
            weight = weight + scale * arrays[f"{name}.lora_B.weight"] @ arrays[f"{name}.lora_A.weight"]
        np.testing.assert_allclose(kernel[layer].reshape(64, 64).T, weight, rtol=0, atol=1e-5, err_msg=str(layer))


@pytest.mark.parametrize(
    "decoder, vision",
    [
        ("base_model.model.model.language_model.layers", "base_model.model.model.vision_tower.encoder.layers"),
        (
            "base_model.model.model.language_model.layers",
            "base_model.model.model.vision_tower.vision_model.encoder.layers",
        ),
        (
            "base_model.model.language_model.model.layers",
            "base_model.model.vision_tower.vision_model.encoder.layers",
        ),
        ("model.language_model.layers", "model.vision_tower.encoder.layers"),
    ],
    ids=["5", "4.52", "4.41", "without prefix"],
)
def test_names_of_every_release_load_the_same_and_are_written_as_they_were(
    golden, hugging_face_model, tmp_path, decoder, vision
):
    source = golden / "hf_peft_lora/adapter_qo"
    config, arrays = content(source)
    ours = {
        "base_model.model.model.language_model.layers": decoder,
        "base_model.model.model.vision_tower.encoder.layers": vision,
    }
    renamed = {}
    for key, array in arrays.items():
        stem = next(stem for stem in ours if key.startswith(stem))
        renamed[ours[stem] + key.removeprefix(stem)] = array
    folder = write_folder(tmp_path / "a", renamed, **config)
    model = load_peft(nnx.clone(hugging_face_model), folder)
    assert_same_adapters(model, load_peft(nnx.clone(hugging_face_model), source))
    save_peft(model, tmp_path / "b")
    written = content(tmp_path / "b")[1]
    assert {key.removeprefix("base_model.model.") for key in renamed} == {
        key.removeprefix("base_model.model.") for key in written
    }


def test_a_regular_expression_matches_the_names_of_its_release(hugging_face_model, tmp_path):
    arrays = q_pairs({0: 2, 1: 2, 2: 2}, "language_model.model.layers.{}.self_attn.q_proj")
    targets = r"language_model\.model\.layers\.\d+\.self_attn\.q_proj"
    model = load_peft(nnx.clone(hugging_face_model), write_folder(tmp_path, arrays, target_modules=targets))
    assert list(lora_projections(model)) == ["decoder/layers/self_attn/q_proj"]


def test_arrays_keep_their_dtype_by_default(hugging_face_model, tmp_path):
    arrays = {key: array.astype(ml_dtypes.bfloat16) for key, array in q_pairs({0: 2, 1: 2, 2: 2}).items()}
    folder = write_folder(tmp_path / "a", arrays, exclude_modules=".*vision_tower.*")
    model = load_peft(nnx.clone(hugging_face_model), folder)
    assert model.decoder.layers.self_attn.q_proj.lora_a.dtype == jnp.bfloat16
    save_peft(model, tmp_path / "b")
    assert_equal_content(folder, tmp_path / "b")
    model = load_peft(nnx.clone(hugging_face_model), folder, dtype="float32")
    assert model.decoder.layers.self_attn.q_proj.lora_b.dtype == jnp.float32


def test_detaching_gives_back_the_base(golden, hugging_face_model):
    for name in ("dora", "seven"):
        model = detach_lora(load_peft(nnx.clone(hugging_face_model), golden / f"hf_peft_lora/adapter_{name}"))
        assert nnx.graphdef(model) == nnx.graphdef(hugging_face_model)


def test_leaves_are_placed_by_shardings(golden):
    device, asked = jax.devices()[-1], []

    def shardings(path, leaf):
        asked.append(path)
        return jax.sharding.SingleDeviceSharding(device)

    model = pg.load(golden / "hf_paligemma", adapter=golden / "hf_peft_lora/adapter_qo", shardings=shardings)
    for path, array in param_tree.flatten(model).items():
        assert path in asked and array.devices() == {device}


# Adapters that do not match.


def refused(sentence, base, folder):
    model = nnx.clone(base)
    with pytest.raises(UserError, match=sentence) as info:
        load_peft(model, folder)
    assert nnx.graphdef(model) == nnx.graphdef(base)  # nothing partly loaded
    assert len(str(info.value).splitlines()) == 1


def changed(golden, folder, name="qo", arrays=None, **options):
    """A copy of a golden adapter with some options and arrays changed; an array None is removed."""
    config, stored = content(golden / f"hf_peft_lora/adapter_{name}")
    stored = {key: array for key, array in (stored | (arrays or {})).items() if array is not None}
    return write_folder(folder, stored, **config | options)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA', expected 'LORA'"),
        (
            {"bias": "all", "modules_to_save": ["lm_head"]},
            "not supported, .*bias='all', modules_to_save=\\['lm_head'\\]",
        ),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"an_option_of_tomorrow": 3}, "an_option_of_tomorrow=3"),
        ({"r": 0}, "invalid values, r=0"),
        ({"r": "8"}, "invalid values, r='8'"),
        ({"lora_alpha": float("inf")}, "invalid values, lora_alpha=inf"),
        ({"lora_dropout": 1.0}, "invalid values, lora_dropout=1.0"),
        ({"target_modules": None}, "invalid values, target_modules=None"),
        ({"target_modules": "(q_proj"}, "invalid values, target_modules='\\(q_proj'"),
        ({"rank_pattern": {"q_proj": 2.5}}, "invalid values, rank_pattern="),
        ({"use_dora": "yes"}, "invalid values, use_dora='yes'"),
        ({"r": 4}, r"has shape \(8, 48\), expected \(4, 48\) for rank 4 \(adapter_config.json\) on vision/layers"),
        ({"rank_pattern": {"o_proj": 3}}, r"expected \(3, 64\) for rank 3"),
        ({"use_dora": True}, "missing .*lora_magnitude_vector"),
        ({"target_modules": ["q_proj"]}, "not used .*o_proj.lora_A.weight.*missing nothing"),
        ({"target_modules": ["q_proj", "o_proj", "v_proj"]}, "not used nothing; missing .*v_proj.lora_A.weight"),
        ({"layers_to_transform": [0]}, "not used .*layers.1"),
        ({"target_modules": "nothing"}, "not used base_model"),
        ({"target_modules": ".*[qo]_proj", "layers_to_transform": [0]}, r"layers_to_transform=\[0\] beside target_mod"),
        ({"target_modules": ".*[qo]_proj", "layers_pattern": "layers"}, "layers_pattern='layers' beside target_mod"),
        ({"layers_pattern": ["layers"]}, r"layers_pattern=\['layers'\] without layers_to_transform"),
    ],
)
def test_configs_that_do_not_match_are_refused(golden, hugging_face_model, tmp_path, options, sentence):
    refused(sentence, hugging_face_model, changed(golden, tmp_path, **options))


KEY = f"base_model.model.{Q.format(1)}.lora_A.weight"


@pytest.mark.parametrize(
    "arrays, sentence",
    [
        ({KEY: None}, f"not used nothing; missing {re.escape(KEY)}"),
        ({KEY: np.zeros((8, 65), np.float32)}, r"has shape \(8, 65\), expected \(8, 64\) for rank 8"),
        ({KEY: np.zeros((64, 8), np.float32)}, r"has shape \(64, 8\)"),
        ({KEY: np.zeros((8, 64), np.int32)}, "is int32, expected floats"),
        (pair(np.random.default_rng(0), Q.format(7)), "not used .*layers.7.*lora_A.weight"),
        ({"base_model.model.lm_head.weight": np.zeros(3, np.float32)}, "not used base_model.model.lm_head.weight"),
        (
            {KEY.replace("model.language_model.", "language_model.model."): np.zeros((8, 64), np.float32)},
            "holds one array twice",
        ),
    ],
)
def test_arrays_that_do_not_match_are_refused(golden, hugging_face_model, tmp_path, arrays, sentence):
    changed(golden, tmp_path, arrays=arrays)
    refused(sentence, hugging_face_model, tmp_path)


def test_an_adapter_of_another_model(golden, small_model, gemma_2_model):
    refused("does not fit this model: not used .*layers.2", small_model, golden / "hf_peft_lora/adapter_lm_only")
    refused("has shape|does not fit", gemma_2_model, golden / "hf_peft_lora/adapter_seven")


def test_broken_files(golden, hugging_face_model, tmp_path):
    source = golden / "hf_peft_lora/adapter_qo"

    def broken(name, write):
        folder = tmp_path / name
        shutil.copytree(source, folder)
        write(folder)
        return folder

    whole = (source / ARRAYS).read_bytes()
    cut = broken("cut", lambda folder: (folder / ARRAYS).write_bytes(whole[:-100]))
    refused("cannot be read as safetensors", hugging_face_model, cut)
    empty = broken("empty", lambda folder: (folder / ARRAYS).write_bytes(b""))
    refused("cannot be read as safetensors", hugging_face_model, empty)
    no_json = broken("json", lambda folder: (folder / CONFIG).write_text("{"))
    refused("is not valid JSON", hugging_face_model, no_json)
    listed = broken("list", lambda folder: (folder / CONFIG).write_text("[]"))
    refused("expected a JSON object", hugging_face_model, listed)
    gone = broken("gone", lambda folder: (folder / CONFIG).unlink())
    refused("holds no adapter_config.json", hugging_face_model, gone)
    pickled = broken("bin", lambda folder: (folder / ARRAYS).rename(folder / "adapter_model.bin"))
    refused("holds no adapter_model.safetensors.*pickles are not read", hugging_face_model, pickled)


def test_attaching_twice_is_refused(golden, hugging_face_model):
    model = load_peft(nnx.clone(hugging_face_model), golden / "hf_peft_lora/adapter_lm_only")
    refused("has a LoRA adapter already", model, golden / "hf_peft_lora/adapter_qo")


def test_models_that_cannot_be_saved_are_refused(hugging_face_model, tmp_path):
    with pytest.raises(UserError, match="no LoRA adapters to save"):
        save_peft(nnx.clone(hugging_face_model), tmp_path / "a")
    model = attach_lora(nnx.clone(hugging_face_model), "decoder/.*/q_proj", rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="release is '3', expected one of 5, 4.52, 4.41"):
        save_peft(model, tmp_path / "a", release="3")
    attach_lora(model, "decoder/.*/o_proj", rslora=True, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"have use_rslora \[False, True\], expected one for all"):
        save_peft(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_adapter_is_for_a_whole_model_and_a_checkpoint(golden):
    with pytest.raises(UserError, match="is one tower, expected a whole model for an adapter"):
        path = f"{golden / 'bigvision_paligemma/params.npz'}:img"
        pg.load(path, adapter=golden / "hf_peft_lora/adapter_qo")


def test_the_first_matching_pattern_of_the_file_is_used(tmp_path):
    """peft 0.21, get_pattern_key: the first key, in the file's order, that matches the end of the name."""
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["q_proj"]}
    wide, narrow = ("q_proj", 64), ("layers.1.self_attn.q_proj", 4)
    for first, second, expected in ((wide, narrow, 64), (narrow, wide, 4)):
        pattern = dict([first, second])
        (tmp_path / CONFIG).write_text(json.dumps(values | {"alpha_pattern": pattern, "rank_pattern": pattern}))
        config = read_config(tmp_path)
        assert config.alpha(Q.format(1)) == config.rank(Q.format(1)) == expected
        assert config.alpha(Q.format(0)) == 64
        (tmp_path / CONFIG).write_text(config.text)  # as it is saved again
        assert read_config(tmp_path).alpha(Q.format(1)) == expected
