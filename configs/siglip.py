"""Training of a SigLIP, which embeds images and texts in one space, on captions of synthetic scenes.

    python train.py --config=configs/siglip.py

trains the tiny model, whose vision tower starts from that of the tiny PaliGemma that ships with the package
(`--config.init.vision=None` starts from random weights and takes longer). The workdir gets retrieval and zero-shot
scores, similarity.png (captions against images) and neighbours.png (the images retrieved for a caption).

Arguments, written after a colon and joined by commas:

    :clip     trains with the softmax loss of CLIP
    :mini     trains "tiny-siglip", the smaller model that ships with the package, with its vision tower locked: about
              two minutes
    :b16      trains SigLIP B/16 from random weights on your captions, by the recipe of Zhai et al. 2023
    :smoke    takes seconds; also `:clip,smoke`

For your own captions:

    python train.py --config=configs/siglip.py:b16 --config.data.source=my_captions --config.tokenizer=FOLDER

where a line of my_captions/train.jsonl and validation.jsonl is {"image": PATH, "caption": TEXT}, and FOLDER contains
the tokenizer of a released SigLIP. `--config.data.name=tfds` reads a data set that TFDS has prepared
(docs/contrastive.md).
"""

from ml_collections import ConfigDict

from train_jax.config import base_config, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; arg is "clip", "mini", "b16", "smoke", or several of them joined by commas."""
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
    # The paper's 1e-4. In big_vision it is not multiplied by the rate of 1e-3; in AdamW it is, hence 1e-4 / 1e-3.
    config.optimizer.weight_decay = 0.1
    config.optimizer.weight_decay_mask = r".*/(kernel|embedding)"  # not the scale, the bias or norms
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
    """Sets a pooling head and a small text tower on the tiny PaliGemma's vision tower, which is locked (LiT)."""
    config.model.variant = "mini"
    config.trainable = r"(image_head|text).*|logit_.*"
    config.cache_features = True
    config.data.num_scenes, config.data.views, config.data.text_length = 8000, 1000, 32
    config.batch_size, config.total_steps = 256, 2000
    config.init.bias = -5.5
    config.eval_steps = config.checkpoint_steps = 1000


def b16(config: ConfigDict) -> None:
    """Sets SigLIP B/16 with the paper's recipe."""
    config.model.variant, config.model.remat, config.model.unroll = "siglip-b16-224", "dots", False
    config.init.vision, config.init.scale, config.init.bias = None, 10.0, -10.0
    config.compute_dtype = "bfloat16"
    config.data.name, config.data.views, config.data.text_length = "jsonl", 1, 64
    config.batch_size = 32_768
    config.embed_micro_batch = 2048  # over all devices: a sixteenth of the activations for a third more compute
    config.total_steps = 274_658  # 9 billion pairs
    config.optimizer.warmup_steps = 10_000  # ours; schedule "rsqrt" has no end, for runs to be extended
    config.log_steps, config.eval_steps, config.checkpoint_steps = 100, 5000, 5000
