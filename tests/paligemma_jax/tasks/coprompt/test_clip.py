"""Few-shot tuning of a CLIP: its texts have a mask, and prompts replace their first tokens."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from paligemma_jax import weights
from paligemma_jax.losses.coprompt import coprompt_loss
from paligemma_jax.models.dual_encoder import DualEncoder
from paligemma_jax.models.variants import variant
from paligemma_jax.tasks.coprompt.task import CoPrompt
from tests.paligemma_jax.mini import config_of
from tests.paligemma_jax.tasks.coprompt.test_task import CLASSES, CONFIG, IMAGES, batch_of, class_folders, tokens_of
from train_jax.core import param_tree
from train_jax.core.errors import UserError
from train_jax.parallel import sharding

pytestmark = pytest.mark.usefixtures("fast_compilation")


@pytest.fixture(scope="module")
def options(make_random, golden, tmp_path_factory):
    """Of `:clip_b16` with a model of one layer a tower and the golden tokenizer."""
    root = tmp_path_factory.mktemp("clip")
    sizes = dict(width=16, depth=1, mlp_dim=24, num_heads=2)
    text = sizes | {"vocab_size": 607, "length": 20, "eos_token": 606}
    config = variant("clip-b32-224").replace(
        vision=sizes | {"image_size": 32, "patch_size": 16}, text=text, embed_dim=8
    )
    config = dataclasses.replace(config, preprocessing=dataclasses.replace(config.preprocessing, size=32))
    model = make_random(nnx.eval_shape(lambda: DualEncoder(config, rngs=nnx.Rngs(0))))
    weights.save_hugging_face(model, root / "model", golden / "text_tokenizers/clip")
    class_folders(root / "toys", CLASSES)
    (root / "toys.json").write_text(json.dumps({name: [f"one {name}", f"it is a {name}."] for name in CLASSES}))
    places = {"data.source": str(root / "toys"), "data.descriptions": str(root / "toys.json")}
    return {"model.path": str(root / "model"), "mesh.data": 1, "shots": 2, "data.threads": 0} | places


def task_of(options, **changes):
    config = config_of(options | changes, f"{CONFIG}:clip_b16")
    return CoPrompt(config, sharding.make_mesh(config.mesh))


def test_the_loss_reads_texts_by_their_mask(options):
    """`coprompt_loss` with descriptions that are encoded in the step; the plan has a mask of the same shape."""
    task = task_of(options)
    batch, model = batch_of(task), task.init_for_training()
    tokens, mask = tokens_of(task.tokenizer, [f"a photo of a {name}." for name in task.protocol.tuned.classes])
    np.testing.assert_array_equal(task.class_texts.tokens, tokens)
    np.testing.assert_array_equal(task.class_texts.mask, mask)
    assert 0 < mask.sum(1).min() < mask.sum(1).max() < mask.shape[1]
    place = int(float(batch["draw"][0]) * 2)
    chosen = [(f"one {name}", f"it is a {name}.")[place] for name in task.protocol.tuned.classes]
    rows = {"tokens": tokens, "text_mask": mask, "labels": batch["label"]}
    rows |= dict(zip(("descriptions", "description_mask"), tokens_of(task.tokenizer, chosen), strict=True))
    normalize = model.config.preprocessing.normalize
    rows |= {ours: normalize(batch[name]) for name, ours in IMAGES.items()}
    expected, parts = jax.jit(lambda model, rows: coprompt_loss(model, rows, 1.0))(model, rows)
    assert min(parts["text"], parts["image"]) > 1e-3
    loss, _ = jax.jit(lambda model, batch: task.loss(model, batch, None))(model, batch)
    np.testing.assert_allclose(loss / task.normalizer(batch), expected, rtol=1e-5)
    planned = param_tree.abstract(CoPrompt.blueprint(task.config, task.mesh).model)
    assert planned["class_texts/mask"].shape == mask.shape and planned["class_texts/tokens"].shape == tokens.shape


@pytest.mark.parametrize("template", ["{} in a photo.", "a {}."])
def test_prompts_that_would_replace_class_names_are_refused(options, template):
    """By training and by an evaluation alike, before either computes."""
    task, sentence = (
        task_of(options, template=template),
        r"text \d ends or differs .* its first 2 tokens, which 2 prompts",
    )
    with pytest.raises(UserError, match=sentence):
        task.train_source()
    with pytest.raises(UserError, match=sentence):
        task.validate(task.init())
    plain = task_of(options, template=template, method="zero_shot")  # without prompts nothing is replaced
    assert plain.class_texts.frozen is None
