"""Layouts of table rows compared with the other frameworks' definitions, and the accounting of keys."""

from pathlib import Path

import jax
import numpy as np
import pytest

from paligemma_jax.weights.big_vision import paligemma as big_vision
from paligemma_jax.weights.hugging_face import paligemma as hugging_face
from paligemma_jax.weights.name_table import Row, check_names, count_layers, read_rows, stacked, write_rows
from train_jax.core import param_tree as params
from train_jax.core.errors import UserError


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def abstract(**shapes):
    return {path.replace("__", "/"): jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()}


def test_linear_is_torchs_weight_transposed():
    weight, x = random(6, 5), random(2, 5)
    kernel = Row("k", "w", "linear").read(weight, (5, 2, 3), "file")
    np.testing.assert_allclose(np.einsum("bd,dnh->bnh", x, kernel).reshape(2, 6), x @ weight.T, rtol=1e-5)


def test_linear_contracts_heads_of_an_output_projection():
    weight, heads = random(5, 6), random(4, 2, 3)
    kernel = Row("k", "w", "linear", contracted=2).read(weight, (2, 3, 5), "file")
    expected = heads.reshape(4, 6) @ weight.T
    np.testing.assert_allclose(np.einsum("bnh,nhd->bd", heads, kernel), expected, rtol=1e-4, atol=1e-6)


def test_conv_is_torchs_kernel_with_channels_last():
    weight = random(7, 3, 4, 5)
    kernel = Row("k", "w", "conv").read(weight, (4, 5, 3, 7), "file")
    assert kernel[1, 2, 0, 6] == weight[6, 0, 1, 2]


def test_heads_in_moves_the_model_axis_first():
    weight = random(2, 5, 3)
    kernel = Row("k", "w", "heads_in").read(weight, (5, 2, 3), "file")
    assert kernel[4, 1, 2] == weight[1, 4, 2]


def test_part_picks_one_of_two():
    pair = random(2, 4, 3)
    for part in (0, 1):
        np.testing.assert_array_equal(Row("k", "w", part=part).read(pair, (4, 3), "file"), pair[part])


@pytest.mark.parametrize(
    "row, shape",
    [
        (Row("k", "w"), (4, 5)),
        (Row("k", "w", "flat"), (2, 3)),
        (Row("k", "w", "linear"), (5, 2, 3)),
        (Row("k", "w", "linear", contracted=2), (2, 3, 5)),
        (Row("k", "w", "conv"), (4, 5, 3, 7)),
        (Row("k", "w", "heads_in"), (5, 2, 3)),
        (Row("k", "w", "row"), (4, 5)),
    ],
    ids=lambda value: getattr(value, "layout", None),
)
def test_write_then_read_gives_back_the_array(row, shape):
    ours = random(*shape)
    theirs = row.write(ours)
    assert theirs.shape == row.stored_shape(shape)
    np.testing.assert_array_equal(row.read(theirs, shape, "file"), ours, strict=True)


def test_axes_of_size_one_do_not_count():
    positions = random(1, 4, 3)
    np.testing.assert_array_equal(Row("k", "w").read(positions, (4, 3), "file"), positions[0])


@pytest.mark.parametrize(
    "row, stored, shape",
    [
        (Row("k", "w"), (3, 4), (4, 3)),
        (Row("k", "w", "linear"), (5, 6), (5, 2, 3)),
        (Row("k", "w", "flat"), (2, 3), (2, 3)),
        (Row("k", "w", "conv"), (7, 4, 5, 3), (4, 5, 3, 7)),
        (Row("k", "w", part=1), (3, 4), (4,)),
    ],
)
def test_other_shapes_are_refused_even_with_as_many_numbers(row, stored, shape):
    with pytest.raises(UserError, match=r"^file: w has shape \(.*\), but k needs \(.*\): the file belongs to a model"):
        row.read(random(*stored), shape, "file: w")


class Memory(dict):
    """Arrays in memory, as a source that records which of them are read."""

    path = Path("f")

    def __init__(self, arrays):
        super().__init__(arrays)
        self.asked = []

    def __getitem__(self, name):
        self.asked.append(name)
        return super().__getitem__(name)

    def names(self):
        return set(self)

    def dtype(self, name):
        return super().__getitem__(name).dtype

    def layers(self, name):
        yield from self[name]


ROWS = [Row("decoder/layers/fc/kernel", "blocks.{i}.fc", "linear"), Row("embed/table", "emb")]
SHAPES = abstract(decoder__layers__fc__kernel=(2, 4, 5), embed__table=(7, 4))


def small_file():
    return Memory({"emb": random(7, 4), "blocks.0.fc": random(5, 4), "blocks.1.fc": 2 * random(5, 4)})


def test_read_rows_stacks_layers_and_casts():
    file = small_file()
    out = dict(read_rows(ROWS, file, SHAPES, np.float16))
    np.testing.assert_array_equal(out["embed/table"], file["emb"].astype(np.float16), strict=True)
    for i in range(2):
        expected = file[f"blocks.{i}.fc"].T.astype(np.float16)
        np.testing.assert_array_equal(out["decoder/layers/fc/kernel"][i], expected, strict=True)
    written = dict(write_rows(ROWS, {path: array.astype(np.float32) for path, array in out.items()}, "g"))
    assert set(written) == set(file)


def test_read_rows_is_lazy_and_reads_the_embedding_first():
    file = small_file()
    leaves = read_rows(ROWS, file, SHAPES, np.float32)
    assert next(leaves)[0] == "embed/table" and file.asked == ["emb"]
    assert next(leaves)[0] == "decoder/layers/fc/kernel" and file.asked == ["emb", "blocks.0.fc", "blocks.1.fc"]


def test_read_rows_transforms_each_layer_and_stacks_the_results():
    seen = []

    def transform(path, layer):
        seen.append((path, layer.shape, layer.dtype))
        if path.startswith("embed"):
            return None
        return {f"{path}/sum": layer.sum(0), f"{path}/sign": np.sign(layer).astype(np.int8)}

    file = small_file()
    out = dict(read_rows(ROWS, file, SHAPES, np.float16, transform))
    kernel = "decoder/layers/fc/kernel"
    assert seen == [("embed/table", (7, 4), np.float16), *[(kernel, (4, 5), np.float16)] * 2]
    assert set(out) == {"embed/table", f"{kernel}/sum", f"{kernel}/sign"}
    assert out[f"{kernel}/sign"].dtype == np.int8
    layers = np.stack([file[f"blocks.{i}.fc"].T.astype(np.float16) for i in range(2)])
    np.testing.assert_array_equal(out[f"{kernel}/sum"], layers.sum(1), strict=True)
    np.testing.assert_array_equal(out[f"{kernel}/sign"], np.sign(layers).astype(np.int8), strict=True)


def test_arrays_start_on_a_cache_line_so_that_jax_adopts_them():
    for array in dict(read_rows(ROWS, small_file(), SHAPES, np.float32)).values():
        assert array.ctypes.data % 64 == 0
        assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data


def test_check_names_lists_all_unmatched_keys():
    names = {"emb", "blocks.0.fc", "blocks.2.fc", "other"}
    with pytest.raises(UserError) as info:
        check_names(ROWS, names, SHAPES, "f")
    assert str(info.value) == (
        "f does not match the model: missing blocks.1.fc; not used blocks.2.fc, other. "
        "Check that the file belongs to this architecture."
    )


@pytest.mark.parametrize("count", [1, 3])
def test_read_rows_refuses_another_number_of_scanned_layers(count):
    rows, file = [Row("decoder/layers/fc/kernel", "fc")], Memory({"fc": random(count, 4, 5)})
    shapes = abstract(decoder__layers__fc__kernel=(2, 4, 5))
    with pytest.raises(UserError, match="f: fc does not have 2 layers on its first axis"):
        list(read_rows(rows, file, shapes, np.float32))


def test_a_parameter_without_a_row_is_a_bug_of_ours():
    with pytest.raises(ValueError, match=r"no row for \['new/leaf'\]"):
        check_names(ROWS, {}, SHAPES | abstract(new__leaf=(1,)), "f")


def test_write_rows_joins_parts_of_stacked_layers():
    rows = [Row("layers/up", "gate", part=1), Row("layers/gate", "gate", part=0)]
    up, gate = random(3, 4, 5), 2 * random(3, 4, 5)
    written = dict(write_rows(rows, {"layers/up": up, "layers/gate": gate}, "g"))
    np.testing.assert_array_equal(written["gate"], np.stack([gate, up], axis=1), strict=True)


def test_write_rows_refuses_what_the_format_cannot_hold():
    params = {"embed/table": random(7, 4), "decoder/layers/fc/lora_a": random(2, 4, 1)}
    with pytest.raises(UserError, match="found decoder/layers/fc/lora_a beside them and decoder/layers/fc/kernel miss"):
        list(write_rows(ROWS, params, "g"))


def test_stacked_and_count_layers():
    assert stacked("decoder/layers/mlp/fc1/kernel") and not stacked("decoder/norm/scale")
    names = ["block_0/w", "block_11/w", "block_2/b", "xblock_40/w"]
    assert count_layers(names, r"block_{i}/w") == 12
    assert count_layers(names, r"layer_{i}/w") == 0


def test_tables_cover_the_models_exactly(big_vision_model, hugging_face_model):
    for rows, model in ((big_vision.rows(), big_vision_model), (hugging_face.rows(), hugging_face_model)):
        assert sorted(row.ours for row in rows) == sorted(params.flatten(model))
