"""Every format written and read back, in all directions, with the files beside the weights."""

import dataclasses
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from paligemma_jax.adapt.lora.adapter import attach_lora
from paligemma_jax.adapt.quantization.quantize import quantize, quantized_kernels
from paligemma_jax.data.tokenizers.paligemma import load_tokenizer
from paligemma_jax.images.preprocessing import Preprocessing
from paligemma_jax.weights import save_big_vision, save_hugging_face, save_orbax
from paligemma_jax.weights.orbax import checkpoint as orbax
from paligemma_jax.weights.reader import load
from train_jax.core import param_tree
from train_jax.core.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")

FORMATS = {"hf": save_hugging_face, "x.npz": save_big_vision, "orbax": save_orbax}
GOLDENS = ("hf_paligemma", "hf_paligemma2", "bigvision_paligemma/params.npz")


def assert_same_model(model, expected):
    ours, theirs = param_tree.flatten(model), param_tree.flatten(expected)
    assert set(ours) == set(theirs)
    for path, array in ours.items():
        np.testing.assert_array_equal(array, theirs[path], err_msg=path, strict=True)
    assert model.config.vision == expected.config.vision


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("source", GOLDENS)
def test_written_and_read_back_is_the_same_model(golden, tmp_path, source, name):
    model = load(golden / source)
    FORMATS[name](model, tmp_path / "deep" / name)
    fields = ("attn_softcap", "final_softcap", "sliding_window", "query_scale")
    given = {field: getattr(model.config.decoder, field) for field in fields} if name == "x.npz" else {}
    again = load(tmp_path / "deep" / name, **given)
    assert_same_model(again, model)
    assert again.config.decoder == model.config.decoder
    if name == "orbax":
        assert again.config == model.config


def test_through_all_formats_the_logits_stay_those_of_transformers(gemma_2_model, gemma_2_case, tmp_path):
    decoder = gemma_2_model.config.decoder
    caps = {name: getattr(decoder, name) for name in ("attn_softcap", "final_softcap", "sliding_window", "query_scale")}
    save_big_vision(gemma_2_model, tmp_path / "a.npz")
    save_orbax(load(tmp_path / "a.npz", **caps), tmp_path / "b")
    save_hugging_face(load(tmp_path / "b"), tmp_path / "c")
    model = load(tmp_path / "c")
    assert model.config.decoder == decoder
    logits = np.asarray(model(**gemma_2_case.inputs)[0])
    expected, real = gemma_2_case.stored["logits"][:, gemma_2_case.patches :], gemma_2_case.real
    np.testing.assert_allclose(logits[real], expected[real], rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_bfloat16_is_written_as_bfloat16(golden, tmp_path, name):
    model = load(golden / "hf_paligemma", "bfloat16")
    FORMATS[name](model, tmp_path / name)
    again = load(tmp_path / name, "bfloat16")
    assert_same_model(again, model)
    if name == "hf":
        assert {a.dtype for a in load_file(tmp_path / "hf/model.safetensors").values()} == {
            np.dtype(ml_dtypes.bfloat16)
        }
    if name == "x.npz":
        assert {a.dtype for a in np.load(tmp_path / "x.npz").values()} == {np.dtype("V2")}


def test_a_big_vision_file_is_written_as_released_ones_are(golden, tmp_path):
    model = load(golden / "bigvision_paligemma/params.npz")
    save_big_vision(model, tmp_path / "x.npz")
    ours, theirs = np.load(tmp_path / "x.npz"), np.load(golden / "bigvision_paligemma/params.npz")
    assert set(ours.files) == set(theirs.files)
    for name in ours.files:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name, strict=True)


# Hugging Face folders.


def test_weights_above_the_limit_are_written_as_shards_with_an_index(golden, tmp_path):
    model, limit = load(golden / "hf_paligemma"), 100_000
    save_hugging_face(model, tmp_path, max_shard_size=limit)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 5
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = [load_file(file) for file in files]
    assert index["weight_map"] == {name: file.name for file, shard in zip(files, shards, strict=True) for name in shard}
    sizes = [sum(array.nbytes for array in shard.values()) for shard in shards]
    assert index["metadata"]["total_size"] == sum(sizes) == 4 * sum(a.size for a in param_tree.flatten(model).values())
    assert max(sizes) <= limit
    assert_same_model(load(tmp_path), model)


def test_saving_again_leaves_nothing_of_the_earlier_save(golden, tmp_path):
    first, second = load(golden / "hf_paligemma"), load(golden / "hf_paligemma2")
    save_hugging_face(first, tmp_path, max_shard_size=100_000)
    save_hugging_face(second, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    assert_same_model(load(tmp_path), second)


def test_the_config_of_paligemma_2_agrees_with_transformers(golden, tmp_path, gemma_2_model):
    save_hugging_face(gemma_2_model, tmp_path)
    ours = json.loads((tmp_path / "config.json").read_text())
    theirs = json.loads((golden / "hf_paligemma2/config.json").read_text())
    theirs["text_config"]["rope_theta"] = theirs["text_config"].pop("rope_parameters")["rope_theta"]
    for section in ("text_config", "vision_config"):
        ours_section, theirs_section = ours.pop(section), theirs.pop(section)
        assert ours_section == {name: theirs_section[name] for name in ours_section}
    assert ours == {name: theirs[name] for name in ours}


def test_without_a_window_every_layer_type_is_full_attention(gemma_2_model, tmp_path):
    model = nnx.clone(gemma_2_model)
    model.config = model.config.replace(decoder=dict(sliding_window=None, final_softcap=None))
    save_hugging_face(model, tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert set(text["layer_types"]) == {"full_attention"} and text["final_logit_softcapping"] is None
    assert load(tmp_path).config.decoder == model.config.decoder


def test_the_sources_own_tokenizer_files_are_copied(golden, tmp_path, hugging_face_model):
    source = tmp_path / "source"
    source.mkdir()
    content = {"tokenizer.model": load_tokenizer("tiny").model_bytes, "tokenizer.json": b"{}"}
    content |= {"tokenizer_config.json": b'{"a": 1}', "special_tokens_map.json": b"[]", "secret.txt": b"no"}
    for name, data in content.items():
        (source / name).write_bytes(data)
    save_hugging_face(hugging_face_model, tmp_path / "out", source)
    content.pop("secret.txt")
    for name, data in content.items():
        assert (tmp_path / "out" / name).read_bytes() == data
    assert not (tmp_path / "out/secret.txt").exists()


def test_a_tokenizer_model_alone_gets_the_config_that_transformers_needs(tmp_path, hugging_face_model):
    save_hugging_face(hugging_face_model, tmp_path, "tiny")
    tokenizer = load_tokenizer(tmp_path)
    values = json.loads((tmp_path / "tokenizer_config.json").read_text())
    added = {int(index): entry["content"] for index, entry in values["added_tokens_decoder"].items()}
    assert added[tokenizer.loc(7)] == "<loc0007>" and added[tokenizer.seg(127)] == "<seg127>"
    assert added[tokenizer.image_id] == values["extra_special_tokens"]["image_token"] == "<image>"
    assert (values["bos_token"], values["eos_token"], values["pad_token"]) == ("<bos>", "<eos>", "<pad>")
    assert len(added) == 4 + 1024 + 128 + 1
    special = {index for index, entry in values["added_tokens_decoder"].items() if entry["special"]}
    assert special == {"0", "1", "2", "3", str(tokenizer.image_id)}


def test_the_preprocessor_has_the_number_of_image_tokens(tmp_path, hugging_face_model):
    save_hugging_face(hugging_face_model, tmp_path)
    values = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (values["image_seq_length"], values["processor_class"]) == (16, "PaliGemmaProcessor")
    assert load(tmp_path).config.preprocessing == hugging_face_model.config.preprocessing


# Models that cannot be written.


def refused(match, save, *arguments):
    with pytest.raises(UserError, match=match) as info:
        save(*arguments)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("name", FORMATS)
def test_adapters_and_quantised_kernels_are_refused_and_write_nothing(golden, tmp_path, name):
    adapted = attach_lora(load(golden / "hf_paligemma"), rngs=nnx.Rngs(0))
    refused("lora_a.*merge adapters", FORMATS[name], adapted, tmp_path / name)
    if name != "orbax":  # which keeps them
        quantised = quantize(load(golden / "hf_paligemma"), "int8")
        refused("kernel.*dequantize kernels", FORMATS[name], quantised, tmp_path / name)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda config: config.replace(vision={"activation": "relu"}), "vision.activation = relu"),
        (lambda config: config.replace(decoder={"activation": "silu"}), "decoder.activation = silu"),
        (lambda config: config.replace(decoder={"eps": 1e-5}), "decoder.eps = 1e-05"),
        (
            lambda config: dataclasses.replace(config, preprocessing=Preprocessing.clip(config.vision.image_size)),
            "images of mean .* where big_vision's have 0.5 and 0.5",
        ),
    ],
)
def test_settings_that_a_big_vision_file_cannot_express_are_refused(golden, tmp_path, change, message):
    model = load(golden / "hf_paligemma")
    model.config = change(model.config)
    refused(f"x.npz cannot say that the model has {message}", save_big_vision, model, tmp_path / "x.npz")


def test_errors_of_saving_are_one_sentence(hugging_face_model, tmp_path):
    refused("x.bin does not end in .npz", save_big_vision, hugging_face_model, tmp_path / "x.bin")
    (tmp_path / "empty").mkdir()
    refused("holds no tokenizer.model", save_hugging_face, hugging_face_model, tmp_path / "a", tmp_path / "empty")
    save_orbax(hugging_face_model, tmp_path / "b")
    refused("holds a model already", save_orbax, hugging_face_model, tmp_path / "b")


def damaged(folder, edit):
    values = json.loads((folder / "config.json").read_text())
    edit(values)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_errors_of_orbax_folders_are_one_sentence(hugging_face_model, tmp_path):
    save_orbax(hugging_face_model, tmp_path / "b")
    refused("format 'x', expected 'paligemma_jax'", load, damaged(tmp_path / "b", lambda v: v.update(format="x")))
    damaged(tmp_path / "b", lambda v: v.update(format="paligemma_jax"))
    refused("does not match", load, damaged(tmp_path / "b", lambda v: v["decoder"].update(post_norms=True)))
    refused("does not describe a model", load, damaged(tmp_path / "b", lambda v: v["decoder"].update(colour=1)))
    damaged(tmp_path / "b", lambda v: (v["decoder"].pop("colour"), v["decoder"].update(post_norms=False)))
    assert_same_model(load(tmp_path / "b"), hugging_face_model)
    for file in (tmp_path / "b/params").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    refused("cannot be read as an Orbax checkpoint", load, tmp_path / "b")


# Quantised kernels, which our own format stores.

CODECS = {"nf4": dict(block_size=128, double=True), "int8": {}, "int4": {}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", CODECS)
def test_quantised_kernels_are_kept_to_the_bit(golden, tmp_path, kind, dtype):
    model = load(golden / "hf_paligemma2", dtype, quantize=kind, **CODECS[kind])
    save_orbax(model, tmp_path / "a")
    again = load(tmp_path / "a", dtype)
    assert_same_model(again, model)
    kernels, expected = quantized_kernels(again), quantized_kernels(model)
    assert kernels.keys() == expected.keys() and len(kernels) == 14
    for path, kernel in kernels.items():
        assert (kernel.codec, kernel.dtype) == (expected[path].codec, expected[path].dtype) and kernel.dtype == dtype
        np.testing.assert_array_equal(kernel.dequantize(), expected[path].dequantize(), err_msg=path)


def test_codes_and_constants_keep_their_dtype(golden, tmp_path):
    model = load(golden / "hf_paligemma", quantize="nf4")
    save_orbax(model, tmp_path / "a")
    again, expected = param_tree.flatten(load(tmp_path / "a", "bfloat16")), param_tree.flatten(model)
    for path, array in again.items():
        kept = "/kernel/" in path
        np.testing.assert_array_equal(array, expected[path] if kept else expected[path].astype("bfloat16"), strict=True)


def test_some_kernels_may_be_plain_and_others_of_another_kind(golden, tmp_path):
    model = quantize(load(golden / "hf_paligemma"), "int8", targets="vision/.*/fc1")
    quantize(model, "nf4", double=True, targets="decoder/.*/(up_proj|q_proj)")
    save_orbax(model, tmp_path / "a")
    again = load(tmp_path / "a", image_size=load(golden / "hf_paligemma").config.vision.image_size * 2)
    result = {path: kernel.kind for path, kernel in quantized_kernels(again).items()}
    assert sorted(result.values()) == ["int8", "nf4", "nf4"] and result["vision/layers/mlp/fc1/kernel"] == "int8"
    assert_same_model(load(tmp_path / "a"), model)


@pytest.mark.parametrize("options", [{"kind": "nf5"}, {"dtype": "int8"}, {"double": "yes"}, {"colour": 1}])
def test_an_invalid_quantised_folder_is_refused(golden, tmp_path, options):
    save_orbax(load(golden / "hf_paligemma", quantize="nf4"), tmp_path / "a")
    refused("is quantised already", lambda: load(tmp_path / "a", quantize="nf4"))
    path = "decoder/layers/mlp/up_proj"
    damaged(tmp_path / "a", lambda values: values["quantized"][path].update(options))
    refused(f"for the quantised kernel '{path}', expected its kind and dtype", load, tmp_path / "a")
    damaged(tmp_path / "a", lambda values: values["quantized"].pop(path))
    refused("does not match the model: missing .*up_proj/kernel; not used .*up_proj/kernel/", load, tmp_path / "a")
    damaged(tmp_path / "a", lambda values: values.update(quantized=[1]))
    refused("expected its kind and dtype", load, tmp_path / "a")


def test_codes_of_another_dtype_are_refused(golden, tmp_path, monkeypatch):
    save_orbax(load(golden / "hf_paligemma", quantize="nf4"), tmp_path / "a")
    monkeypatch.setattr(orbax.OrbaxArrays, "dtype", lambda arrays, name: np.dtype("float16"))
    refused("absmax is float16, expected float32 of a quantised kernel", load, tmp_path / "a")


# One tower of a file.


def test_one_tower_of_a_siglip_file_equals_big_vision(golden):
    case = np.load(golden / "bigvision_siglip/case.npz")
    tower = load(f"{golden}/bigvision_siglip/params.npz:img")
    encoded, _ = tower(jnp.asarray(case["image"]))
    np.testing.assert_allclose(encoded, case["img_encoded"], rtol=0, atol=3.2e-5)
    stacked = load(f"{golden}/bigvision_siglip/params_scan.npz:img")
    for path, array in param_tree.flatten(tower).items():
        np.testing.assert_array_equal(array, param_tree.flatten(stacked)[path], err_msg=path)


def test_towers_of_a_paligemma_file_are_its_own(golden, big_vision_model):
    whole = param_tree.flatten(big_vision_model)
    for tower, prefix in (("img", "vision/"), ("llm", "decoder/")):
        part = param_tree.flatten(load(f"{golden}/bigvision_paligemma/params.npz:{tower}"))
        expected = {path.removeprefix(prefix): array for path, array in whole.items() if path.startswith(prefix)}
        assert set(part) == set(expected)
        assert all(np.array_equal(part[path], expected[path]) for path in part)


def test_a_tower_takes_another_resolution(golden):
    tower = load(f"{golden}/bigvision_siglip/params.npz:img", image_size=48)
    assert param_tree.flatten(tower)["position_embedding"].shape == (36, 48)


def test_an_unknown_part_of_a_file_is_refused(golden):
    refused("asks for a part 'txt', expected one of img, llm", load, f"{golden}/bigvision_siglip/params.npz:txt")
