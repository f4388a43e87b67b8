"""Reads the official CLEVR_v1.0 layout, from a folder or directly from the zip, one image at a time.

    CLEVR_v1.0/
        images/{train,val,test}/CLEVR_train_000000.png ...
        questions/CLEVR_{train,val,test}_questions.json   {"questions": [{"image_filename", "question", "answer"}, ...]}
        scenes/CLEVR_{train,val}_scenes.json              {"scenes": [{"image_filename", "objects"}, ...]}

The test split has neither scenes nor answers. Answers are words: JSON's true, false and numbers, which the official
generator writes, are read as "yes", "no" and digits, as in the published files. A question or answer that is not text
is stored as bytes that `row_texts.check_texts` refuses, which makes a bad row. Nothing is extracted, and no name in a
file is used as a path.
The question files are parsed as a stream: the train split's 713 MB would take several GB as Python objects.
"""

import collections
import contextlib
import hashlib
import io
import json
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from paligemma_jax.data.row_texts import stored
from train_jax.core import digests
from train_jax.core.errors import UserError, cut, quoted

SPLITS = {"train": "train", "validation": "val", "test": "test"}  # our name (and TFDS's) -> CLEVR's
OBJECT_FIELDS = ("color", "material", "shape", "size", "rotation", "3d_coords", "pixel_coords")
CHUNK = 1 << 20  # characters or bytes read at a time


class ClevrTree:
    """An official CLEVR tree: the folder `CLEVR_v1.0`, a folder that contains it, or the zip.

    The tree has the splits whose questions it holds; it must have at least one, each with its images.

    Raises:
      UserError: if `source` is no CLEVR tree, with what is missing; while reading, if files contradict one another.
    """

    def __init__(self, source: str | Path):
        self.source = Path(source)
        root = _open_root(self.source)
        inner = root / "CLEVR_v1.0"
        self.root = inner if inner.is_dir() else root
        self.splits = [split for split in SPLITS if self._file("questions", split).exists()]
        folders = [f"images/{SPLITS[split]}" for split in self.splits]
        missing = [name for name in folders if not (self.root / name).is_dir()]
        if not self.splits:
            missing = [f"questions/CLEVR_{name}_questions.json" for name in SPLITS.values()]
        if missing:
            raise UserError(
                f"{source} is no CLEVR tree: it lacks {' and '.join(missing)}, expected the layout of CLEVR_v1.0 "
                "(images/, questions/, scenes/); give the extracted folder or CLEVR_v1.0.zip."
            )

    def _file(self, kind: str, split: str) -> Path | zipfile.Path:
        return self.root / kind / f"CLEVR_{SPLITS[split]}_{kind}.json"

    def image_files(self, split: str) -> dict[str, Path | zipfile.Path]:
        """Returns the image files by name, sorted by name."""
        files = (self.root / "images" / SPLITS[split]).iterdir()
        images = {file.name: file for file in files if file.name.endswith(".png") and not file.name.startswith(".")}
        return dict(sorted(images.items()))

    def questions(self, split: str) -> dict[str, list[dict[str, str | bytes]]]:
        """Returns, by image name, its questions in file order; answers are empty if the file has none (test)."""
        grouped = collections.defaultdict(list)
        with self._open("questions", split) as entries:
            for entry in entries:
                row = {"question": entry.get("question"), "answer": spelled(entry.get("answer", ""))}
                grouped[_image_name(entry)].append({key: stored(text) for key, text in row.items()})
        return grouped

    def objects(self, split: str) -> dict[str, list[dict[str, Any]]]:
        """Returns, by image name, the objects of its scene with their `OBJECT_FIELDS`; empty without a scenes file."""
        if not self._file("scenes", split).exists():
            return {}
        with self._open("scenes", split) as scenes:
            return {
                _image_name(scene): [
                    {field: thing[field] for field in OBJECT_FIELDS} for thing in map(_object, _list(scene, "objects"))
                ]
                for scene in scenes
            }

    def examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields image name and TFDS example (image bytes, file_name, objects, question_answer), ordered by name."""
        images, questions, objects = self.image_files(split), self.questions(split), self.objects(split)
        missing = sorted(set(questions) - set(images))
        if missing:
            raise UserError(
                f"{self._file('questions', split).name} asks about {len(missing)} images that images/{SPLITS[split]} "
                f"lacks (first: {quoted(missing[0])}), expected all of them; extract CLEVR_v1.0.zip again."
            )
        for name, file in images.items():
            yield (
                name,
                {
                    "image": file.read_bytes(),
                    "file_name": name,
                    "objects": objects.get(name, []),
                    "question_answer": questions.get(name, []),
                },
            )

    def identity(self, cache: Path | None = None) -> dict[str, Any]:
        """Returns the identity of a tree: per split, the number of images and digests of images and first questions.

        A zip and the folder extracted from it have the same identity: images are identified by CRC-32 and size, which a
        zip stores. Those of a folder's files are stored in `cache` until a file changes.
        """
        splits = {}
        for split in self.splits:
            with self._file("questions", split).open("rb") as file:
                digest = hashlib.sha256(file.read(CHUNK)).hexdigest()
            images = self.image_files(split)
            sums = self._checksums(split, list(images.values()), cache)
            listed = json.dumps([list(images), sums.tolist()]).encode()
            splits[split] = {
                "images": len(images),
                "images_sha256": hashlib.sha256(listed).hexdigest(),
                "questions_sha256_of_first_MiB": digest,
            }
        return splits

    def _checksums(self, split: str, files: list[Path | zipfile.Path], cache: Path | None) -> np.ndarray:
        """Returns CRC-32 and size of image files, int64 [images, 2]."""
        if isinstance(self.root, zipfile.Path):
            members = (file.root.getinfo(file.at) for file in files if isinstance(file, zipfile.Path))
            return np.array([(member.CRC, member.file_size) for member in members], np.int64).reshape(-1, 2)
        paths = [file for file in files if isinstance(file, Path)]

        def compute() -> dict[str, np.ndarray]:
            progress = tqdm(paths, f"Reading CLEVR {split}", unit="image", disable=not sys.stderr.isatty())
            images = (file.read_bytes() for file in progress)
            return {"sums": np.array([(zlib.crc32(image), len(image)) for image in images], np.int64).reshape(-1, 2)}

        cache_file = digests.cache_file_of(cache, "clevr", str(self.root.resolve()), split)
        return digests.kept(cache_file, paths, compute)["sums"]

    @contextlib.contextmanager
    def _open(self, kind: str, split: str) -> Iterator[Iterator[dict[str, Any]]]:
        """Yields the entries of a questions or scenes file; errors of the format within the block become UserError."""
        file = self._file(kind, split)
        try:
            with file.open("r", encoding="utf-8") as text:
                yield map(_object, stream_array(text, kind))
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError, zipfile.BadZipFile) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else cut(str(error))
            raise UserError(
                f"{file.name} in {self.source} cannot be read ({reason}), expected CLEVR's JSON with a list {kind!r} "
                "of objects; extract or download it again."
            ) from error


def _object(entry: Any) -> dict[str, Any]:
    """Returns an entry of a list of objects after checking its type. Raises ValueError."""
    if not isinstance(entry, dict):
        raise ValueError(f"found {quoted(entry)} where an object was expected")
    return entry


def _image_name(entry: dict[str, Any]) -> str:
    """Returns the image name of a question or a scene. Raises KeyError or ValueError."""
    name = entry["image_filename"]
    if not isinstance(name, str):
        raise ValueError(f"found the image_filename {quoted(name)} where a text was expected")
    return name


def _list(entry: dict[str, Any], key: str) -> list[Any]:
    """Returns a list of an entry. Raises KeyError or ValueError."""
    if not isinstance(entry[key], list):
        raise ValueError(f"found {quoted(entry[key])} where the list {key} was expected")
    return entry[key]


def spelled(answer: Any) -> Any:
    """Returns an answer as CLEVR's published files spell it."""
    if isinstance(answer, bool):
        return "yes" if answer else "no"
    return str(answer) if isinstance(answer, int) else answer


def _open_root(source: Path) -> Path | zipfile.Path:
    if source.is_dir():
        return source
    if not source.is_file():
        raise UserError(f"{source} does not exist, expected a CLEVR_v1.0 folder or zip; correct data.source.")
    try:
        return zipfile.Path(zipfile.ZipFile(source))
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{source} is no zip file ({error}), expected a CLEVR_v1.0 folder or zip; download it again."
        ) from error


def stream_array(text: io.TextIOBase, key: str) -> Iterator[Any]:
    """Yields the elements of the list under `key` of a JSON object, holding one element and one chunk at a time.

    Raises:
      KeyError: if the object has no such key.
      ValueError: if the text is not JSON of that form (json.JSONDecodeError is one).
    """
    reader = _JsonReader(text)
    reader.expect("{")
    while reader.value() != key:
        reader.expect(":")
        reader.value()
        if reader.expect(",}") == "}":
            raise KeyError(key)
    reader.expect(":")
    reader.expect("[")
    if reader.peek() == "]":
        return
    while True:
        yield reader.value()
        if reader.expect(",]") == "]":
            return


class _JsonReader:
    """Decodes one value or one punctuation mark at a time from a text file, reading ahead by `CHUNK` characters."""

    def __init__(self, text: io.TextIOBase):
        self._text = text
        self._buffer = ""
        self._position = 0
        self._decoder = json.JSONDecoder()

    def _more(self) -> bool:
        chunk = self._text.read(CHUNK)
        self._buffer, self._position = self._buffer[self._position :] + chunk, 0
        return bool(chunk)

    def peek(self) -> str:
        """Returns the next character that is not white space, without consuming it; empty at the end of the file."""
        while True:
            while self._position < len(self._buffer) and self._buffer[self._position].isspace():
                self._position += 1
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            if not self._more():
                return ""

    def expect(self, marks: str) -> str:
        """Consumes one of `marks` and returns it."""
        mark = self.peek()
        if not mark or mark not in marks:
            raise ValueError(f"found {mark!r} where one of {marks!r} was expected")
        self._position += 1
        return mark

    def value(self) -> Any:
        """Consumes one JSON value and returns it; reads on while the buffer may end within the value."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._position)
            except json.JSONDecodeError:
                if self._more():
                    continue
                raise
            complete = self._buffer[end : end + 1] in tuple(" \t\r\n,:]}")  # 12 may be the beginning of 12.5
            if not complete and self._more():
                continue
            self._position = end
            return value
