"""Few-shot tuning through the runtime: runs from end to end, what each method trains, its loss, what is stored."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paligemma_jax as pg
from paligemma_jax import zero_shot
from paligemma_jax.data.few_shot.class_folders import open_images
from paligemma_jax.data.few_shot.dataset import Example
from paligemma_jax.data.few_shot.protocols import read_protocol
from paligemma_jax.data.synthetic_clevr.attributes import ATTRIBUTES
from paligemma_jax.images.preprocessing import Preprocessing
from paligemma_jax.inference.answer import read_pixels
from paligemma_jax.inference.classify import classify
from paligemma_jax.losses.coprompt import coprompt_loss
from paligemma_jax.models.dual_encoder import DualEncoder
from paligemma_jax.tasks.coprompt import data as coprompt_data
from paligemma_jax.tasks.coprompt import report as coprompt_report
from paligemma_jax.tasks.coprompt.task import ClassTexts, CoPrompt
from tests.paligemma_jax.adapt.few_shot.test_learned_prompts_golden import attached, ours
from tests.paligemma_jax.mini import ROOT, config_of, png, read_lines, save_small_siglip
from tests.train_jax.runs import stored
from train_jax import loop
from train_jax.core import param_tree, patterns
from train_jax.core.errors import UserError
from train_jax.parallel import sharding
from train_jax.plan.planning import plan

pytestmark = pytest.mark.usefixtures("fast_compilation")

CONFIG = str(ROOT / "configs/coprompt.py")
OPTIONS = {
    "data.name": "images",
    "data.style": "plain",
    "data.threads": 0,
    "shots": 2,
    "batch_size": 4,
    "total_steps": 4,
    "log_steps": 1,
    "mesh.data": 1,
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.5,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "prompts.text_adapter": 3,
    "prompts.image_adapter": 3,
}
COLORS = ATTRIBUTES["color"]
CLASSES = ("red", "green ball", "blue", "gray cube", "brown")
CLASSES_SORTED = tuple(sorted(CLASSES))


@pytest.fixture(scope="module")
def folder(make_random, tmp_path_factory):
    return save_small_siglip(make_random, tmp_path_factory.mktemp("siglip") / "model")


def class_folders(root, classes, first=0):
    for number, name in enumerate(classes):
        (root / name.replace(" ", "_")).mkdir(parents=True)
        for index in range(6):
            (root / name.replace(" ", "_") / f"{index}.png").write_bytes(png(first + 6 * number + index))
    return root


@pytest.fixture(scope="module")
def options(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    class_folders(root / "toys", CLASSES)
    sentences = {name: [f"a {name}", f"one {name}", f"the {name} is small"][: 2 + len(name) % 2] for name in CLASSES}
    (root / "toys.json").write_text(json.dumps(sentences))
    places = {"data.source": str(root / "toys"), "data.descriptions": str(root / "toys.json")}
    return {"model.path": str(folder)} | places | OPTIONS


NO_ADAPTERS = {"prompts.text_adapter": None, "prompts.image_adapter": None}


def task_of(options, **changes):
    config = config_of(without(options | changes), CONFIG)
    return CoPrompt(config, sharding.make_mesh(config.mesh))


def tokens_of(tokenizer, texts):
    return tuple(map(jnp.asarray, tokenizer(texts)))


def without(options):
    """No sizes of adapters where a method has none."""
    if options.get("method") not in ("zero_shot", "full"):
        return options
    return {key: value for key, value in options.items() if not key.startswith("prompts.")}


def fit(options, workdir, **changes):
    return loop.fit(config_of(without(options | changes), CONFIG), workdir, "none")


@pytest.fixture(scope="module")
def run(options, tmp_path_factory):
    """A finished run; read-only."""
    workdir = tmp_path_factory.mktemp("runs") / "coprompt"
    fit(options, workdir)
    return workdir


def test_a_run_writes_results_figures_and_its_protocol(run, options):
    results = json.loads((run / "eval.json").read_text())
    base, novel = results["base"], results["novel"]
    assert results["harmonic_mean"] == pytest.approx(2 * base * novel / (base + novel) if base + novel else 0)
    for name in ("confusion", "mistakes"):
        assert (run / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    protocol = read_protocol(run / "protocol.json", {"toys": options["data.source"]})
    assert protocol.tuned.classes == CLASSES_SORTED[:3] and protocol.tested["novel"].classes == CLASSES_SORTED[3:]
    assert protocol.tuned.seed == 0 and len(protocol.tuned.splits["train"]) == 6
    lines = read_lines(run / "predictions.jsonl")
    assert len(lines) == sum(results["examples"].values()) == 10
    for name, value in (("base", base), ("novel", novel)):
        own = [line["class"] == line["predicted"] for line in lines if line["set"] == name]
        assert np.mean(own) == pytest.approx(value)
    logged = read_lines(run / "metrics.jsonl")
    step = next(line for line in logged if "text" in line)
    assert step["loss"] == pytest.approx(step["ce"] + step["text"] + step["image"], rel=1e-5)
    assert any("eval/val_accuracy" in line for line in logged)


def test_an_extended_run_equals_an_uninterrupted_run(run, options, tmp_path):
    """Two steps, then two more: views, draws and order are functions of the step."""
    fit(options, tmp_path / "run", total_steps=2)
    fit(options, tmp_path / "run")
    again, whole = stored(tmp_path / "run", 4), stored(run, 4)
    assert again.keys() == whole.keys()
    for path, array in whole.items():
        np.testing.assert_array_equal(again[path], array, err_msg=path)


def test_the_adapter_on_a_fresh_base_equals_the_run(run, options, folder, tmp_path):
    """Scores and results equal to the bit; without the prompts the run's model is the base to the bit."""
    fresh, trained, base = pg.load(folder, adapter=run / "adapter"), pg.load(run), pg.load(folder)
    task = task_of(options)
    report = coprompt_report.report(fresh, task.tokenizer, task.config.template, task.protocol, tmp_path)
    results = json.loads((run / "eval.json").read_text())
    assert report == {name: results[name] for name in report}
    assert read_lines(tmp_path / "predictions.jsonl") == read_lines(run / "predictions.jsonl")
    data = task.protocol.tested["novel"]
    ours, theirs = (coprompt_report.score(m, task.tokenizer, "a {}", data).scores for m in (fresh, trained))
    np.testing.assert_array_equal(ours, theirs)
    before, after = param_tree.flatten(base), param_tree.flatten(trained)
    assert all(np.array_equal(after[path], array) for path, array in before.items())
    assert set(after) - set(before) == set(param_tree.abstract(trained)) - set(param_tree.abstract(base)) != set()
    pixels = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 24, 24, 3)), jnp.float32)
    tokens, mask = tokens_of(task.tokenizer, ["a red", "a green ball"])
    plain = jax.jit(lambda model: model(pixels, tokens, mask, prompts=False)[:2])
    for ours, theirs in zip(plain(trained), plain(base), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_smoke_run_with_novel_colors_and_other_words(folder, tmp_path):
    """`data.novel` and `data.words` reach the protocol: no novel class has a color of a base class."""
    options = {"model.path": str(folder), "mesh.data": 1, "data.cache_dir": str(tmp_path / "cache"), "data.threads": 0}
    options |= {
        "data.novel": "colors",
        "data.words": "others",
        "data.per_class": "(1, 1, 1)",
        "shots": 1,
        "data.style": "plain",
    }
    results = loop.fit(config_of(options, f"{CONFIG}:smoke"), tmp_path / "run", "none")
    assert results["examples"] == {"base": 48, "novel": 48} and results["step"] == 4
    stored = json.loads((tmp_path / "run/protocol.json").read_text())
    base, novel = stored["tuned"]["classes"], stored["tested"]["novel"]["classes"]
    assert stored["tested"]["base"]["classes"] == base and len(set(base + novel)) == 96
    assert {name.split()[1] for name in base + novel} == {"shiny", "matte"}
    colors = tuple({name.split()[2] for name in half} for half in (base, novel))
    assert colors == (set(COLORS[:4]), set(COLORS[4:]))
    images = [image for image, _ in stored["tuned"]["splits"]["train"]]
    assert len(images) == 48 and {image.split("_")[1] for image in images} == colors[0]


SIZES = {  # of towers of width 16, one layer each, with adapters of 3 units
    "coop": 4 * 16,
    "maple": 2 * 16 + 16 * 16 + 16,
    "adapters": 2 * 2 * 16 * 3,
    "coprompt": 2 * 16 + 16 * 16 + 16 + 2 * 2 * 16 * 3,
}


@pytest.mark.parametrize("method", SIZES)
def test_methods_train_what_they_say(options, method):
    adapters = 3 if method in ("adapters", "coprompt") else 0
    changes = {"prompts.text_adapter": adapters, "prompts.image_adapter": adapters}
    task = task_of(options, method=method, **changes)
    shapes = param_tree.abstract(task.abstract())
    assert sum(shapes[path].size for path in task.trainable_paths()) == SIZES[method]
    assert task.weight == (1.0 if method == "coprompt" else 0.0)
    assert task.train_source() is not None and (task.class_texts.frozen is None) == (method != "coprompt")


def test_zero_shot_is_the_base_and_trains_nothing(options, folder, tmp_path, capsys):
    results = fit(options, tmp_path / "run", method="zero_shot")
    assert results["trainable_parameters"] == results["step"] == 0 and not (tmp_path / "run/checkpoints").exists()
    task = task_of(options, method="zero_shot")
    model = pg.load(folder)
    for name, data in task.protocol.tested.items():
        scores = coprompt_report.score(model, task.tokenizer, "a {}", data)
        assert scores.accuracy == results[name]
        images = [read_pixels(str(data.root / image), model.config.preprocessing) for image, _ in data.splits["test"]]
        expected = zero_shot.zero_shot(model, task.tokenizer, np.stack(images), data.classes, ("a {}",))
        np.testing.assert_allclose(scores.scores, expected, atol=1e-6)
    capsys.readouterr()
    assert fit(options, tmp_path / "run", method="zero_shot") == results
    assert "is complete: nothing trains" in capsys.readouterr().out
    with pytest.raises(UserError, match="method: 'zero_shot' -> 'coop'"):
        fit(options, tmp_path / "run", method="coop", **{"prompts.text_adapter": None, "prompts.image_adapter": None})


def test_full_fine_tuning_changes_the_base(options, folder, tmp_path):
    results = fit(options, tmp_path / "run", method="full", total_steps=1)
    before, after = param_tree.flatten(pg.load(folder)), param_tree.flatten(pg.load(tmp_path / "run"))
    assert results["trainable_parameters"] == sum(array.size for array in before.values())
    assert sum(not np.array_equal(after[path], array) for path, array in before.items()) > len(before) / 2
    assert not (tmp_path / "run/adapter").exists()


# The loss.


def batch_of(task, number=4):
    source = task.train_source()
    return {name: jnp.asarray(rows) for name, rows in source.get_batch(np.arange(number), 5).items() if name != "bad"}


def test_the_loss_equals_the_released_model(options, golden):
    """The released model's loss and gradients, by the task's loss as the runtime differentiates it."""
    case = dict(np.load(golden / "coprompt/case.npz"))
    model = attached(pg.load(golden / "coprompt/base"), case)

    class Prepared(Preprocessing):
        def normalize(self, images):
            return images

    model.config = dataclasses.replace(model.config, preprocessing=Prepared(28))
    task = task_of(options, **{"consistency.weight": float(case["lam"])})
    frozen, C = case["frozen_text"], len(case["tokens"])
    texts = ClassTexts(
        case["tokens"].astype(np.int32), None, np.stack([0 * frozen, frozen], 1), np.full(C, 2, np.int32)
    )
    model = texts.attach_to(model)
    pixels = {ours: jnp.asarray(case[name].transpose(0, 2, 3, 1)) for ours, name in IMAGES.items()}
    B = len(case["labels"])
    batch = pixels | {"label": jnp.asarray(case["labels"], jnp.int32), "weight": jnp.ones(B), "draw": jnp.full(B, 0.7)}
    graph, arrays = param_tree.split(model)
    chosen = {path: arrays[path] for path in patterns.select(task.trainable(), arrays)}

    def loss(chosen):
        return task.loss(param_tree.merge(graph, arrays | chosen), batch, None)[0] / task.normalizer(batch)

    value, gradients = jax.jit(jax.value_and_grad(loss))(chosen)
    np.testing.assert_allclose(value, case["loss"], atol=1e-4)
    expected = ours(case, "grad")
    assert set(gradients) == set(expected)
    for path, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected[path], rtol=1e-3, atol=1e-5, err_msg=path)


IMAGES = {"image": "images", "image_augmented": "images_augmented"}


def test_the_loss_equals_coprompt_loss_in_micro_batches_too(options):
    """Of the good rows: `coprompt_loss` with descriptions encoded in the step, by the base."""
    task = task_of(options, **{"consistency.weight": 2.0, "consistency.kind": "mse"})
    batch, model = batch_of(task), task.init_for_training()
    batch["weight"] = jnp.asarray([1.0, 0.0, 1.0, 1.0])
    parts = [jax.tree.map(lambda rows, at=at: rows[at : at + 2], batch) for at in (0, 2)]
    loss = sum(task.loss(model, part, None)[0] for part in parts) / task.normalizer(batch)
    written = json.loads(Path(options["data.descriptions"]).read_text())
    sentences = [written[name] for name in task.protocol.tuned.classes]
    chosen = [group[int(float(batch["draw"][0]) * len(group))] for group in sentences]
    good, normalize = np.array([0, 2, 3]), model.config.preprocessing.normalize
    tokens, mask = tokens_of(task.tokenizer, [f"a {name}" for name in task.protocol.tuned.classes])
    rows = {"tokens": tokens, "text_mask": mask, "labels": batch["label"][good]}
    rows |= dict(zip(("descriptions", "description_mask"), tokens_of(task.tokenizer, chosen), strict=True))
    rows |= {ours: normalize(batch[name][good]) for name, ours in IMAGES.items()}
    expected, _ = coprompt_loss(model, rows, 2.0, "mse")
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("method", ["coprompt", "full"])
def test_texts_are_arguments_of_the_step_and_are_frozen(options, method):
    """As constants of the program, a thousand classes' sentences would be compiled into it."""
    none = {"prompts.text_adapter": None, "prompts.image_adapter": None} if method == "full" else {}
    task = task_of(options, method=method, **none)
    batch, model = batch_of(task), task.init_for_training()
    graph, arrays = param_tree.split(model)
    held = {path for path in arrays if path.startswith("class_texts/")}
    assert {"class_texts/tokens", "class_texts/lengths"} <= held
    assert ("class_texts/frozen" in held) == (method == "coprompt")
    assert not held & set(patterns.select(task.trainable(), arrays))
    step = jax.make_jaxpr(lambda arrays, batch: task.loss(param_tree.merge(graph, arrays), batch, None))(arrays, batch)
    assert max(np.size(value) for value in step.consts) <= 3  # mean and deviation of the pixels


def test_models_do_not_depend_on_the_order_of_calls(options):
    """Only the model for training has the class texts, whether training data were opened before or not."""
    first, second = task_of(options), task_of(options)
    second.train_source()
    for task in (first, second):
        plain, training = (param_tree.flatten(model) for model in (task.init(), task.init_for_training()))
        assert not any(path.startswith("class_texts/") for path in plain)
        assert {path for path in training if not path.startswith("class_texts/")} == set(plain) != set(training)


def test_without_perturbed_inputs_an_untuned_model_is_consistent(options):
    """The branches are equal where what is attached does nothing; with perturbed inputs they are not."""
    nothing = {"method": "adapters", "prompts.text_mix": 0.0, "prompts.image_mix": 0.0, "consistency.weight": 1.0}
    for perturb in (False, True):
        task = task_of(options, **nothing, **{"consistency.perturb": perturb})
        batch = batch_of(task)
        _, metrics = task.loss(task.init_for_training(), batch, None)
        for side in ("text", "image"):
            assert (float(metrics[side][0]) > 1e-4) == perturb


def test_a_draw_selects_a_sentence_of_every_class():
    table = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    texts = ClassTexts(np.zeros((2, 1), np.int32), None, table, np.array([2, 3], np.int32))
    for draw, places in ((0.0, (0, 0)), (0.4, (0, 1)), (0.99, (1, 2))):
        np.testing.assert_array_equal(texts.frozen_sentences(jnp.float32(draw)), table[np.arange(2), list(places)])


# Protocols, and what is refused.


def test_numbers_of_each_protocol():
    numbers = coprompt_report.summarize("base_to_novel", {"base": 0.8, "novel": 0.4}, "toys")
    assert numbers == {"base": 0.8, "novel": 0.4, "harmonic_mean": pytest.approx(0.64 / 1.2)}
    assert coprompt_report.summarize("few_shot", {"test": 0.5}, "toys") == {"accuracy": 0.5}
    numbers = coprompt_report.summarize("cross_dataset", {"toys": 0.5, "cars": 0.25, "pets": 0.75}, "toys")
    assert numbers == {"source": 0.5, "cars": 0.25, "pets": 0.75, "target_mean": 0.5}


def test_confusion_worked_out():
    scores = np.array([[2, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 3]], np.float32)
    confusion = coprompt_report.confusion(scores, np.array([0, 0, 1, 1], np.int32))
    np.testing.assert_array_equal(confusion[:2], [[0.5, 0.5, 0], [0.5, 0, 0.5]])
    assert np.isnan(confusion[2]).all()


@pytest.mark.parametrize("protocol", ["cross_dataset", "domain_generalization"])
def test_other_sets_are_tested_too(options, tmp_path, protocol):
    names = ("car", "van") if protocol == "cross_dataset" else CLASSES[1:4]
    others = class_folders(tmp_path / "others", names, first=100)
    changes = {"protocol": protocol, "data.targets": repr((str(others),)), "method": "zero_shot"}
    results = fit(options, tmp_path / "run", **changes)
    assert {"source", "others"} <= results.keys() and results["target_mean"] == results["others"]
    stored = json.loads((tmp_path / "run/protocol.json").read_text())
    assert stored["protocol"] == protocol and set(stored["tested"]) == {"toys", "others"}


def test_other_images_in_the_same_workdir_are_refused(run, options, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/eval.json").unlink()
    stored = json.loads((tmp_path / "run/protocol.json").read_text())
    (tmp_path / "run/protocol.json").write_text(json.dumps(stored | {"digest": "0"}))
    with pytest.raises(UserError, match="is of other images .* choose another --workdir"):
        fit(options, tmp_path / "run", total_steps=5)


def test_training_images_of_a_run_are_refused_as_test_images(run, options, tmp_path):
    """An image that is added divides its class anew; the evaluation of the run would then flatter it."""
    shutil.copytree(options["data.source"], tmp_path / "toys")
    shutil.copytree(run, tmp_path / "run")
    changed = without(options | {"data.source": str(tmp_path / "toys")})
    (tmp_path / "toys/brown/+added.png").write_bytes(png(77))
    stored = json.loads((run / "protocol.json").read_text())["tuned"]["splits"]
    tuned = {image for rows in stored.values() for image, _ in rows}
    again = task_of(changed)
    shared = tuned & {image for image, _ in again.protocol.tested["base"].splits["test"]}
    assert shared and not tuned & {image for image, _ in task_of(options).protocol.tested["base"].splits["test"]}
    sentence = rf"of toys \(base\) would be tested .* \(first: {min(shared)}\), .* restore them"
    with pytest.raises(UserError, match=sentence):
        loop.evaluate(again.config, tmp_path / "run")
    assert task_of(changed, method="zero_shot").trainable() is None  # which was tuned on nothing
    (tmp_path / "run/protocol.json").write_text("{")
    with pytest.raises(UserError, match="protocol.json cannot be read as JSON"):
        again.evaluate(again.abstract(), tmp_path / "run")
    (tmp_path / "run/protocol.json").write_text('{"tuned": {}}')
    with pytest.raises(UserError, match="protocol.json is no protocol"):
        again.evaluate(again.abstract(), tmp_path / "run")


def test_a_renamed_training_image_is_recognised(run, options, tmp_path):
    """And other pictures under the names of those tested are other data."""
    shutil.copytree(options["data.source"], tmp_path / "toys")
    changed = options | {"data.source": str(tmp_path / "toys")}
    before = task_of(changed)
    tuned = sorted(image for rows in before.protocol.tuned.splits.values() for image, _ in rows)
    tested = {name: data.splits["test"] for name, data in before.protocol.tested.items()}
    coprompt_data.check_unseen(before.protocol, run)
    moved = tested["base"][0]
    data = before.protocol.tested["base"]
    renamed = dataclasses.replace(data, splits={"test": (Example("copy.png", moved.label), *tested["base"])})
    protocol = dataclasses.replace(before.protocol, tested={**before.protocol.tested, "base": renamed})
    (tmp_path / "toys/copy.png").write_bytes((tmp_path / "toys" / moved.image).read_bytes())
    coprompt_data.check_unseen(protocol, run)
    (tmp_path / "toys/copy.png").write_bytes((tmp_path / "toys" / tuned[0]).read_bytes())
    with pytest.raises(UserError, match=r"1 image.s. of toys .base. would be tested .* .first: copy.png"):
        coprompt_data.check_unseen(protocol, run)


def test_data_of_a_complete_run_are_compared_by_their_bytes(options, tmp_path):
    shutil.copytree(options["data.source"], tmp_path / "toys")
    changed = options | {"data.source": str(tmp_path / "toys")}
    fingerprints = [
        (task_of(each).train_records().fingerprint, task_of(each).reported_data()) for each in (options, changed)
    ]
    assert fingerprints[0] == fingerprints[1]
    for image in (task_of(changed).protocol.tuned.splits["train"][0].image, "tested"):
        if image == "tested":
            image = task_of(changed).protocol.tested["base"].splits["test"][0].image
        (tmp_path / "toys" / image).write_bytes(png(1234))
        fingerprints.append((task_of(changed).train_records().fingerprint, task_of(changed).reported_data()))
    (tuned, tested), (other_tuned, same_tested), (_, other_tested) = fingerprints[1:]
    assert other_tuned != tuned and same_tested == tested and other_tested != tested


def test_other_splits_than_the_test_images_are_refused(run, options):
    for split in ("val", "novel"):
        with pytest.raises(UserError, match=f"split is '{split}', expected 'test', of which results are"):
            loop.evaluate(task_of(options).config, run, split)


@pytest.mark.parametrize("names", [("a/cars", "b/cars"), ("a/cars", "target_mean"), ("examples",), ("a/step",)])
def test_names_of_further_sets_must_be_unique(options, tmp_path, names):
    folders = tuple(str(class_folders(tmp_path / name, ("car", "van"))) for name in names)
    task = task_of(options, protocol="cross_dataset", **{"data.targets": repr(folders)})
    twice = f"data.targets: {folders[-1]} is named 'cars', as another of them is"
    reserved = "a further data set is named .* none of source, target_mean, examples"
    with pytest.raises(UserError, match=twice if names[-1] == "b/cars" else reserved):
        task.protocol  # noqa: B018


def own_images(data, size, progress):
    """Opens the images of `data.source` as a user's own function does."""
    return open_images(data.source)


def no_images(data, size, progress):
    """Opens nothing."""
    return []


def test_data_of_an_own_function(options):
    changes = {"data.name": f"{__name__}:own_images"}
    task = task_of(options, **changes)
    assert task.protocol.digest == task_of(options).protocol.digest
    with pytest.raises(UserError, match="data.descriptions is not set, which the frozen branch reads"):
        task_of(options, **changes | {"data.descriptions": None})
    with pytest.raises(UserError, match="data.name is 'image', expected one of scenes, images, or an import path"):
        task_of(options, **{"data.name": "image"})
    with pytest.raises(UserError, match=r"no_images' returned list, expected a FewShot"):
        task_of(options, **{"data.name": f"{__name__}:no_images"}).protocol  # noqa: B018


@pytest.mark.parametrize("method", ["coprompt", "full"])
def test_the_base_does_not_depend_on_the_order_of_calls(options, method):
    task = task_of(options, method=method)
    before, model, after = task.base(), task.init(), task.base()
    assert type(before) is type(after) is DualEncoder
    first, second, attached = (param_tree.flatten(each) for each in (before, after, model))
    for path, array in first.items():
        np.testing.assert_array_equal(array, second[path], err_msg=path)
        assert (attached[path] is array) == (method == "coprompt"), path


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method": "maples"}, "config.method='maples', expected one of .*; did you mean 'maple'"),
        ({"prompts.depth": 3}, "depth is 3, expected 1 to 1, the layers of its tower"),
        (
            {"prompts.text_tokens": 3, "prompts.vision_tokens": 3, "init_words": "a"},
            r"init_words is \[\d+\], expected 3",
        ),
        (
            {"method": "full", "consistency.weight": 1.0},
            "consistency.weight is 1.0 of method 'full', expected a method",
        ),
        (
            {"method": "coop", "consistency.weight": 1.0, "consistency.on": "image"} | NO_ADAPTERS,
            "consistency.on is 'image' but method 'coop' has neither .* image side, .* set consistency.on=text, or",
        ),
        (
            {"method": "coop", "consistency.weight": 1.0} | NO_ADAPTERS,
            "consistency.on is 'both' but method 'coop' has neither .* image side, .* set consistency.on=text, or",
        ),
        (
            {"prompts.text_tokens": 0, "prompts.coupled": False, "prompts.text_adapter": 0, "consistency.on": "text"},
            "consistency.on is 'text' but method 'coprompt' .* text side, .* set consistency.on=image, or",
        ),
        ({"data.novel": "shapes"}, "config.data.novel='shapes', expected one of combinations, colors, pairings"),
        ({"data.words": "other"}, "config.data.words='other', expected one of captions, others"),
        ({"consistency.on": "images"}, "config.consistency.on='images', expected one of text, image, both"),
        ({"template": "a thing"}, "template is 'a thing', expected one {}"),
        ({"shots": 0}, "config.shots=0, expected 1 or more"),
        ({"data.source": None}, "data.name is 'images' but data.source is not set"),
        ({"data.descriptions": None}, "data.descriptions is not set, which the frozen branch reads"),
        ({"protocol": "cross_dataset"}, r"data.targets is \(\), .* images take targets with cross_dataset and"),
        ({"data.name": "scenes"}, "data.source is .* and data.name is 'scenes', .* set data.name=images, or leave"),
        ({"views.tuned.crop": 0.0}, "config.views.tuned.crop=0.0, expected a number above 0"),
    ],
)
def test_invalid_configs_are_refused(options, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        task_of(options, **changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"protocol": "cross_dataset"}, "protocol is 'cross_dataset' and data.name is 'scenes'"),
        ({"protocol": "domain_generalization"}, r"data.target_styles is \(\), .* take target styles with domain"),
        ({"data.target_styles": "('dim',)"}, r"data.target_styles is \('dim',\), .* with domain_generalization only"),
        (
            {"protocol": "domain_generalization", "data.target_styles": "('dark',)"},
            r"config.data.target_styles holds 'dark', expected some of plain, dim",
        ),
        (
            {"protocol": "domain_generalization", "data.target_styles": "('dim', 'plain')"},
            r"data.target_styles is .* holds data.style='plain', expected styles that",
        ),
        ({"data.per_class": "(1, 1)"}, r"config.data.per_class=\(1, 1\), expected 3 whole numbers"),
    ],
)
def test_invalid_configs_of_synthetic_classes_are_refused(options, changes, sentence):
    scenes = {"data.name": "scenes", "data.source": None, "data.descriptions": None}
    with pytest.raises(UserError, match=sentence):
        task_of(options, **scenes, **changes)


# The run in use, and its plan.


def test_a_run_classifies_with_its_prompts(run, options):
    files = [f"{options['data.source']}/red/{index}.png" for index in range(2)]
    scores = classify(files, ["red", "blue"], model=run)
    model = pg.load(run)
    tokenizer = pg.load_text_tokenizer(run, model.config.text.length)
    pixels = jnp.asarray(np.stack([read_pixels(file, model.config.preprocessing) for file in files]))
    logits = model.logits(*model(pixels, *tokens_of(tokenizer, ["a red", "a blue"]))[:2])
    np.testing.assert_allclose(scores, jax.nn.sigmoid(logits), rtol=1e-5, atol=1e-6)
    base = classify(files, ["red", "blue"], ["a {}"], model=options["model.path"])
    assert np.abs(scores - base).max() > 1e-4


def test_the_plan_has_the_shapes_of_a_batch(options):
    task = task_of(options)
    blueprint = CoPrompt.blueprint(task.config, task.mesh)
    rows = batch_of(task)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in blueprint.example.items()} == {
        name: (array.shape[1:], array.dtype) for name, array in rows.items()
    }
    assert param_tree.abstract(blueprint.model)["class_texts/tokens"].shape == task.class_texts.tokens.shape
    planned = plan(task.config)
    assert [program.name for program in planned.programs] == ["training step", "evaluation: image embeddings"]
    planned = plan(task_of(options, method="zero_shot").config)
    assert [program.name for program in planned.programs] == ["evaluation: image embeddings"]


def test_released_models_are_planned_without_their_files(options):
    changes = {"model.path": "hf://openai/clip-vit-base-patch16", "template": "a photo of a {}."}
    config = config_of(options | changes | {"prompts.text_adapter": None, "prompts.image_adapter": None}, CONFIG)
    blueprint = CoPrompt.blueprint(config, sharding.make_mesh(config.mesh))
    shapes = param_tree.abstract(blueprint.model)
    assert sum(shapes[path].size for path in blueprint.task.trainable_paths()) == 3_817_216
    with pytest.raises(UserError, match="no model at nowhere, and its name is none of clip-vit-base-patch32"):
        with config.unlocked():
            config.model.path = "nowhere"
        CoPrompt.blueprint(config, sharding.make_mesh(config.mesh))
