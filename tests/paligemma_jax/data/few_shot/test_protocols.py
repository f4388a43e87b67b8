"""Protocols: images to tune on and to test on, stored with a digest and read back."""

import json

import pytest

from paligemma_jax.data.few_shot import protocols
from paligemma_jax.data.few_shot.dataset import Example, FewShot
from paligemma_jax.data.few_shot.protocols import Protocol, read_protocol
from tests.paligemma_jax.data.toys import COUNTS, example_set
from train_jax.core.errors import UserError


def renamed(name, classes="abcde", counts=None):
    data = example_set(counts or {"test": COUNTS["test"][: len(classes)]}, classes)
    return FewShot(name, "nowhere", data.classes, data.splits)


ALL = {
    "few_shot": lambda: protocols.few_shot(example_set(), 4, 1),
    "base_to_novel": lambda: protocols.base_to_novel(example_set(), 4, 1),
    "cross_dataset": lambda: protocols.cross_dataset(example_set(), {"pets": renamed("pets", "xyz")}, 4, 1),
    "domain_generalization": lambda: protocols.domain_generalization(
        example_set(), {"dim": renamed("dim"), "some": renamed("some", "bd")}, 4, 1
    ),
}


@pytest.mark.parametrize("kind", protocols.PROTOCOL_KINDS)
def test_protocols_round_trip(kind, tmp_path):
    protocol = ALL[kind]()
    (tmp_path / "protocol.json").write_text(protocol.to_json())
    again = read_protocol(tmp_path / "protocol.json", dict.fromkeys(("toys", "pets", "dim", "some"), tmp_path))
    assert again.digest == protocol.digest and again.to_json() == protocol.to_json()
    assert protocol.tuned.shots == 4 and protocol.tuned.seed == 1 and protocol.kind == kind


@pytest.mark.parametrize("kind", protocols.PROTOCOL_KINDS)
def test_no_image_is_tuned_on_and_tested_on(kind):
    protocol = ALL[kind]()
    tuned = {(protocol.tuned.name, image) for rows in protocol.tuned.splits.values() for image, _ in rows}
    tested = {(data.name, image) for data in protocol.tested.values() for image, _ in data.splits["test"]}
    assert tuned and tested and not tuned & tested
    assert not protocol.tuned.splits["test"] and not any(data.splits["train"] for data in protocol.tested.values())


def test_test_sets_of_each_protocol():
    protocol = ALL["base_to_novel"]()
    assert protocol.tuned.classes == protocol.tested["base"].classes == ("a", "b", "c")
    assert protocol.tested["novel"].classes == ("d", "e")
    assert list(ALL["cross_dataset"]().tested) == ["toys", "pets"]
    assert list(ALL["domain_generalization"]().tested) == ["toys", "dim", "some"]
    digests = {protocols.few_shot(example_set(), shots, seed).digest for shots in protocols.SHOTS for seed in (1, 2, 3)}
    assert len(digests) == 15


def changed(tmp_path, change):
    values = json.loads(ALL["base_to_novel"]().to_json())
    change(values)
    (tmp_path / "p.json").write_text(json.dumps(values))
    return read_protocol(tmp_path / "p.json", {"toys": tmp_path})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: v["tested"]["novel"]["splits"]["test"].pop(), "since it was edited"),
        (lambda v: v["tuned"].update(name="others"), "names others, expected the folder of its images in roots"),
        (lambda v: v["tuned"].pop("splits"), "is no protocol"),
        (lambda v: v["tuned"]["splits"]["train"][0].__setitem__(0, "../x.png"), "leaves its folder"),
        (lambda v: v["tuned"]["splits"].update(train=v["tested"]["base"]["splits"]["test"]), "tuned on and tested on"),
    ],
)
def test_changed_files_are_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        changed(tmp_path, change)


def test_links_out_of_a_root_are_refused(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    outside.mkdir()
    root.mkdir()
    (root / "a").symlink_to(outside)
    (tmp_path / "p.json").write_text(ALL["few_shot"]().to_json())
    with pytest.raises(UserError, match=r"the image path 'a/.*' of toys leaves"):
        read_protocol(tmp_path / "p.json", {"toys": root})


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: protocols.domain_generalization(example_set(), {"x": renamed("x", "az")}, 1, 0),
            "1 classes that toys",
        ),
        (lambda: protocols.cross_dataset(example_set(), {}, 1, 0), "expected one or more by other names"),
        (lambda: protocols.cross_dataset(example_set(), {"toys": renamed("x")}, 1, 0), "by other names"),
        (lambda: protocols.few_shot(example_set({"train": (1, 1)}, "ab"), 1, 0), "no test images"),
        (
            lambda: Protocol(
                "few_shot",
                FewShot("toys", "x", ("a",), {"train": [Example("1", 0)]}),
                {"test": FewShot("toys", "x", ("a",), {"test": [Example("1", 0)]})},
            ),
            "1 of toys is tuned on and tested on",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(UserError, match=message):
        make()
