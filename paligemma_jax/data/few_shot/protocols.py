"""Few-shot protocols: the images that a model is tuned on and those that it is tested on, stored as one JSON file.

few_shot                tuned on k images of every class, tested on all test images of them
base_to_novel           tuned on k images of the first half of the classes, tested on both halves, each on its own
cross_dataset           tuned on one data set, tested on others with other classes
domain_generalization   tuned on one data set, tested on the same classes (or some of them) in other styles
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from paligemma_jax.data.few_shot.dataset import BASE, NOVEL, FewShot
from paligemma_jax.data.paths import inside
from paligemma_jax.data.records import fingerprint_of
from train_jax.core.errors import UserError, quoted

SHOTS = (1, 2, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Images to tune on, and sets of images to test on.

    Attributes:
      kind: one of PROTOCOL_KINDS.
      tuned: the drawn shots of train (and val).
      tested: data sets with their test splits, by the name of their result.

    Raises:
      UserError: nothing to test on, or an image that is both tuned on and tested on.
    """

    kind: str
    tuned: FewShot
    tested: Mapping[str, FewShot]

    def __post_init__(self):
        object.__setattr__(self, "tuned", self.tuned.only("train", "val"))
        object.__setattr__(self, "tested", {name: data.only("test") for name, data in self.tested.items()})
        tuned = {image for split in self.tuned.splits.values() for image, _ in split}
        for name, data in self.tested.items():
            shared = tuned & {image for image, _ in data.splits["test"]} if data.name == self.tuned.name else ()
            if not data.splits["test"]:
                raise UserError(f"{data.name} ({name}) has no test images, expected one at least: add images.")
            if shared:
                raise UserError(
                    f"{min(shared)} of {data.name} is tuned on and tested on ({name}), expected other images: correct "
                    "the splits."
                )

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that are equal if the tuned and tested images and classes are."""
        return fingerprint_of(**self._content())

    def to_json(self) -> str:
        """Returns the file's text; `read_protocol` is the inverse."""
        return json.dumps(self._content() | {"digest": self.digest})

    def _content(self):
        tested = {name: data.to_dict() for name, data in self.tested.items()}
        return {"protocol": self.kind, "tuned": self.tuned.to_dict(), "tested": tested}


def few_shot(data: FewShot, shots: int, seed: int) -> Protocol:
    """Returns a protocol: `shots` images of each class, tested on the test split. Raises UserError, as few_shot."""
    return Protocol("few_shot", data.few_shot(shots, seed), {"test": data})


def base_to_novel(data: FewShot, shots: int, seed: int) -> Protocol:
    """Returns a protocol: base classes, tested on "base" and "novel", with labels from 0 in each. Raises UserError."""
    base, novel = data.base_to_novel()
    return Protocol("base_to_novel", base.few_shot(shots, seed), {BASE: base, NOVEL: novel})


def cross_dataset(source: FewShot, targets: Mapping[str, FewShot], shots: int, seed: int) -> Protocol:
    """Returns a protocol: all classes of a source, tested on it (by its name) and on the targets. Raises UserError."""
    return Protocol("cross_dataset", source.few_shot(shots, seed), _with_source(source, targets))


def domain_generalization(source: FewShot, shifted: Mapping[str, FewShot], shots: int, seed: int) -> Protocol:
    """Returns a protocol: a source, tested on it (by its name) and on sets with its classes, or some, in other styles.

    Raises:
      UserError: a shifted set has a class that the source does not have.
    """
    for name, data in shifted.items():
        others = sorted(set(data.classes) - set(source.classes))
        if others:
            raise UserError(
                f"{name} has {len(others)} classes that {source.name} does not have (first: {quoted(others[0])}), "
                "expected the same ones: rename them, or measure across data sets."
            )
    return Protocol("domain_generalization", source.few_shot(shots, seed), _with_source(source, shifted))


def _with_source(source: FewShot, others: Mapping[str, FewShot]) -> dict[str, FewShot]:
    if source.name in others or not others:
        raise UserError(
            f"the data to test on are {sorted(others)} beside {source.name}, expected one or more by other names: "
            "change them."
        )
    return {source.name: source, **others}


IN_ONE = {"few_shot": few_shot, "base_to_novel": base_to_novel}
"""Protocols of one data set, by name."""
ACROSS = {"cross_dataset": cross_dataset, "domain_generalization": domain_generalization}
"""Protocols that test on further data sets, by name."""
PROTOCOL_KINDS = (*IN_ONE, *ACROSS)


def make_protocol(kind: str, source: FewShot, targets: Mapping[str, FewShot], shots: int, seed: int) -> Protocol:
    """Returns the protocol of a kind, one of PROTOCOL_KINDS; protocols of one data set leave out `targets`.

    Raises:
      UserError: data that do not fit the protocol.
    """
    if kind in IN_ONE:
        return IN_ONE[kind](source, shots, seed)
    return ACROSS[kind](source, targets, shots, seed)


def read_protocol(file: str | Path, roots: Mapping[str, str | Path]) -> Protocol:
    """Reads the output of `to_json`.

    Args:
      roots: the folder of each data set's images, by its name (`FewShot.root`).

    Raises:
      UserError: no such file, one that was changed (its digest differs), a missing root, or a path that leaves one.
    """
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
        tuned, tested = (values["tuned"], values["tested"])
        names = {data["name"] for data in (tuned, *tested.values())}
        missing = sorted(names - set(roots))
        if missing:
            raise UserError(f"{file} names {', '.join(missing)}, expected the folder of its images in roots: add it.")
        tested = {name: FewShot.from_dict(data, roots[data["name"]]) for name, data in tested.items()}
        protocol = Protocol(values["protocol"], FewShot.from_dict(tuned, roots[tuned["name"]]), tested)
        digest = values["digest"]
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is no protocol ({error!r}), expected a file of `to_json`: give one.") from None
    if digest != protocol.digest or protocol.kind not in PROTOCOL_KINDS:
        raise UserError(
            f"{file} has the digest {protocol.digest}, expected {digest}, since it was edited: restore the original."
        )
    for data in (protocol.tuned, *protocol.tested.values()):
        _check_inside(data)
    return protocol


def _check_inside(data: FewShot) -> None:
    root = data.root.resolve()
    for split in data.splits.values():
        for image, _ in split:
            if not inside(root, image):
                raise UserError(f"the image path {quoted(image)} of {data.name} leaves {root}: move the image there.")
