"""Data of a few-shot run: the images that it is tuned on and tested on, and the sentences about its classes."""

import hashlib
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from paligemma_jax.data.few_shot.dataset import FewShot
from paligemma_jax.data.few_shot.descriptions import Sentences, fill, read_descriptions
from paligemma_jax.data.few_shot.openers import open_data_sets
from paligemma_jax.data.few_shot.protocols import Protocol, make_protocol
from paligemma_jax.data.few_shot.synthetic_classes import class_descriptions
from paligemma_jax.data.records import fingerprint_of
from paligemma_jax.tasks.common import progress
from paligemma_jax.tasks.coprompt.report import RESERVED
from train_jax.core import digests, files
from train_jax.core.errors import UserError

FILE = "protocol.json"


def read_data(config: ConfigDict, size: int) -> Protocol:
    """Returns the images of a config's protocol, with shots drawn by its seed; synthetic images are rendered once.

    Args:
      config: of the task.
      size: pixels a side of synthetic images.

    Raises:
      UserError: images are missing or do not fit the protocol, or a further data set has the name of a number of
        eval.json.
    """
    source, targets = open_data_sets(config.data, size, progress)
    reserved = [name for name in targets if name in RESERVED]
    if reserved:
        raise UserError(
            f"a further data set is named {reserved[0]!r}, as a number of eval.json is, expected none of "
            f"{', '.join(RESERVED)}: rename its folder or its split file."
        )
    return make_protocol(config.protocol, source, targets, config.shots, config.seed)


def read_sentences(config: ConfigDict, classes: tuple[str, ...]) -> Sentences:
    """Returns the sentences that the frozen branch reads about each class: descriptions, or only the class text.

    It is the class text where inputs are not perturbed.

    Raises:
      UserError: see `read_descriptions`.
    """
    if not config.consistency.perturb:
        return tuple((fill(config.template, name),) for name in classes)
    if config.data.descriptions is not None:
        return read_descriptions(config.data.descriptions, classes)
    descriptions = class_descriptions()
    return tuple(descriptions[name] for name in classes)


def store(protocol: Protocol, workdir: Path) -> None:
    """Writes a run's protocol to its workdir.

    Raises:
      UserError: the workdir holds another protocol.
    """
    file = workdir / FILE
    digest = _stored(file).get("digest")
    if digest not in (None, protocol.digest):
        raise UserError(
            f"{file} is of other images (digest {digest}, now {protocol.digest}), expected those of this run: restore "
            "them, or choose another --workdir."
        )
    files.write_atomically(file, protocol.to_json())


def tested_fingerprint(protocol: Protocol, cache: str | Path) -> str:
    """Returns a hash of the test sets: names, classes, and the bytes of the images, whose digests `cache` keeps."""
    images = [data.root / image for data in protocol.tested.values() for image, _ in data.splits["test"]]
    file = digests.cache_file_of(cache, "tested", protocol.digest, images[0])
    digest = hashlib.sha256(digests.of_files(images, file, "test images").tobytes()).hexdigest()
    return fingerprint_of(protocol=protocol.digest, images=digest)


def check_unseen(protocol: Protocol, workdir: Path) -> None:
    """Checks by the stored protocol that no test image is one that the run of a workdir was tuned on.

    Class folders are divided differently after an image is added; an image that was renamed is still the same.

    Raises:
      UserError: an image is in both, or the stored protocol is broken.
    """
    file = workdir / FILE
    stored = _stored(file)
    if not stored:
        return
    try:
        tuned = FewShot.from_dict(stored["tuned"], protocol.tuned.root)
        before = {name: _tested(stored, name) for name in protocol.tested}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is no protocol ({error!r}), expected what the run wrote: restore it.") from None
    images = {image for split in tuned.splits.values() for image, _ in split}
    for name, data in protocol.tested.items():
        if data.name != tuned.name:
            continue
        tested = {image for image, _ in data.splits["test"]}
        # Copies that were in both from the start belong to the data set (coop.read_coop).
        new = sorted(tested - images - before[name])
        seen = (images & tested) | _copies(sorted(images), new, data.root)
        if seen:
            raise UserError(
                f"{len(seen)} image(s) of {data.name} ({name}) would be tested that the run in {workdir} was tuned "
                f"on (first: {min(seen)}), expected the images of its {FILE}: restore them."
            )


def _tested(stored: dict[str, Any], name: str) -> set[str]:
    """Returns the images of a test set of a stored protocol."""
    return {image for image, _ in stored["tested"].get(name, {}).get("splits", {}).get("test", ())}


def _copies(images: list[str], others: list[str], root: Path) -> set[str]:
    """Returns the files in `others` that are byte-identical to a file in `images`."""
    if not others:
        return set()
    ours, theirs = (digests.keys(digests.of_files([root / name for name in part])) for part in (images, others))
    seen = {key for key in ours if key is not None}
    return {name for key, name in zip(theirs, others, strict=True) if key in seen}


def _stored(file: Path) -> dict[str, Any]:
    """Returns the protocol that a run stored; empty if there is no file."""
    try:
        stored = files.read_json_or_empty(file)
    except ValueError as error:
        raise UserError(f"{file} cannot be read as JSON ({error}), expected what the run wrote: restore it.") from None
    if not isinstance(stored, dict):
        raise UserError(f"{file} holds no JSON object, expected what the run wrote: restore it.")
    return stored
