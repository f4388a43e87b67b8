"""npz archives: layer by layer, bfloat16, both orders of axes, and hostile files."""

import io
import zipfile

import ml_dtypes
import numpy as np
import pytest

from paligemma_jax.weights.big_vision.npz import Npz, write_npz
from train_jax.core.errors import UserError

RNG = np.random.default_rng(0)
ARRAYS = {
    "a/b": RNG.standard_normal((3, 4, 5)).astype(np.float32),
    "half": RNG.standard_normal((2, 6)).astype(ml_dtypes.bfloat16),
    "scalar": np.float32(3.0).reshape(()),
}


@pytest.fixture
def file(tmp_path):
    write_npz(tmp_path / "x.npz", ARRAYS.items())
    return tmp_path / "x.npz"


def test_written_and_read_back_are_the_same_arrays(file):
    source = Npz(file)
    assert source.names() == set(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(source[name], array, strict=True)
        assert source.shape(name, array.ndim) == array.shape and source.dtype(name) == array.dtype


def test_numpy_reads_what_is_written(file):
    stored = np.load(file, allow_pickle=False)
    assert set(stored.files) == {f"params/{name}" for name in ARRAYS}
    np.testing.assert_array_equal(stored["params/a/b"], ARRAYS["a/b"], strict=True)
    assert stored["params/half"].dtype == np.dtype("V2")
    np.testing.assert_array_equal(stored["params/half"].view(ml_dtypes.bfloat16), ARRAYS["half"])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_layers_are_the_slices_of_the_first_axis(tmp_path, save, order):
    array = np.asarray(ARRAYS["a/b"], order=order)
    save(tmp_path / "x.npz", w=array)
    source = Npz(tmp_path / "x.npz")
    np.testing.assert_array_equal(source["w"], array)
    layers = list(source.layers("w"))
    assert len(layers) == 3
    np.testing.assert_array_equal(np.stack(layers), array)


def test_a_layer_is_read_only_when_it_is_asked_for(file, monkeypatch):
    source, sizes = Npz(file), []
    read = source._read
    monkeypatch.setattr(source, "_read", lambda *args, **kw: sizes.append(args[2]) or read(*args, **kw))
    layers = source.layers("a/b")
    next(layers)
    assert sizes == [20]
    next(layers)
    assert sizes == [20, 20]


def test_a_write_that_fails_leaves_the_earlier_file(file):
    before = file.read_bytes()

    def arrays():
        yield "a/b", ARRAYS["a/b"]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_npz(file, arrays())
    assert file.read_bytes() == before and [f.name for f in file.parent.iterdir()] == ["x.npz"]


# Hostile files: one sentence each.


def refused(match, call):
    with pytest.raises(UserError, match=match) as info:
        call()
    assert "\n" not in str(info.value)


def archive(path, content, name="w.npy"):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(name, content)
    return Npz(path)


def npy(array, **options):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **options)
    return buffer.getvalue()


def test_objects_are_never_unpickled(tmp_path):
    source = archive(tmp_path / "x.npz", npy(np.array([{}], dtype=object), allow_pickle=True))
    for call in (lambda: source["w"], lambda: list(source.layers("w")), lambda: source.shape("w", 1)):
        refused("the array w cannot be read .it holds Python objects", call)


def test_a_header_larger_than_its_data_allocates_nothing(tmp_path):
    honest = npy(np.zeros((2, 2), np.float32))
    lying = honest.replace(b"(2, 2), }", b"(1<<60,)}"[:9])
    huge = honest.replace(b"'shape': (2, 2), }                ", b"'shape': (2, 999999999999999), }  ")
    assert huge != honest
    refused("w cannot be read .*cut off", lambda: archive(tmp_path / "a.npz", huge)["w"])
    refused("w cannot be read", lambda: archive(tmp_path / "b.npz", lying)["w"])
    refused("w cannot be read .*cut off", lambda: archive(tmp_path / "c.npz", honest[:-1])["w"])


@pytest.mark.parametrize("content", [b"", b"text", npy(np.zeros(3))[:20]])
def test_members_that_are_not_arrays_are_refused(tmp_path, content):
    refused("w cannot be read", lambda: archive(tmp_path / "x.npz", content)["w"])


def test_a_flipped_bit_is_noticed_layer_by_layer_too(tmp_path):
    np.savez(tmp_path / "x.npz", w=ARRAYS["a/b"])
    data = bytearray((tmp_path / "x.npz").read_bytes())
    position = data.index(ARRAYS["a/b"].tobytes()) + 100
    data[position] ^= 1
    (tmp_path / "x.npz").write_bytes(bytes(data))
    refused("w cannot be read .*CRC", lambda: Npz(tmp_path / "x.npz")["w"])
    refused("w cannot be read .*CRC", lambda: list(Npz(tmp_path / "x.npz").layers("w")))


def test_arrays_that_are_absent_or_of_other_rank_are_named(file):
    refused("has no array nothing", lambda: Npz(file)["nothing"])
    refused(r"a/b has shape \(3, 4, 5\), expected 1 or 2 axes", lambda: Npz(file).shape("a/b", 1, 2))
