r"""LoRA fine-tuning of PaliGemma on CLEVR questions, evaluated with blind controls.

    python train.py --config=configs/clevr.py

trains the tiny PaliGemma that ships with the package on synthetic CLEVR scenes. It downloads nothing and takes about
2 minutes and 1.1 GiB of memory on 2 CPU cores (README.md has the results). The same model on the real CLEVR, once you
have it (docs/data.md):

    python train.py --config=configs/clevr.py --config.data.name=clevr --config.data.source=CLEVR_v1.0.zip

Arguments, written after a colon and joined by commas:

    :3b           PaliGemma-3B at 224 pixels, LoRA of rank 8 on the decoder's q_proj and o_proj, in bfloat16
    :3b,fp16      computes in float16, with loss scaling
    :3b,qlora     quantizes the base to NF4; `:3b,int8` to int8
    :peft=NAME    another method (docs/peft.md): lora, dora, bottleneck, prefix, prompt, bitfit, diff_pruning,
                  last_layers, decoder, full; `:3b,peft=NAME` too
    :full         trains all weights, as `:peft=full`; `:3b,full` needs a large accelerator or several
    :3b,report    the reference settings: int8, 8-bit AdamW, LoRA in the vision tower too
    :report       the same settings on the tiny model
    :smoke        runs everything in a minute, to show that it works; its scores mean nothing

`:3b` reads CLEVR itself. PaliGemma's weights are gated, so you give their path:

    python train.py --config=configs/clevr.py:3b \
        --config.model.path=paligemma-3b-pt-224 --config.data.source=CLEVR_v1.0.zip

It trains for one epoch on 1 % of the questions and evaluates on 2,000 of the 149,991 validation questions, evenly
spread (`--config.eval.max_examples=None` for all). The 1 % is drawn with seed 42 by our own permutation, not by that of
the `datasets` library, from the 95 % of questions that are not kept for choosing the checkpoint. With random weights,
short answers and `--config.model.remat=block`, training and evaluation took 7.0 GiB of GPU memory, 3.8 with `qlora` and
4.8 with `int8`; by default a step uses more memory to be faster, where it is free (docs/memory.md). No run on the real
CLEVR has been made, so its score is unknown.

`:3b,report` has an int8 base, 8-bit AdamW, float16 with loss scaling, and LoRA on all layers named q_proj or o_proj,
those of the vision tower too (1,677,312 parameters). It accumulates two micro-batches of 2, evaluates and saves after
the epoch, and chooses the checkpoint by loss. All other settings are those of `:3b`. The rate
of 2e-5 is too low for the tiny model to learn much in `:report` (docs/memory.md).

The learning rates of `peft=NAME` were tuned on the tiny model. `:3b,peft=NAME` uses them too, except where weights of
the base train: there it uses 1e-5, as most of PaliGemma's own transfers do.

The third blind control, the same fine-tuning on black images, is a second training run. `:3b` omits it (its score is
null); `--config.eval.question_only=True` adds it. `--config.eval.controls=False` omits all three controls. The second
run shares the frozen weights of the first.

Studies of this run have configs of their own: `clevr_ranks.py`, `clevr_peft.py` and `clevr_forgetting.py`.
"""

from ml_collections import ConfigDict

from paligemma_jax.tasks.vqa.adapter_config import use_method
from train_jax.config import base_config, parse_arg, refuse_together
from train_jax.core.errors import UserError

MOVED = {
    "ranks": "configs/clevr_ranks.py",
    "family": "configs/clevr_peft.py",
    "forgetting": "configs/clevr_forgetting.py",
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; arg is described above.

    Raises:
      UserError: an unknown argument, or two that exclude each other.
    """
    names = ("3b", "report", "fp16", "qlora", "int8", "full", "smoke")
    arg = parse_arg(arg, MOVED, peft="", **dict.fromkeys(names, False))
    refuse_together(arg, ("3b", "smoke"), "smoke shrinks the run of the tiny model")
    refuse_together(arg, ("qlora", "int8"), "the base has one quantization")
    refuse_together(arg, ("full", "peft"), "full is short for peft=full")
    for name in ("qlora", "full", "peft"):
        refuse_together(arg, ("report", name), "the reference settings are fixed")
    if arg.fp16 and not (arg["3b"] or arg.report):
        raise UserError("config argument 'fp16' needs 3b: write :3b,fp16, or --config.compute_dtype=float16.")
    config = base_config("paligemma_jax.tasks.vqa:VQA")
    config.best_metric = "accuracy"
    config.load_best_at_end = True
    config.optimizer.weight_decay = 0.01
    config.optimizer.grad_clip_norm = 1.0
    if arg["3b"]:
        large(config, "float16" if arg.fp16 else "bfloat16")
    else:
        tiny(config)
    if arg.report:
        report(config)
    elif arg.qlora or arg.int8:
        quantized(config, "nf4" if arg.qlora else "int8")
    if arg.peft or arg.full:
        use_method(config, arg.peft or "full", large=arg["3b"])
    if arg.smoke:
        smoke(config)
    return config


def tiny(config: ConfigDict) -> None:
    """Sets the default: the shipped model on synthetic scenes."""
    config.model.remat = "none"  # 2.6 M parameters: recomputing would only cost time
    config.model.unroll = True  # five layers compile quickly, and a step on a CPU is a third faster
    config.cache_features = True  # LoRA leaves the tower frozen: encode each image once
    config.adapter.dropout = 0.0  # one epoch does not overfit; drawing masks takes a third of a step on a CPU
    config.data.num_train_scenes = 400
    config.total_epochs = 1.0
    config.batch_size = 32
    config.optimizer.learning_rate = 3e-3  # high, since the model is small and only adapters train
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_percent = 0.05
    config.log_steps = 10
    config.eval_percent = config.checkpoint_percent = 0.25
    config.data.prefix_length = 44  # the longest question of CLEVR takes 38
    config.data.suffix_length = 3
    config.eval.max_new_tokens = 3


def large(config: ConfigDict, dtype: str) -> None:
    """Sets PaliGemma-3B on CLEVR: data, lengths, batch and rate of the reference settings, without quantisation."""
    config.model.path = "paligemma-3b-pt-224"
    config.compute_dtype = dtype
    config.data.name = "clevr"
    config.data.fraction = 0.01  # about 6,650 questions
    config.data.prefix_length = 128
    config.data.suffix_length = 384
    config.data.on_truncation = "skip"
    config.total_epochs = 1.0
    config.batch_size = 4  # batch 2 x accumulation 2
    config.micro_batch = 2
    config.eval.batch_size = 4
    config.eval.max_examples = 2000  # of 149,991: the standard error of an accuracy is at most 1.1 points
    config.eval.question_only = False  # it would be a second training run
    config.eval.max_new_tokens = 384  # an answer ends at its EOS, so short answers stay cheap
    config.optimizer.learning_rate = 2e-5
    config.optimizer.schedule = "linear"
    config.patience = 2
    config.log_steps = 10
    config.eval_epochs = config.checkpoint_epochs = 1.0


def report(config: ConfigDict) -> None:
    """Applies the reference settings to either model, whose data, lengths and schedule stay."""
    config.compute_dtype = "float16"  # with loss scaling
    quantized(config, "int8")
    config.adapter.targets = r".*/(q_proj|o_proj)"  # by suffix, as peft matches: also the tower's q_proj
    config.adapter.rank, config.adapter.alpha, config.adapter.dropout = 8, 32.0, 0.1
    config.cache_features = False  # the tower trains, so its features change
    config.optimizer.name = "adamw_8bit"
    config.optimizer.learning_rate = 2e-5
    config.optimizer.weight_decay = 0.01
    config.batch_size, config.micro_batch = 4, 2
    config.total_epochs = config.eval_epochs = config.checkpoint_epochs = 1.0
    config.eval_percent = config.checkpoint_percent = None
    config.best_metric, config.best_mode = "loss", "min"
    config.patience = 2


def quantized(config: ConfigDict, kind: str) -> None:
    """Quantizes the base to `kind`, from weights in the compute dtype, whatever dtype the files have."""
    config.model.quantize = kind
    config.model.param_dtype = config.compute_dtype


def smoke(config: ConfigDict) -> None:
    """Shrinks the run of the tiny model to a minute."""
    config.data.num_train_scenes, config.data.num_validation_scenes = 24, 6
    config.data.tune_fraction, config.data.tune_examples = 0.2, 16
    config.batch_size = 16
    config.log_steps = 2
