r"""LoRA fine-tuning of PaliGemma on CLEVR questions, then an evaluation with blind controls.

    python train.py --config=configs/clevr.py

The default trains the tiny PaliGemma that ships with the package on synthetic CLEVR scenes, with nothing downloaded:
about 6 minutes and 1.3 GB of memory on 2 CPU cores (README.md has the runs). The same on the real data, once you have
them (docs/data.md):

    python train.py --config=configs/clevr.py --config.data.name=clevr --config.data.source=CLEVR_v1.0.zip

`:3b` is PaliGemma-3B at 224 pixels, LoRA of rank 8 on the decoder's q_proj and o_proj, 1 % of CLEVR's questions, one
epoch. Weights are gated, so you give their path:

    python train.py --config=configs/clevr.py:3b \
        --config.model.path=paligemma-3b-pt-224 --config.data.source=CLEVR_v1.0.zip

It computes in bfloat16 (`:3b,fp16` in float16 with loss scaling). Training and evaluation took 7.0 GiB of a GPU
(docs/memory.md: random weights, short answers). It reports on 2,000 of the 149,991 validation questions, evenly spread
(`--config.eval.max_examples=None` for all). The run on CLEVR has not been made: its score is not measured.

`:3b,qlora` is the same on a base in NF4 and `:3b,int8` on one in int8, in 3.8 and 4.8 GiB (docs/memory.md); the
tiny model goes with `--config.model.quantize=nf4`. `:3b,full` trains every weight, which takes a large card or several.

`:3b,report` has the settings of the report, row by row: a base in int8, 8-bit AdamW, float16 with loss scaling, and
LoRA on q_proj and o_proj by suffix, which reaches the tower's q_proj too (1,677,312 parameters); batch 2 with two
accumulated, evaluation and saving after the epoch, the best checkpoint by loss. What it left open is as in `:3b`.
`:report` runs the same settings on the tiny model, to see them work: a rate of 2e-5 teaches the tiny one little
(docs/memory.md).

The third blind control, the same fine-tuning on black images, is a second run as long as the first. `:3b` leaves it out
(its number is null); `--config.eval.question_only=True` adds it, and elsewhere `--config.eval.controls=False` switches
all three off. Both runs share the frozen weights in memory.

The one per cent is drawn by our own permutation with seed 42, not by that of the `datasets` library: other questions,
slightly fewer of them (1 % of the 95 % that are not kept to choose the checkpoint by).

`:peft=NAME` trains by another method (lora, dora, bottleneck, prefix, prompt, bitfit, diff_pruning, last_layers,
decoder, full: docs/peft.md), `:full` being `:peft=full`. The rates were tried on the tiny model; `:3b,peft=NAME` has
them too, but 1e-5 where weights of the base train, as most of PaliGemma's transfers.

`:smoke` runs everything in a minute, to show that it works; its numbers mean nothing.

Studies on top of it have files of their own: `clevr_ranks.py`, `clevr_peft.py` and `clevr_forgetting.py`.
"""

from ml_collections import ConfigDict

from paligemma_jax.tasks.vqa.adapter import use_method
from train_jax.config import base_config, parse_arg, refuse_together
from train_jax.core.errors import UserError

MOVED = {
    "ranks": "configs/clevr_ranks.py",
    "family": "configs/clevr_peft.py",
    "forgetting": "configs/clevr_forgetting.py",
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; arg is "peft=NAME" or names of the docstring, joined by commas.

    Raises:
      UserError: another argument, or two that contradict each other.
    """
    names = ("3b", "report", "fp16", "qlora", "int8", "full", "smoke")
    arg = parse_arg(arg, MOVED, peft="", **dict.fromkeys(names, False))
    refuse_together(arg, ("3b", "smoke"), "smoke is of the tiny model")
    refuse_together(arg, ("qlora", "int8"), "NF4 or int8")
    refuse_together(arg, ("full", "peft"), "full is peft=full")
    for name in ("qlora", "full", "peft"):
        refuse_together(arg, ("report", name), "the report's settings stand as they are")
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
    """The default: the shipped model, synthetic scenes."""
    config.model.remat = "none"  # 2.6 M parameters: recomputing would only cost time
    config.model.unroll = True  # five layers compile soon enough, and a step on CPU is a third faster
    config.cache_features = True  # LoRA leaves the tower frozen: encode each image once
    config.adapter.dropout = 0.0  # one epoch does not overfit, and on a CPU drawing the masks takes a third of a step
    config.data.num_train_scenes = 400
    config.total_epochs = 1.0
    config.batch_size = 32
    config.optimizer.learning_rate = 3e-3  # high, as suits adapters of a small model
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_percent = 0.05
    config.log_steps = 10
    config.eval_percent = config.checkpoint_percent = 0.25
    config.data.prefix_length = 44  # the longest question of CLEVR takes 38
    config.data.suffix_length = 3
    config.eval.max_new_tokens = 3


def large(config: ConfigDict, dtype: str) -> None:
    """PaliGemma-3B on CLEVR: the report's data, lengths, batch and rate, nothing quantised."""
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
    config.eval.max_examples = 2000  # of 149,991: one standard error of an accuracy is 1.1 points
    config.eval.question_only = False  # a second run of this length
    config.eval.max_new_tokens = 384  # an answer stops at its EOS, so this costs nothing where answers are short
    config.optimizer.learning_rate = 2e-5
    config.optimizer.schedule = "linear"
    config.patience = 2
    config.log_steps = 10
    config.eval_epochs = config.checkpoint_epochs = 1.0


def report(config: ConfigDict) -> None:
    """The report's table of settings, on either model; lengths, data and schedule are the model's."""
    config.compute_dtype = "float16"  # with loss scaling
    quantized(config, "int8")
    config.adapter.targets = r".*/(q_proj|o_proj)"  # peft matches suffixes, in the tower too, whose output is out_proj
    config.adapter.rank, config.adapter.alpha, config.adapter.dropout = 8, 32.0, 0.1
    config.cache_features = False  # the tower trains
    config.optimizer.name = "adamw_8bit"
    config.optimizer.learning_rate = 2e-5
    config.optimizer.weight_decay = 0.01
    config.batch_size, config.micro_batch = 4, 2
    config.total_epochs = config.eval_epochs = config.checkpoint_epochs = 1.0
    config.eval_percent = config.checkpoint_percent = None
    config.best_metric, config.best_mode = "loss", "min"
    config.patience = 2


def quantized(config: ConfigDict, kind: str) -> None:
    """A base of few bits, rounded from the compute dtype whatever the files hold."""
    config.model.quantize = kind
    config.model.param_dtype = config.compute_dtype


def smoke(config: ConfigDict) -> None:
    """A minute's run of the tiny model."""
    config.data.num_train_scenes, config.data.num_validation_scenes = 24, 6
    config.data.tune_fraction, config.data.tune_examples = 0.2, 16
    config.batch_size = 16
    config.log_steps = 2
