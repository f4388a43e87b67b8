"""Converts a TFRecord data set of TFDS to array_record, which has random access, without TensorFlow.

A TFRecord file is a sequence of frames. The payload, a serialised `tf.train.Example`, is the same in both formats and
is copied unchanged (https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details):

    uint64 length | uint32 masked crc of length | payload | uint32 masked crc of payload      (little endian, CRC-32C)
"""

import functools
import json
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from train_jax.core.errors import UserError
from train_jax.core.files import atomic


def convert_tfrecord(data_dir: str | Path, out_dir: str | Path) -> Path:
    """Writes the TFRecord data set in `data_dir` as array_record under `out_dir`/NAME/VERSION; returns that folder.

    Examples keep their order and shards; features and labels are copied. An existing output is kept; an interrupted run
    leaves no output.

    Args:
      data_dir: the version folder with dataset_info.json, such as ~/tensorflow_datasets/clevr/3.1.0.
      out_dir: another TFDS root folder, such as ~/tensorflow_datasets_array_record; pass it as data_dir afterwards.

    Raises:
      UserError: if `data_dir` is not a TFRecord data set, a shard is missing or damaged, or out_dir is the same root.
    """
    data_dir, out_dir = Path(data_dir).expanduser(), Path(out_dir).expanduser()
    if not (data_dir / "dataset_info.json").is_file():
        raise UserError(
            f"{data_dir} has no dataset_info.json, expected a TFDS version folder such as "
            "~/tensorflow_datasets/clevr/3.1.0; correct the path."
        )
    info = tfds.builder_from_directory(data_dir).info
    stored = "unknown" if info.file_format is None else info.file_format.value
    if stored != "tfrecord":
        raise UserError(f"{data_dir} is stored as {stored}, expected tfrecord; read it as it is.")
    folder = out_dir / info.full_name
    if folder.resolve() == data_dir.resolve():
        raise UserError(f"the converted data would replace {data_dir}, expected another root; choose another out_dir.")
    if (folder / "dataset_info.json").is_file():
        logging.info("Already converted: %s", folder)
        return folder
    with atomic(folder) as draft:
        _convert_into(draft, data_dir, info)
    return folder


def _convert_into(folder: Path, data_dir: Path, info: tfds.core.DatasetInfo) -> None:
    folder.mkdir()
    for file in data_dir.iterdir():
        if file.is_file() and ".tfrecord" not in file.name:
            shutil.copyfile(file, folder / file.name)
    total = sum(split.num_examples for split in info.splits.values())
    with tqdm(total=total, desc="Converting", unit="example", disable=not sys.stderr.isatty()) as bar:
        for split in info.splits.values():
            for shard, length in zip(split.filenames, split.shard_lengths, strict=True):
                target = folder / shard.replace(".tfrecord", ".array_record")
                written = _convert_shard(data_dir / shard, target, bar)
                if written != length:
                    raise UserError(
                        f"{shard} holds {written} examples, expected {length} by dataset_info.json; download it again."
                    )
    description = json.loads((folder / "dataset_info.json").read_text())
    description["fileFormat"] = "array_record"
    (folder / "dataset_info.json").write_text(json.dumps(description, indent=2))


def _convert_shard(source: Path, target: Path, bar: tqdm) -> int:
    writer, count = ArrayRecordWriter(str(target), "group_size:1"), 0  # one record per group: cheap random access
    for payload in read_tfrecord(source):
        writer.write(payload)
        count += 1
        bar.update()
    writer.close()
    return count


def read_tfrecord(file: str | Path) -> Iterator[bytes]:
    """Yields the payloads of an uncompressed TFRecord file, each checked against its checksum.

    Raises:
      UserError: naming the file and the byte offset of a frame that is cut off or damaged, or a missing file.
    """
    if not Path(file).is_file():
        raise UserError(f"{file} is missing, expected a TFRecord file; download it again.")
    with Path(file).open("rb") as stream:
        while header := stream.read(12):
            offset = stream.tell() - len(header)
            length = _checked(file, offset, header, 8)
            payload = stream.read(struct.unpack("<Q", length)[0] + 4)
            yield _checked(file, offset, payload, struct.unpack("<Q", length)[0])


def _checked(file: str | Path, offset: int, framed: bytes, length: int) -> bytes:
    """Returns the first `length` bytes of `framed`, after comparing them with the masked checksum that follows."""
    data, checksum = framed[:length], framed[length:]
    if len(framed) != length + 4 or struct.unpack("<I", checksum)[0] != masked_crc32c(data):
        raise UserError(
            f"{file} is damaged at byte {offset} (cut off, compressed or wrong checksum), expected an intact "
            "TFRecord file; download it again."
        )
    return data


def masked_crc32c(data: bytes) -> int:
    """Returns the CRC-32C of `data` in TFRecord's masked form: rotated right by 15 bits, plus a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """Returns the CRC-32C (Castagnoli, RFC 3720) of `data`.

    Vectorised, since plain Python would take hours for CLEVR: many stretches of the data advance in parallel, one byte
    per step. A register that starts at zero is linear in the data, so registers of neighbouring stretches combine as
    shift(left) ^ right, where shift is the effect of as many zero bytes as the right stretch has. Leading zeros change
    nothing, and the prescribed start of all ones equals inverting the first four bytes.
    """
    if len(data) < 64:  # a frame's header; too short for the vectorised form
        register = 0xFFFFFFFF
        for byte in data:
            register = int(_BYTE_STEP[(register ^ byte) & 0xFF]) ^ register >> 8
        return register ^ 0xFFFFFFFF
    lanes = 1 << (len(data) // 64).bit_length() - 1  # a power of two; stretches of 64 to 128 bytes
    width = -(-len(data) // lanes)
    padded = np.zeros(lanes * width, np.uint8)
    padded[-len(data) :] = np.frombuffer(data, np.uint8)
    padded[padded.size - len(data) :][:4] ^= 0xFF
    registers = np.zeros(lanes, np.uint32)
    for column in np.ascontiguousarray(padded.reshape(lanes, width).T):
        registers = _step(registers ^ column)
    shift = _zero_bytes(width)
    while len(registers) > 1:
        registers = _apply(shift, registers[0::2]) ^ registers[1::2]
        shift = _apply(shift, shift)
    return int(registers[0]) ^ 0xFFFFFFFF


def _byte_step() -> np.ndarray:
    """Returns the effect of eight steps of the shift register on each low byte, uint32 [256]."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = table >> 1 ^ (table & 1) * np.uint32(0x82F63B78)  # the polynomial 0x1EDC6F41, bits reversed
    return table


_BYTE_STEP = _byte_step()


def _step(registers: np.ndarray) -> np.ndarray:
    """Advances registers by one byte, which was XORed into them."""
    return _BYTE_STEP[registers & 0xFF] ^ registers >> 8


@functools.lru_cache(maxsize=256)
def _zero_bytes(count: int) -> np.ndarray:
    """Returns the linear map of `count` zero bytes: the image of each of the 32 register bits, uint32 [32]."""
    columns = np.uint32(1) << np.arange(32, dtype=np.uint32)
    for _ in range(count):
        columns = _step(columns)
    return columns


def _apply(columns: np.ndarray, registers: np.ndarray) -> np.ndarray:
    """Applies a linear map over the bits, given by its columns, to each register."""
    bits = registers[:, None] >> np.arange(32, dtype=np.uint32) & 1
    return np.bitwise_xor.reduce(bits * columns, axis=1)
