"""Random access to data sets prepared by TFDS."""

from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from train_jax.core.errors import UserError


def open_builder(folder: Path) -> tfds.core.DatasetBuilder:
    """Opens the builder of a version folder, which contains dataset_info.json.

    Raises:
      UserError: there is no such folder, or its format has no random access.
    """
    if not (folder / "dataset_info.json").is_file():
        raise UserError(
            f"{folder} has no dataset_info.json, expected a version folder of TFDS, such as "
            "~/tensorflow_datasets/coco_captions/2014/1.1.0: correct the path."
        )
    builder = tfds.builder_from_directory(folder)
    file_format = builder.info.file_format
    if file_format is None or file_format.value != "array_record":
        name = "unknown files" if file_format is None else file_format.value
        raise UserError(
            f"{folder} is stored as {name}, which has no random access, expected array_record; convert it once with "
            "paligemma_jax.data.tfrecord.convert_tfrecord."
        )
    return builder


def open_split(builder: tfds.core.DatasetBuilder, folder: Path, split: str, encoded: str = "image") -> Any:
    """Opens a split or a slice of one ("train[:90%]"); examples have the feature `encoded` as the bytes of its file.

    Raises:
      UserError: there is no such split.
    """
    if split.partition("[")[0] not in builder.info.splits:
        raise UserError(
            f"{folder} has no split {split!r}, expected one of {sorted(builder.info.splits)}; choose one of them."
        )
    as_data_source: Any = builder.as_data_source  # a decorator of TFDS hides its signature
    return as_data_source(split, decoders={encoded: tfds.decode.SkipDecoding()})
