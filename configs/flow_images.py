"""Flow matching of images: the settings of Lipman et al. 2023 (table 3), and torchcfm's for CIFAR-10.

    python train.py --config=configs/flow_images.py:cifar10 --config.data.folder=~/tensorflow_datasets/cifar10/3.0.2

`:cifar10`, `:imagenet32`, `:imagenet64`, `:imagenet128` are the table's columns: conditional-OT path, independent
coupling, no labels. `:torchcfm` is the recipe of torchcfm's examples/images/cifar10 for the same data;
`:torchcfm,coupling=exact` couples by optimal transport. `:smoke` needs no data and takes seconds: a small model on
made-up pictures.

Data, as array_record (docs/flow.md says how to prepare them), by data.folder:
  cifar10, torchcfm     ~/tensorflow_datasets/cifar10/3.0.2
  imagenet32, 64        ~/tensorflow_datasets/imagenet_resized/32x32/0.1.0 and 64x64/0.1.0
  imagenet128           ~/tensorflow_datasets/imagenet2012/5.1.0, cut and shrunk when read
Folders of picture files instead: --config.data.name=folder --config.data.folder=DIR [--config.data.held_out_folder=DIR]

Memory: `python -m train_jax.plan --config=configs/flow_images.py:cifar10 --devices=1` plans 61.5 GiB for the whole
batch of 256 on one device, 2.6 GiB of them parameters, average and moments.
"""

from ml_collections import ConfigDict

from train_jax.config import base_config, parse_arg
from train_jax.core.errors import UserError

TFDS = "~/tensorflow_datasets/"
FINAL_RATE = 1e-8  # of the table's polynomial decay, of power 1, which its warm-up starts from too (ours: from 0)

# Table 3: data, shape of the model, batch, iterations, rate, warm-up (None: a constant rate), precision.
TABLE = {
    "cifar10": dict(
        folder="cifar10/3.0.2",
        held_out="test",
        size=32,
        model=dict(width=256, num_blocks=2, multipliers=(1, 2, 2, 2), attention=(16,)),
        batch=256,
        steps=391_000,
        rate=5e-4,
        warmup=45_000,
    ),
    "imagenet32": dict(
        folder="imagenet_resized/32x32/0.1.0",
        held_out="validation",
        size=32,
        model=dict(width=256, num_blocks=3, multipliers=(1, 2, 2, 2), attention=(16, 8)),
        batch=1024,
        steps=250_000,
        rate=1e-4,
        warmup=20_000,
    ),
    "imagenet64": dict(
        folder="imagenet_resized/64x64/0.1.0",
        held_out="validation",
        size=64,
        model=dict(width=192, num_blocks=3, multipliers=(1, 2, 3, 4), attention=(32, 16, 8)),
        batch=2048,
        steps=157_000,
        rate=1e-4,
        warmup=None,
        dtype="bfloat16",
    ),
    "imagenet128": dict(
        folder="imagenet2012/5.1.0",
        held_out="validation",
        size=128,
        model=dict(width=256, num_blocks=3, multipliers=(1, 1, 2, 3, 4), attention=(32, 16, 8)),
        batch=1536,
        steps=500_000,
        rate=1e-4,
        warmup=20_000,
        dtype="bfloat16",
    ),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The config; arg one of the variants, cifar10 if none is given, and `coupling` beside torchcfm."""
    names = (*TABLE, "torchcfm", "smoke")
    arg = parse_arg(arg, **dict.fromkeys(names, False), coupling="independent")
    chosen = [name for name in names if arg[name]] or ["cifar10"]
    if len(chosen) > 1:
        raise UserError(
            f"config arguments {' and '.join(chosen)} exclude each other, expected one of them: leave one out."
        )
    if arg.coupling != "independent" and not arg.torchcfm:
        raise UserError(f"config argument coupling={arg.coupling} needs torchcfm: add it, or leave it out.")
    config = base_config("flow_jax.tasks.images:ImageFlow")
    config.data.conditional = False
    if arg.smoke:
        return _smoke(config)
    column = TABLE["cifar10" if arg.torchcfm else chosen[0]]
    _data(config, column)
    _schedule(config)
    if arg.torchcfm:
        return _torchcfm(config, arg.coupling)
    return _table(config, column)


def _data(config: ConfigDict, column: dict) -> None:
    data = config.data
    data.name, data.folder, data.held_out = "tfds", TFDS + column["folder"], column["held_out"]
    data.image_size = column["size"]


def _schedule(config: ConfigDict) -> None:
    """How often, and what is measured."""
    config.log_steps, config.eval_steps, config.checkpoint_steps = 100, 10_000, 5_000
    config.eval.num_samples, config.eval.validation_samples, config.eval.batch_size = 10_000, 2_000, 250
    config.eval.tolerance = 1e-5
    config.eval.likelihood_examples = 500


def _table(config: ConfigDict, column: dict) -> ConfigDict:
    config.model.unet.head_width = 64
    for key, value in column["model"].items():
        config.model.unet[key] = value
    config.batch_size, config.total_steps = column["batch"], column["steps"]
    optimizer = config.optimizer
    optimizer.name, optimizer.learning_rate = "adam", column["rate"]
    if column["warmup"] is not None:
        optimizer.schedule, optimizer.warmup_steps = "linear", column["warmup"]
        optimizer.end_factor = FINAL_RATE / column["rate"]
    config.compute_dtype = column.get("dtype", "float32")
    config.ema_decay = 0.9999  # not in the table: that of ADM, whose model this is
    return config


def _torchcfm(config: ConfigDict, coupling: str) -> ConfigDict:
    config.model.unet.width, config.model.unet.num_blocks = 128, 2
    config.model.unet.multipliers, config.model.unet.attention = (1, 2, 2, 2), (16,)
    config.model.unet.head_width, config.model.dropout = 64, 0.1
    config.data.flip, config.data.dequantize = True, False
    config.coupling.name = coupling
    config.batch_size, config.total_steps, config.ema_decay = 128, 400_000, 0.9999
    optimizer = config.optimizer
    optimizer.name, optimizer.learning_rate, optimizer.warmup_steps = "adam", 2e-4, 5_000
    optimizer.grad_clip_norm = 1.0
    return config


def _smoke(config: ConfigDict) -> ConfigDict:
    config.data.name, config.data.image_size, config.data.conditional, config.data.flip = "shapes", 16, True, True
    config.coupling.name = "exact"
    unet = config.model.unet
    unet.width, unet.head_width, unet.multipliers, unet.attention = 16, 16, (1, 2), (8,)
    config.batch_size, config.total_steps, config.ema_decay = 32, 4, 0.999
    config.log_steps, config.eval_steps, config.checkpoint_steps = 2, 2, 2
    config.eval.solver, config.eval.num_steps, config.eval.batch_size = "euler", 4, 50
    config.eval.num_samples, config.eval.validation_samples, config.eval.likelihood_examples = 100, 50, 4
    return config
