"""Trains a SigLIP on captions of synthetic scenes: images and texts as vectors of one space.

    python train.py --config=configs/siglip.py

The tiny model starts from the vision tower of the tiny PaliGemma that ships with the package
(`--config.init.vision=None` starts from nothing, and takes longer). The workdir gets retrieval and zero-shot scores,
similarity.png (captions against images) and neighbours.png (what is found for a caption). `:clip` trains with the
softmax loss, `:smoke` and `:clip,smoke` for seconds. `:mini` trains the smaller one that ships with the package
("tiny-siglip"), with a locked tower, in some two minutes.

`:b16` is a SigLIP B/16 from nothing, on your own captions, by the recipe of Zhai et al. 2023:

    python train.py --config=configs/siglip.py:b16 --config.data.source=my_captions --config.tokenizer=FOLDER

where my_captions/train.jsonl and validation.jsonl hold {"image": PATH, "caption": TEXT} a line, and FOLDER is that of a
released SigLIP. `--config.data.name=tfds` reads what TFDS has prepared (docs/contrastive.md).
"""

from ml_collections import ConfigDict

from train_jax.config import base_config, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """The config; arg "clip", "mini", "b16", "smoke" or some of them."""
    arg = parse_arg(arg, clip=False, mini=False, b16=False, smoke=False)
    config = base_config("paligemma_jax.tasks.contrastive:Contrastive")
    config.init.vision = "tiny"
    config.total_steps = 1000
    config.batch_size = 64
    config.init.bias = -4.0  # near -log(batch_size); the paper's -10 is for batches of 32,768
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50
    config.optimizer.b2 = 0.95
    # 1e-4 in big_vision's sense, which is not multiplied by the rate: 1e-4 / 1e-3 in AdamW's.
    config.optimizer.weight_decay = 0.1
    config.optimizer.weight_decay_mask = r".*/(kernel|embedding)"  # not the scale, the bias and norms
    config.optimizer.grad_clip_norm = 1.0
    config.log_steps = 20
    config.eval_steps = 250
    config.checkpoint_steps = 250
    if arg.b16:
        b16(config)
    if arg.mini:
        mini(config)
    if arg.clip:
        config.loss.name = "softmax"
        config.init.scale = 1 / 0.07
    if arg.smoke:
        config.total_steps, config.eval_steps, config.checkpoint_steps, config.log_steps = 4, 2, 4, 2
        config.optimizer.warmup_steps = 1
        config.data.num_scenes, config.data.num_held_out = 64, 12
    return config


def mini(config: ConfigDict) -> None:
    """A pooling head and a small text tower beside the tiny PaliGemma's tower, which is locked: LiT."""
    config.model.variant = "mini"
    config.trainable = r"(image_head|text).*|logit_.*"
    config.cache_features = True
    config.data.num_scenes, config.data.views, config.data.text_length = 8000, 1000, 32
    config.batch_size, config.total_steps = 256, 2000
    config.init.bias = -5.5
    config.eval_steps = config.checkpoint_steps = 1000


def b16(config: ConfigDict) -> None:
    """The paper's recipe; the weight decay above is its 1e-4 too."""
    config.model.variant, config.model.remat, config.model.unroll = "siglip-b16-224", "block", False
    config.init.vision, config.init.scale, config.init.bias = None, 10.0, -10.0
    config.compute_dtype = "bfloat16"
    config.data.name, config.data.views, config.data.text_length = "jsonl", 1, 64
    config.batch_size = 32_768
    config.embed_micro_batch = 4096  # on all devices together: a third more computing for an eighth of the activations
    config.total_steps = 274_658  # 9 billion pairs
    config.optimizer.warmup_steps = 10_000  # ours; schedule "rsqrt" knows no end, for runs that may go on
    config.log_steps, config.eval_steps, config.checkpoint_steps = 100, 5000, 5000
