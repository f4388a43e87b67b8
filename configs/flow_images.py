"""Flow matching of images with the settings of Lipman et al. 2023 (table 3), or those of torchcfm for CIFAR-10.

    python train.py --config=configs/flow_images.py:cifar10 --config.data.folder=~/tensorflow_datasets/cifar10/3.0.2

Arguments, written after a colon:

    :cifar10                     a column of the table: conditional-OT path, independent coupling, no labels (default);
                                 also `:imagenet32`, `:imagenet64` and `:imagenet128`
    :torchcfm                    CIFAR-10 by torchcfm's examples/images/cifar10
    :torchcfm,coupling=exact     the same with minibatch optimal transport
    :smoke                       a small model on made-up images, for seconds; needs no data

`data.folder` is a data set that TFDS has prepared as array_record (docs/flow.md). Its defaults:

    cifar10, torchcfm            ~/tensorflow_datasets/cifar10/3.0.2
    imagenet32                   ~/tensorflow_datasets/imagenet_resized/32x32/0.1.0
    imagenet64                   ~/tensorflow_datasets/imagenet_resized/64x64/0.1.0
    imagenet128                  ~/tensorflow_datasets/imagenet2012/5.1.0, cropped and resized when read

Image files in a folder: --config.data.name=folder --config.data.folder=DIR [--config.data.held_out_folder=DIR]

Memory: `python -m train_jax.plan --config=configs/flow_images.py:cifar10 --devices=1` reports 61.5 GiB for the whole
batch of 256 on one device, of which 2.6 GiB are parameters, their average and the optimizer's moments.
"""

from ml_collections import ConfigDict

from train_jax.config import base_config, parse_arg
from train_jax.core.errors import UserError

TFDS = "~/tensorflow_datasets/"
FINAL_RATE = 1e-8  # of the table's linear decay; its warm-up starts from there too, ours from 0

# The columns of table 3. Warm-up None: the rate is constant.
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
    """Returns the config; arg is described above.

    Raises:
      UserError: an unknown argument, or several that exclude each other.
    """
    names = (*TABLE, "torchcfm", "smoke")
    arg = parse_arg(arg, **dict.fromkeys(names, False), coupling="independent")
    chosen = [name for name in names if arg[name]] or ["cifar10"]
    if len(chosen) > 1:
        raise UserError(f"config arguments {' and '.join(chosen)} exclude each other, expected one: leave one out.")
    if arg.coupling != "independent" and not arg.torchcfm:
        raise UserError(
            f"config argument coupling={arg.coupling} needs torchcfm: write :torchcfm,coupling={arg.coupling}, or set "
            f"--config.coupling.name={arg.coupling}."
        )
    config = base_config("flow_jax.tasks.images:ImageFlow")
    config.data.conditional = False
    if arg.smoke:
        return smoke(config)
    column = TABLE["cifar10" if arg.torchcfm else chosen[0]]
    tfds_data(config, column)
    evaluation(config)
    if arg.torchcfm:
        return torchcfm(config, arg.coupling)
    return table(config, column)


def tfds_data(config: ConfigDict, column: dict) -> None:
    """Sets the data of a column."""
    data = config.data
    data.name, data.folder, data.held_out = "tfds", TFDS + column["folder"], column["held_out"]
    data.image_size = column["size"]


def evaluation(config: ConfigDict) -> None:
    """Sets how often the run logs, evaluates and saves, and on how many images."""
    config.log_steps, config.eval_steps, config.checkpoint_steps = 100, 10_000, 5_000
    config.eval.num_samples, config.eval.validation_samples, config.eval.batch_size = 10_000, 2_000, 250
    config.eval.tolerance = 1e-5
    config.eval.likelihood_examples = 500


def table(config: ConfigDict, column: dict) -> ConfigDict:
    """Sets model, batch and optimizer of a column, and returns the config."""
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
    config.ema_decay = 0.9999  # not in the table: the value of ADM, whose model it uses
    return config


def torchcfm(config: ConfigDict, coupling: str) -> ConfigDict:
    """Sets torchcfm's model, batch and optimizer, and returns the config."""
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


def smoke(config: ConfigDict) -> ConfigDict:
    """Sets a small model on made-up images, and returns the config."""
    config.data.name, config.data.image_size, config.data.conditional, config.data.flip = "shapes", 16, True, True
    config.coupling.name = "exact"
    unet = config.model.unet
    unet.width, unet.head_width, unet.multipliers, unet.attention = 16, 16, (1, 2), (8,)
    config.batch_size, config.total_steps, config.ema_decay = 32, 4, 0.999
    config.log_steps, config.eval_steps, config.checkpoint_steps = 2, 2, 2
    config.eval.solver, config.eval.num_steps, config.eval.batch_size = "euler", 4, 50
    config.eval.num_samples, config.eval.validation_samples, config.eval.likelihood_examples = 100, 50, 4
    return config
