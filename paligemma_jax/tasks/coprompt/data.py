"""Which images a few-shot run is tuned on and tested on, and the sentences about its classes."""

import hashlib
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from paligemma_jax.data.few_shot import protocols
from paligemma_jax.data.few_shot.class_folders import open_images
from paligemma_jax.data.few_shot.dataset import SPLITS, FewShot
from paligemma_jax.data.few_shot.descriptions import Sentences, fill, read_descriptions
from paligemma_jax.data.few_shot.protocols import Protocol
from paligemma_jax.data.few_shot.synthetic_classes import class_descriptions, synthetic_classes
from paligemma_jax.data.records import fingerprint_of
from paligemma_jax.data.synthetic_clevr.classes import CLASSES, IN_OTHERS, in_halves
from paligemma_jax.tasks.common import progress
from paligemma_jax.tasks.coprompt.report import RESERVED
from train_jax.core import digests, files
from train_jax.core.errors import UserError

FILE = "protocol.json"


def read_data(config: ConfigDict, size: int) -> Protocol:
    """The images of a config's protocol; shots are drawn by its seed. Synthetic ones are rendered on first use.

    Args:
      config: of the task.
      size: pixels a side of synthetic images.

    Raises:
      UserError: images that are not there, or that do not fit the protocol; further data sets of one name, or of one
        that a number of the results has.
    """
    source, targets = (_scenes if config.data.name == "scenes" else _images)(config, size)
    drawn = dict(shots=config.shots, seed=config.seed)
    if config.protocol == "cross_dataset":
        return protocols.cross_dataset(source, targets, **drawn)
    if config.protocol == "domain_generalization":
        return protocols.domain_generalization(source, targets, **drawn)
    return getattr(protocols, config.protocol)(source, **drawn)


def _scenes(config: ConfigDict, size: int) -> tuple[FewShot, dict[str, FewShot]]:
    data = config.data
    whole = dict(zip(SPLITS, data.per_class, strict=True))
    renamed = data.words == IN_OTHERS

    def read(style: str, per_class: dict[str, int]) -> FewShot:
        with progress(f"rendering {style} classes") as told:
            found = synthetic_classes(data.cache_dir, size, per_class, style, 0, data.build_workers, told)
        found = found.ordered([values.name for values in in_halves(data.novel)])
        return found.renamed({values.name: values.in_other_words for values in CLASSES}) if renamed else found

    return read(data.style, whole), {style: read(style, {"test": whole["test"]}) for style in data.target_styles}


def _images(config: ConfigDict, size: int) -> tuple[FewShot, dict[str, FewShot]]:
    targets: dict[str, FewShot] = {}
    for folder in config.data.targets:
        target = open_images(folder, cache=config.data.cache_dir)
        if target.name in targets or target.name in RESERVED:
            raise UserError(
                f"data.targets: {folder} is named {target.name!r}, as another of them or a number of eval.json is, "
                f"expected names of their own, none of {', '.join(RESERVED)}: rename the folder or its split file."
            )
        targets[target.name] = target
    return open_images(config.data.source, cache=config.data.cache_dir), targets


def read_sentences(config: ConfigDict, classes: tuple[str, ...]) -> Sentences:
    """What the frozen branch reads about each class: descriptions, or where inputs are not perturbed its text alone.

    Raises:
      UserError: see `read_descriptions`.
    """
    if not config.consistency.perturb:
        return tuple((fill(config.template, name),) for name in classes)
    if config.data.descriptions is not None:
        return read_descriptions(config.data.descriptions, classes)
    described = class_descriptions()
    return tuple(described[name] for name in classes)


def store(protocol: Protocol, workdir: Path) -> None:
    """Writes a run's protocol.

    Raises:
      UserError: the workdir holds another one.
    """
    file = workdir / FILE
    noted = _stored(file).get("digest")
    if noted not in (None, protocol.digest):
        raise UserError(
            f"{file} is of other images (digest {noted}, now {protocol.digest}), expected those of this run: restore "
            "them, or choose another --workdir."
        )
    files.write_atomically(file, protocol.to_json())


def tested_fingerprint(protocol: Protocol, cache: str | Path) -> str:
    """A hash of what is tested on: names, classes, and the images by their bytes, whose digests `cache` keeps."""
    images = [data.root / image for data in protocol.tested.values() for image, _ in data.splits["test"]]
    found = digests.of_files(images, digests.place_of(cache, "tested", protocol.digest, images[0]), "test images")
    return fingerprint_of(protocol=protocol.digest, images=hashlib.sha256(found.tobytes()).hexdigest())


def check_unseen(protocol: Protocol, workdir: Path) -> None:
    """Checks that nothing is tested on which the run of a workdir was tuned on, by the protocol that it stored.

    An image that was added since divides class folders anew; one that was renamed is still what was tuned on.

    Raises:
      UserError: an image of both, or a stored protocol that is broken.
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
        # Copies that were in both from the start are the data set's own (coop.read_coop).
        new = sorted(tested - images - before[name])
        shared = (images & tested) | _copies(sorted(images), new, data.root)
        if shared:
            raise UserError(
                f"{len(shared)} image(s) of {data.name} ({name}) would be tested that the run in {workdir} was tuned "
                f"on (first: {min(shared)}), expected the images of its {FILE}: restore them."
            )


def _tested(stored: dict[str, Any], name: str) -> set[str]:
    """The images that a stored protocol tests under a name."""
    return {image for image, _ in stored["tested"].get(name, {}).get("splits", {}).get("test", ())}


def _copies(images: list[str], others: list[str], root: Path) -> set[str]:
    """Those of `others` whose bytes are those of one of `images`."""
    if not others:
        return set()
    known, keys = (digests.keys(digests.of_files([root / name for name in part])) for part in (images, others))
    seen = {key for key in known if key is not None}
    return {name for key, name in zip(keys, others, strict=True) if key in seen}


def _stored(file: Path) -> dict[str, Any]:
    """What a run stored; empty if there is no file."""
    try:
        stored = files.read_json(file)
    except ValueError as error:
        raise UserError(f"{file} cannot be read as JSON ({error}), expected what the run wrote: restore it.") from None
    if not isinstance(stored, dict):
        raise UserError(f"{file} holds no JSON object, expected what the run wrote: restore it.")
    return stored
