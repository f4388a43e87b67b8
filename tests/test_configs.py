"""Every config in configs/: valid with each of its arguments; the reference settings; the tables of docs/config.md."""

from pathlib import Path

import pytest

from paligemma_jax.adapt.few_shot.methods import few_shot_method
from paligemma_jax.adapt.few_shot.prompt_config import PromptConfig
from paligemma_jax.models.paligemma import variant
from paligemma_jax.models.variants import variant as variant_of_dual
from paligemma_jax.tasks.contrastive import config as contrastive_config
from paligemma_jax.tasks.coprompt import config as coprompt_config
from paligemma_jax.tasks.vqa import config as vqa_config
from paligemma_jax.tasks.vqa.adapter_config import PRESETS
from paligemma_jax.tasks.vqa.task import VQA
from train_jax.config import command_line
from train_jax.config.__main__ import key_table, task_table
from train_jax.config.base import leaves, steps
from train_jax.config.run_keys import RunKeys
from train_jax.config.validate import validate
from train_jax.core import param_tree, patterns
from train_jax.core.config_keys import declared
from train_jax.core.errors import UserError
from train_jax.parallel.sharding import make_mesh
from train_jax.sweep import run as sweep
from train_jax.task import make_task

ROOT = Path(__file__).parents[1]
ARGUMENTS = {
    "clevr": (
        *("", "smoke", "full", "report", "report,smoke"),
        *("3b", "3b,fp16", "3b,qlora", "3b,int8", "3b,full", "3b,report"),
        *(f"{model}peft={name}" for model in ("", "3b,", "3b,fp16,") for name in PRESETS),
    ),
    "clevr_ranks": ("", "3b", "smoke"),
    "clevr_peft": ("", "smoke"),
    "clevr_forgetting": ("",),
    "coprompt": ("", "turned", "smoke", "clip_b16", "clip_b16,dataset=oxford_pets"),
    "coprompt_methods": ("", "turned", "clip_b16,dataset=oxford_pets"),
    "coprompt_ablations": ("", "clip_b16"),
    "coprompt_shots": ("", "clip_b16"),
    "coprompt_domain": ("", "turned"),
    "flow_clevr": ("", "captions", "dit", "smoke", "captions,smoke"),
    "flow_digits": ("", "dit", "smoke", "dit,smoke"),
    "flow_images": (
        "",
        "cifar10",
        "imagenet32",
        "imagenet64",
        "imagenet128",
        "torchcfm",
        "torchcfm,coupling=exact",
        "smoke",
    ),
    "flow_paths": ("", "sigma_min"),
    "flow_2d": ("", "moons", "8gaussians_to_moons"),
    "own_data": ("",),
    "pretrain": ("", "vision", "smoke", "vision,smoke"),
    "siglip_batch_size": ("", "quick", "full"),
    "siglip_learning_rates": ("", "quick"),
    "siglip_memory": ("",),
    "siglip_bias": ("", "quick"),
    "siglip_negatives": ("",),
    "siglip_noise": ("",),
    "siglip": ("", "clip", "mini", "b16", "smoke", "clip,smoke"),
}
CASES = [(name, argument) for name, arguments in ARGUMENTS.items() for argument in arguments]


def load(name, argument=""):
    return command_line.load_config(f"{ROOT / 'configs'}/{name}.py" + (f":{argument}" if argument else ""))


def one_device(config):
    with config.unlocked():
        config.mesh.data = 1
    return config


CHECKS = {
    "paligemma_jax.tasks.vqa:VQA": vqa_config.check,
    "paligemma_jax.tasks.contrastive:Contrastive": contrastive_config.check,
    "paligemma_jax.tasks.coprompt:CoPrompt": coprompt_config.check,
}
"""What tasks check that need a checkpoint to be made; all others are made."""


def check(config):
    """All checks of a config that need neither data nor a checkpoint."""
    validate(one_device(config))
    CHECKS.get(config.task, lambda config: make_task(config, make_mesh(config.mesh)))(config)


def test_no_config_is_forgotten():
    assert {file.stem for file in (ROOT / "configs").glob("*.py")} == set(ARGUMENTS)


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_every_config_is_valid_with_every_argument(name, argument):
    config = load(name, argument)
    if argument.startswith(("clip_b16", "b16", "full")):  # whose data are a user's
        config.data.update({key: "." for key in ("source", "descriptions") if key in config.data})
    check(config)
    for run in sweep.expand(config) if config.sweep.runs else ():
        CHECKS.get(run.config.task, validate)(run.config)
    docstring = (ROOT / f"configs/{name}.py").read_text(encoding="utf-8").split('"""')[1]
    words = argument.replace("=", ",").split(",")
    assert f":{words[0]}" in docstring and all(word in docstring for word in words)


@pytest.mark.parametrize("argument", ["3b,report", "report"])
def test_the_settings_of_the_report(argument):
    """Its table, row by row."""
    config = load("clevr", argument)
    expected = {
        "compute_dtype": "float16",  # whose loss is scaled: train_jax/step/train_state.py
        "model.quantize": "int8",
        "model.quantize_double": False,
        "adapter.name": "lora",
        "adapter.rank": 8,
        "adapter.alpha": 32.0,
        "adapter.dropout": 0.1,
        "adapter.rslora": False,
        "adapter.dora": False,
        "optimizer.name": "adamw_8bit",
        "optimizer.learning_rate": 2e-5,
        "optimizer.weight_decay": 0.01,
        "optimizer.weight_decay_mask": None,
        "batch_size": 4,
        "micro_batch": 2,
        "total_steps": None,
        "total_epochs": 1.0,
        "total_examples": None,
        "eval_epochs": 1.0,
        "checkpoint_epochs": 1.0,
        "patience": 2,
        "load_best_at_end": True,
        "best_metric": "loss",
        "best_mode": "min",
    }
    result = leaves(config)
    assert {key: result[key] for key in expected} == expected
    assert config.batch_size // config.micro_batch == 2  # accumulation
    epoch = {"batch_size": config.batch_size, "epoch_examples": 6650}
    total = steps(config, "total", **epoch)
    assert total == steps(config, "eval", **epoch) == steps(config, "checkpoint", **epoch) == 1662


# Of a large model: the reference settings beside the settings that any model can have.
LARGE = {
    "model.path": "paligemma-3b-pt-224",
    "data.name": "clevr",
    "data.fraction": 0.01,
    "data.subset_seed": 42,
    "data.prefix_length": 128,
    "data.suffix_length": 384,
    "eval.max_new_tokens": 384,
    "eval.batch_size": 4,
    "log_steps": 10,
}


@pytest.mark.parametrize(("argument", "dtype"), [("3b", "bfloat16"), ("3b,fp16", "float16"), ("3b,report", "float16")])
def test_the_large_model_has_the_reports_data_and_lengths(argument, dtype):
    result = leaves(load("clevr", argument))
    assert {key: result[key] for key in LARGE} == LARGE and result["compute_dtype"] == dtype


def test_3b_differs_from_the_report_in_what_it_rounds_adapts_and_chooses_by():
    """`:3b,report` has the reference settings; `:3b` the same on a base that is not quantised, with our defaults."""
    plain, report = (leaves(load("clevr", argument)) for argument in ("3b,fp16", "3b,report"))
    assert {key: (plain[key], value) for key, value in report.items() if plain[key] != value} == {
        "model.quantize": ("", "int8"),
        "model.param_dtype": (None, "float16"),
        "adapter.targets": (None, r".*/(q_proj|o_proj)"),
        "optimizer.name": ("adamw", "adamw_8bit"),
        "best_metric": ("accuracy", "loss"),
        "best_mode": ("max", "min"),
    }


@pytest.mark.parametrize(
    ("argument", "number"), [("3b,report", 1_677_312), ("3b", 1_179_648), ("3b,int8", 1_179_648), ("report", 33_792)]
)
def test_how_many_parameters_the_report_trains(argument, number):
    """q_proj and o_proj by suffix: the decoder's and the tower's q_proj, whose output is an out_proj."""
    config = one_device(load("clevr", argument))
    blueprint = VQA.blueprint(config, make_mesh(config.mesh))
    trained = patterns.select(blueprint.task.trainable(), param_tree.abstract(blueprint.model), what="adapters")
    assert sum(param_tree.abstract(blueprint.model)[path].size for path in trained) == number
    assert not [path for path in trained if "out_proj" in path]


def test_full_fine_tuning_of_the_large_model():
    plain, full = leaves(load("clevr", "3b")), leaves(load("clevr", "3b,full"))
    assert {key: value for key, value in full.items() if plain[key] != value} == {
        "adapter.name": "none",
        "optimizer.learning_rate": 1e-5,
    }
    assert full == leaves(load("clevr", "3b,peft=full"))
    config, _, _ = command_line.load_from_flags(
        ["", f"--config={ROOT}/configs/clevr.py:3b", "--config.adapter.name=none"], ""
    )
    check(config)


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        (
            "3b,report,qlora",
            "report and qlora exclude each other, expected one: the reference settings are fixed",
        ),
        ("report,peft=dora", "report and peft exclude each other"),
        ("3b,full,peft=dora", "full and peft exclude each other"),
        ("fp16", "'fp16' needs 3b: write :3b,fp16"),
        ("ranks", "'ranks' is now a config of its own: write --config=configs/clevr_ranks.py$"),
        ("3b,ranks", "write --config=configs/clevr_ranks.py; its docstring says whether it takes 3b too$"),
        ("family", "write --config=configs/clevr_peft.py$"),
        ("forgetting", "write --config=configs/clevr_forgetting.py$"),
    ],
)
def test_arguments_of_clevr_that_are_refused(argument, sentence):
    with pytest.raises(UserError, match=sentence):
        load("clevr", argument)


# CoPrompt's released code at a2a6c12: prompts a layer, layers, lambda and epochs.
COPROMPT = {
    "caltech101": (4, 12, 4.0, 8.0),
    "dtd": (2, 12, 8.0, 8.0),
    "eurosat": (2, 12, 0.1, 8.0),
    "fgvc_aircraft": (4, 9, 2.0, 8.0),
    "food101": (4, 9, 0.5, 5.0),
    "imagenet": (4, 12, 8.0, 8.0),
    "oxford_flowers": (4, 9, 8.0, 8.0),
    "oxford_pets": (2, 12, 0.1, 8.0),
    "stanford_cars": (4, 12, 4.0, 8.0),
    "sun397": (4, 12, 8.0, 8.0),
    "ucf101": (4, 12, 2.0, 8.0),
}


@pytest.mark.parametrize("dataset", [None, *COPROMPT])
def test_the_settings_of_coprompts_released_code(dataset):
    """Of its yaml and of Dassl's defaults, and what it sets for a data set; docs/coprompt.md says the same."""
    config = load("coprompt", "clip_b16" + (f",dataset={dataset}" if dataset else ""))
    expected = {
        "model.path": "hf://openai/clip-vit-base-patch16",
        "method": "coprompt",
        "template": "a photo of a {}.",
        "init_words": "a photo of a",
        "consistency.kind": "cosine",
        "consistency.on": "both",
        "consistency.perturb": True,
        "protocol": "base_to_novel",
        "shots": 16,
        "batch_size": 4,
        "optimizer.name": "sgd",
        "optimizer.learning_rate": 0.0035,
        "optimizer.momentum": 0.9,
        "optimizer.weight_decay": 5e-3,
        "optimizer.schedule": "cosine",
        "optimizer.warmup_epochs": 1.0,
        "optimizer.warmup_constant": 1e-5,
        "log_steps": 20,
    }
    result = leaves(config)
    assert {key: result[key] for key in expected} == expected
    method = coprompt_config.method(config, variant_of_dual("clip-b16-224"))
    assert method.prompts == PromptConfig(*COPROMPT.get(dataset, (2,))[:1] * 2, method.prompts.depth, **ADAPTERS)
    row = method.prompts.text_tokens, method.prompts.depth, coprompt_config.weight(config), config.total_epochs
    assert row == COPROMPT.get(dataset, (2, 9, 1.0, 8.0))
    if dataset:
        tokens, depth, weight, epochs = row
        line = f"| `{dataset}` | {tokens} | {depth} | {weight:g} | {epochs:g} |"
        assert line in (ROOT / "docs/coprompt.md").read_text(encoding="utf-8").splitlines()


ADAPTERS = {"text_adapter": 128, "image_adapter": 128, "text_mix": 0.2, "image_mix": 0.1}


@pytest.mark.parametrize(
    ("name", "dataset"), [("methods", ",dataset=caltech101"), ("ablations", ",dataset=caltech101"), ("ablations", "")]
)
def test_settings_of_a_data_set_are_coprompts_alone(name, dataset):
    """Every run of a sweep is valid, and other methods are what they are without the data set."""
    config = load(f"coprompt_{name}", f"clip_b16{dataset}")
    config.data.source = config.data.descriptions = "."
    towers = variant_of_dual("clip-b16-224")
    for run in sweep.expand(one_device(config)):
        coprompt_config.check(run.config)
        result = coprompt_config.method(run.config, towers)
        if run.config.method != "coprompt":
            assert result == few_shot_method(run.config.method)
        elif run.name.startswith("both-"):
            assert float(run.name.split("-")[1]) == coprompt_config.weight(run.config)
            assert result.prompts.depth == (12 if dataset else 9)


def test_a_study_refuses_what_it_sets():
    with pytest.raises(UserError, match="'peft=full': expected one of 3b, fp16, qlora, int8, smoke"):
        load("clevr_ranks", "peft=full")


@pytest.mark.parametrize(
    ("name", "argument"), [("batch_size", ""), ("batch_size", "quick"), ("learning_rates", ""), ("bias", "")]
)
def test_runs_of_large_batches_have_updates_to_warm_up_in(name, argument):
    """The sigmoid loss collapsed at 4,096 with ten: docs/contrastive.md."""
    for run in sweep.expand(one_device(load(f"siglip_{name}", argument))):
        updates = run.config.total_examples // run.config.batch_size
        assert run.config.optimizer.warmup_steps >= min(50, updates // 2), run.name


def test_rates_of_the_batch_size_ablation_are_of_its_grid():
    """The same rates are tried of every loss and batch size; the first seed's runs are those of that sweep."""
    tried, ablation = (sweep.expand(one_device(load(f"siglip_{name}"))) for name in ("learning_rates", "batch_size"))
    rates = {}
    for run in tried:
        key = run.config.loss.name, run.config.batch_size
        rates.setdefault(key, set()).add(run.config.optimizer.learning_rate)
    assert len({frozenset(result) for result in rates.values()}) == 1
    by_name = {run.name: run for run in tried}
    for run in ablation:
        assert run.config.optimizer.learning_rate in rates[run.config.loss.name, run.config.batch_size]
        if run.config.seed == 0:
            assert run.config == by_name[run.name].config


@pytest.mark.parametrize(
    ("name", "argument", "sentence"),
    [
        ("coprompt", "clip_b16,dataset=pets", "dataset=pets has no settings, expected one of caltech101, dtd"),
        ("coprompt", "dataset=dtd", "dataset=dtd needs clip_b16: write :clip_b16,dataset=dtd"),
        ("coprompt", "turned,clip_b16", "turned and clip_b16 exclude each other, expected one: turned changes the run"),
        ("coprompt", "turned,methods", "write --config=configs/coprompt_methods.py; .* whether it takes turned too$"),
        ("coprompt", "shots", "write --config=configs/coprompt_shots.py$"),
        (
            "siglip_batch_size",
            "grid",
            "'grid' is now a config of its own: write --config=configs/siglip_learning_rates.py$",
        ),
        ("siglip_batch_size", "quick,bias", "write --config=configs/siglip_bias.py; .* whether it takes quick too$"),
        ("siglip_batch_size", "full,quick", "quick and full .* expected one: quick shortens the sweep"),
    ],
)
def test_arguments_of_studies_that_are_refused(name, argument, sentence):
    with pytest.raises(UserError, match=sentence):
        load(name, argument)


@pytest.mark.parametrize(("argument", "kind"), [("qlora", "nf4"), ("int8", "int8")])
def test_quantised_bases_change_nothing_but_the_base(argument, kind):
    """They are rounded from the compute dtype, so that a run can be read in another without becoming another model."""
    for run in ("3b", "3b,fp16", "smoke"):
        plain, quantized = leaves(load("clevr", run)), leaves(load("clevr", f"{run},{argument}"))
        changed = {key: value for key, value in quantized.items() if plain[key] != value}
        assert changed == {"model.quantize": kind, "model.param_dtype": plain["compute_dtype"]}
    with pytest.raises(UserError, match="qlora and int8 exclude each other"):
        load("clevr", "3b,qlora,int8")


def test_the_default_of_each_config_is_the_shipped_model():
    for name in ("clevr", "own_data"):
        config = one_device(load(name))
        assert config.model.path == "tiny"
        task = make_task(config, make_mesh(config.mesh))  # which checks its own keys
        task.tokenizer.fits(variant("tiny").decoder.vocab_size)


# Tasks in the order of docs/config.md.
TASKS = (
    "paligemma_jax.tasks.vqa:VQA",
    "paligemma_jax.tasks.contrastive:Contrastive",
    "paligemma_jax.tasks.coprompt:CoPrompt",
    "paligemma_jax.tasks.pretraining:Pretraining",
    "paligemma_jax.tasks.pretraining.vision:VisionPretraining",
    "flow_jax.tasks.images:ImageFlow",
    "flow_jax.tasks.plane:PlaneFlow",
    "paligemma_jax.tasks.text_to_image:TextToImage",
)


def test_the_tables_of_keys_are_those_of_the_declarations():
    """`python -m train_jax.config [TASK]` prints each table of docs/config.md."""
    page = (ROOT / "docs/config.md").read_text(encoding="utf-8")
    assert key_table(declared(RunKeys)) in page
    for task in TASKS:
        assert f"## `{task}`" in page and task_table(task) in page, task
    assert {load(name).task for name in ARGUMENTS} <= set(TASKS)
