"""Text to image in miniature: a flow of 32 x 32 images of single objects, conditioned on attributes or captions.

    python train.py --config=configs/flow_clevr.py
    python train.py --config=configs/flow_clevr.py:captions

The first flow is conditioned on attributes (size, color, material, shape). The second is conditioned on captions such
as "a small red metal cube", encoded as a vector by the text tower of a SigLIP: the "tiny-siglip" that ships with the
package, or another, `--config.siglip=PATH`.

The workdir gets samples.png, captions.png (each sample under its text and beside a real image) and flow.png. In
eval.json, the SigLIP's zero-shot accuracy says how often samples, and real images, show what their text asks for.

    :captions    conditions on captions
    :dit         trains a transformer instead of a U-Net: half the time for a step on a CPU, but a larger loss after the
                 same time
    :smoke       takes seconds; also `:captions,smoke`

    python predict.py --workdir=runs/flow_clevr-captions --prompt="a small red metal cube"

writes an image of the prompt as a PNG.
"""

from ml_collections import ConfigDict

from train_jax.config import base_config, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; arg is "captions", "dit", "smoke", or several of them joined by commas."""
    arg = parse_arg(arg, captions=False, dit=False, smoke=False)
    config = base_config("paligemma_jax.tasks.text_to_image:TextToImage")
    config.conditioning = "captions" if arg.captions else "attributes"
    config.siglip = "tiny-siglip"
    config.times = "stratified"
    config.model.name = "dit" if arg.dit else "unet"
    config.model.dit.patch_size = 4
    config.model.unet.width, config.model.unet.multipliers = 32, (1, 2, 2)
    config.model.unet.attention = (8,)
    config.total_steps = 2400
    config.batch_size = 32
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.ema_decay = 0.999
    config.log_steps = 50
    config.eval_steps = 800
    config.checkpoint_steps = 400
    # Evaluation takes four minutes on two cores. A solver of fixed steps is faster but cannot compute likelihoods.
    config.eval.num_samples, config.eval.likelihood_examples = 200, 16
    if arg.smoke:
        config.total_steps, config.eval_steps, config.checkpoint_steps, config.log_steps = 4, 2, 4, 2
        config.optimizer.warmup_steps, config.batch_size = 1, 8
        config.data.num_scenes, config.data.num_held_out = 32, 8
        config.model.unet.width, config.model.unet.head_width = 16, 16
        config.model.dit.width, config.model.dit.depth = 32, 2
        config.eval.solver, config.eval.num_steps, config.eval.num_samples = "euler", 4, 8
        config.eval.likelihood_examples, config.eval.validation_samples = 4, 8
    return config
