"""CLEVR (Johnson et al., 2017, https://arxiv.org/abs/1612.06890): prepared once as array_record, read by question.

`prepare_clevr` writes the same features as the public TFDS builder `clevr` 3.1.0, without TensorFlow and from a folder
or zip that the user already has; `tfds.data_source("clevr", data_dir=...)` reads the result too. `ClevrQuestions` has
one row per question. Images stay encoded until the pipeline decodes them.
"""

import contextlib
import hashlib
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from ml_collections import ConfigDict
from tqdm import tqdm

from paligemma_jax.data.byte_lru import ByteLRU
from paligemma_jax.data.records import BadRow, Record, RecordSource, checked_index, fingerprint_of, prompt_checked
from paligemma_jax.data.row_texts import check_texts
from paligemma_jax.data.sources.clevr_tree import SPLITS, ClevrTree
from paligemma_jax.data.sources.folder_lock import locked
from paligemma_jax.data.sources.splits import own_source
from train_jax.core import digests
from train_jax.core.errors import UserError, quoted
from train_jax.core.formats.tfds import open_builder, open_split

VERSION = "3.1.0"
SOURCE_FILE = "source.json"  # beside dataset_info.json: identity of the tree that the data came from

# The integer labels are positions in these lists, in the order of the public builder.
COLORS = ["gray", "blue", "brown", "yellow", "red", "green", "purple", "cyan"]
MATERIALS = ["rubber", "metal"]
SHAPES = ["cube", "sphere", "cylinder"]
SIZES = ["small", "large"]
WORDS = {"color": COLORS, "material": MATERIALS, "shape": SHAPES, "size": SIZES}
NUMBERS = {"rotation": 1, "3d_coords": 3, "pixel_coords": 3}  # how many numbers each field holds


def clevr_features() -> tfds.features.FeaturesDict:
    """Returns the features of the public builder `clevr` 3.1.0."""
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "file_name": tfds.features.Text(),
            "objects": tfds.features.Sequence(
                {
                    **{field: tfds.features.ClassLabel(names=names) for field, names in WORDS.items()},
                    "rotation": tfds.features.Tensor(shape=(), dtype=np.float32),
                    "3d_coords": tfds.features.Tensor(shape=(3,), dtype=np.float32),
                    "pixel_coords": tfds.features.Tensor(shape=(3,), dtype=np.float32),
                }
            ),
            "question_answer": tfds.features.Sequence(
                {"question": tfds.features.Text(), "answer": tfds.features.Text()}
            ),
        }
    )


class Clevr(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """TFDS builder that writes a `ClevrTree`; use `prepare_clevr`."""

    name = "clevr"
    VERSION = tfds.core.Version(VERSION)
    pkg_dir_path = None  # no metadata files beside this module

    def __init__(self, *, tree: ClevrTree, identity: dict[str, Any], **kwargs: Any):
        self.tree, self.identity = tree, identity  # before the base class, which calls _info
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="CLEVR: questions about rendered scenes of simple objects, with scene graphs.",
            features=clevr_features(),
            homepage="https://cs.stanford.edu/people/jcjohns/clevr/",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded
        # Written into the temporary folder, which TFDS renames to the final one when it is complete.
        (self.data_path / SOURCE_FILE).write_text(json.dumps(self.identity, indent=2))
        return {split: self._generate_examples(split) for split in self.tree.splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        total = len(self.tree.image_files(split))
        examples = self.tree.examples(split)
        progress = tqdm(examples, f"Preparing CLEVR {split}", total, unit="image", disable=not sys.stderr.isatty())
        for name, example in progress:
            for thing in example["objects"]:
                _check_object(thing, name)
            yield name, example


def _check_object(thing: dict[str, Any], name: str) -> None:
    """Refuses an object of an image's scene with values that CLEVR does not have. Raises UserError."""
    for field, names in WORDS.items():
        if thing[field] not in names:
            raise _no_object(name, field, thing[field], f"one of {', '.join(names)}")
    for field, count in NUMBERS.items():
        values = thing[field] if count > 1 else [thing[field]]
        valid = isinstance(values, list) and len(values) == count
        if not valid or not all(type(value) in (int, float) and math.isfinite(value) for value in values):
            raise _no_object(name, field, thing[field], f"{count} finite numbers" if count > 1 else "a finite number")


def _no_object(name: str, field: str, value: Any, expected: str) -> UserError:
    return UserError(
        f"an object in the scene of {name} has {field} = {quoted(value)}, expected {expected}: correct the scenes, or "
        "download CLEVR again."
    )


def prepare_clevr(source: str | Path, data_dir: str | Path) -> Path:
    """Writes CLEVR as array_record under `data_dir`/clevr/3.1.0, unless it is there already; returns that folder.

    An interrupted run leaves no incomplete data set. The data set takes as much disk space as the images.

    Args:
      source: folder or zip in the layout of `ClevrTree`; may be deleted once the data are prepared.
      data_dir: root folder for TFDS data sets; a leading ~ is the home folder.

    Raises:
      UserError: if `source` is no CLEVR tree, if its scenes have values that CLEVR does not have, or if `data_dir`
        already holds CLEVR prepared from another tree.
    """
    source, data_dir = Path(source).expanduser(), Path(data_dir).expanduser()
    folder = data_dir / "clevr" / VERSION
    if (folder / "dataset_info.json").is_file():
        origin = folder / SOURCE_FILE  # absent if TFDS's own builder wrote the data
        if origin.is_file() and source.exists() and not _is_of(json.loads(origin.read_text()), source, data_dir):
            raise UserError(
                f"{folder} holds CLEVR prepared from another tree than {source}, expected the same one; "
                "choose another data_dir or delete that folder."
            )
        logging.info("CLEVR is already prepared in %s", folder)
        return folder
    tree = ClevrTree(source)
    builder = Clevr(tree=tree, identity=tree.identity(data_dir), data_dir=data_dir)
    tfds.disable_progress_bar()  # ours shows the number of images
    with contextlib.redirect_stdout(None):  # TFDS would print that it downloads
        builder.download_and_prepare()
    return folder


def _is_of(recorded: dict[str, Any], source: Path, data_dir: Path) -> bool:
    """Returns whether an identity recorded at preparation, perhaps with fewer entries, is that of a tree."""
    identity = ClevrTree(source).identity(data_dir)
    if recorded.keys() != identity.keys():
        return False
    return all(recorded[split].items() <= identity[split].items() for split in identity)


class ClevrQuestions(RecordSource):
    """The questions of one split, in the order of the prepared data (TFDS hashes file names).

    The image of a row is found from the cumulative number of questions. An index is built on first use, in one pass
    over the split that decodes no image, and is stored beside the data until they change. It also has digests of every
    image, by which equal images share an image index, and of all names, questions and answers.

    Args:
      data_dir: the `data_dir` of `prepare_clevr`, or the version folder itself.
      split: "train", "validation" or "test".
      prompt: the prefix, with {question} in place of the question: that alone, or "answer en {question}".
      cache_bytes: recently read examples are kept up to this size of images; sequential reading parses each once.

    Raises:
      UserError: if there is no prepared CLEVR of a readable format, or it does not have the split.
    """

    def __init__(
        self, data_dir: str | Path, split: str = "train", prompt: str = "{question}", cache_bytes: int = 64 << 20
    ):
        self._folder = _prepared_folder(Path(data_dir).expanduser())
        self._examples = _data_source(self._folder, split)
        self._prompt = prompt_checked(prompt)
        files = sorted(self._folder.glob(f"*-{split}.array_record*"))
        cache_file = self._folder / f"questions-{split}.npz"
        index = digests.kept(cache_file, files, lambda: _question_index(self._examples))
        self._starts, self._images = index["starts"], digests.numbers(digests.keys(index["images"]))
        digest = hashlib.sha256(index["images"].tobytes() + bytes(index["texts"])).hexdigest()
        self._cache = ByteLRU(cache_bytes)
        self.split = split
        self.fingerprint = fingerprint_of(kind="clevr", version=VERSION, split=split, digest=digest, prompt=prompt)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Record:
        index = checked_index(index, len(self))
        example = int(np.searchsorted(self._starts, index, side="right")) - 1
        image, name, questions, answers = self._cache.get(example, lambda: self._example(example))
        row = index - int(self._starts[example])
        texts = {"question": questions[row], "answer": answers[row]}
        question, answer = check_texts(texts, tuple(texts), f"question {row} of {name}", "correct the original data")
        return Record(image, name, int(self._images[example]), self._prompt.replace("{question}", question), answer)

    def image_numbers(self) -> np.ndarray:
        """Returns `image_index` of every row, without reading any row."""
        return np.repeat(self._images, np.diff(self._starts))

    def _example(self, number: int) -> tuple[tuple[bytes, str, list[bytes], list[bytes]], int]:
        try:
            example = self._examples[number]
        except (RuntimeError, ValueError) as error:  # array_record's checksums, or a record that does not parse
            raise BadRow(
                f"example {number} of {self._folder} cannot be read ({error}), expected an intact CLEVR record; "
                "delete the folder and prepare it again."
            ) from error
        texts = example["question_answer"]
        name = example["file_name"].decode(errors="replace")
        return (example["image"], name, list(texts["question"]), list(texts["answer"])), len(example["image"])


def _prepared_folder(data_dir: Path) -> Path:
    for folder in (data_dir, data_dir / "clevr" / VERSION):
        if (folder / "dataset_info.json").is_file():
            return folder
    raise UserError(
        f"no prepared CLEVR in {data_dir}, expected clevr/{VERSION}/dataset_info.json below it; "
        "prepare it with --config.data.source=FOLDER_OR_ZIP."
    )


def _data_source(folder: Path, split: str) -> Any:
    builder = open_builder(folder)
    info = builder.info
    features: Any = info.features
    if info.name != "clevr" or "question_answer" not in features:
        raise UserError(f"{folder} holds {info.full_name}, expected clevr/{VERSION} with questions; prepare that one.")
    if split in info.splits and split not in SPLITS:
        raise UserError(f"{folder} has a split {split!r}, expected one of {', '.join(SPLITS)}; choose one of them.")
    return open_split(builder, folder, split)


def _question_index(examples: Any) -> dict[str, np.ndarray]:
    """Indexes a split in one pass.

    Returns:
      `starts`: first question of each image and, last, the total, int64 [images + 1]; `images`: digest of each image,
      uint8 [images, 16]; `texts`: one digest of all texts, uint8 [32]. An image that cannot be read has one question,
      which is a bad row.
    """
    counts, images, texts = np.zeros(len(examples) + 1, np.int64), [], hashlib.sha256()
    rows = tqdm(range(len(examples)), "Indexing CLEVR questions", unit="image", disable=not sys.stderr.isatty())
    for i in rows:
        try:
            example = examples[i]
        except (RuntimeError, ValueError):  # as in ClevrQuestions._example
            counts[i + 1] = 1
            images.append(digests.digest(None))
            continue
        texts_of_image = example["question_answer"]
        counts[i + 1] = len(texts_of_image["question"])
        images.append(digests.digest(example["image"]))
        fields = [example["file_name"], *texts_of_image["question"], *texts_of_image["answer"]]
        texts.update(json.dumps([field.decode("latin-1") for field in fields]).encode())
    digest = np.frombuffer(texts.digest(), np.uint8)
    return {"starts": np.cumsum(counts), "images": digests.stacked(images), "texts": digest}


def open_questions(data: ConfigDict, split: str, progress: Callable[[str], object]) -> ClevrQuestions:
    """Opens prepared CLEVR, or prepares the official zip or folder on first use; see splits.open_source."""
    del progress
    source = Path(own_source(data)).expanduser()
    if (source / "dataset_info.json").is_file() or (source / "clevr").is_dir():
        return ClevrQuestions(source, split, data.prompt)  # prepared earlier, by us or by TFDS
    folder = Path(data.cache_dir).expanduser() / f"clevr-{zlib.crc32(str(source.resolve()).encode()):08x}"
    with locked(folder):
        return ClevrQuestions(prepare_clevr(source, folder), split, data.prompt)
