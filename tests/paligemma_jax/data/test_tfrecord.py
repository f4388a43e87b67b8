import json
import shutil
import struct

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource

from paligemma_jax.data.sources.clevr import ClevrQuestions
from paligemma_jax.data.tfrecord import convert_tfrecord, crc32c, masked_crc32c, read_tfrecord
from train_jax.core.errors import UserError


def crc32c_bit_by_bit(data):
    """The definition in RFC 3720, appendix B.4, reflected: one bit a step."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def frame(payload):
    length = struct.pack("<Q", len(payload))
    return b"".join(
        part + struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)
        for part, crc in ((length, crc32c_bit_by_bit(length)), (payload, crc32c_bit_by_bit(payload)))
    )


@pytest.fixture
def tfrecord_tree(prepared_clevr, tmp_path):
    """The prepared data with the same examples framed as TFRecord, as TFDS stores them by default."""
    folder = tmp_path / "tfds" / "clevr" / "3.1.0"
    folder.mkdir(parents=True)
    for file in prepared_clevr.iterdir():
        if ".array_record" in file.name:
            payloads = ArrayRecordDataSource(str(file))
            target = folder / file.name.replace(".array_record", ".tfrecord")
            target.write_bytes(b"".join(frame(payloads[i]) for i in range(len(payloads))))
        elif not file.name.startswith("questions-"):
            shutil.copyfile(file, folder / file.name)
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


@pytest.mark.parametrize(
    "data, crc",
    [(b"", 0), (b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43),
     (bytes(range(32)), 0x46DD794E), (bytes(range(31, -1, -1)), 0x113FDB5C)],
)  # fmt: skip
def test_crc_equals_the_standards_examples(data, crc):
    assert crc32c(data) == crc


@pytest.mark.parametrize("length", [1, 3, 63, 64, 65, 127, 128, 129, 255, 1000, 4096, 12_345])
def test_vectorised_crc_equals_the_definition(length):
    data = np.random.default_rng(length).integers(0, 256, length, np.uint8).tobytes()
    assert crc32c(data) == crc32c_bit_by_bit(data)
    assert crc32c(bytes(length)) == crc32c_bit_by_bit(bytes(length))


def test_masked_crc_of_a_frame_written_by_tensorflow():
    # TFRecordWriter (TensorFlow 2.21) given b"hello".
    written = bytes.fromhex("0500000000000000eab2043e68656c6c6fbb1f1c19")
    assert frame(b"hello") == written
    assert struct.pack("<I", masked_crc32c(b"hello")) == written[-4:]


def test_converted_data_are_read_like_prepared_data(tfrecord_tree, prepared_clevr, tmp_path):
    folder = convert_tfrecord(tfrecord_tree, tmp_path / "out")
    assert folder == tmp_path / "out" / "clevr" / "3.1.0"
    for split in ("train", "validation", "test"):
        ours, converted = ClevrQuestions(prepared_clevr, split), ClevrQuestions(tmp_path / "out", split)
        assert converted.fingerprint == ours.fingerprint
        assert [converted[i] for i in range(len(ours))] == [ours[i] for i in range(len(ours))]
    assert (folder / "features.json").read_text() == (prepared_clevr / "features.json").read_text()
    assert len(tfds.data_source("clevr", data_dir=tmp_path / "out", split="train")) == 5


def test_converting_again_changes_nothing(tfrecord_tree, tmp_path):
    folder = convert_tfrecord(tfrecord_tree, tmp_path / "out")
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert convert_tfrecord(tfrecord_tree, tmp_path / "out") == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


@pytest.mark.parametrize("damage", ["payload", "length", "cut", "missing", "fewer"])
def test_a_damaged_shard_is_named_and_nothing_is_left(tfrecord_tree, tmp_path, damage):
    shard = next(tfrecord_tree.glob("clevr-validation*"))
    data = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    elif damage == "fewer":
        shard.write_bytes(data[: 16 + struct.unpack("<Q", data[:8])[0]])
    elif damage == "cut":
        shard.write_bytes(data[:-1])
    else:
        data[{"payload": 100, "length": 3}[damage]] ^= 1
        shard.write_bytes(data)
    with pytest.raises(UserError, match="clevr-validation.*expected .*download it again"):
        convert_tfrecord(tfrecord_tree, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_the_error_says_where_a_frame_is_broken(tmp_path):
    file = tmp_path / "x.tfrecord"
    file.write_bytes(frame(b"first") + frame(b"second")[:-1] + b"?")
    stream = read_tfrecord(file)
    assert next(stream) == b"first"
    with pytest.raises(UserError, match=f"damaged at byte {len(frame(b'first'))}"):
        next(stream)


def test_other_data_sets_are_refused(prepared_clevr, tfrecord_tree, tmp_path):
    with pytest.raises(UserError, match="no dataset_info.json"):
        convert_tfrecord(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="stored as array_record"):
        convert_tfrecord(prepared_clevr, tmp_path / "out")
    with pytest.raises(UserError, match="another out_dir"):
        convert_tfrecord(tfrecord_tree, tfrecord_tree.parents[1])
