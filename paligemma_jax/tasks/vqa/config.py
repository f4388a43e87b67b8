"""The config keys of visual question answering, and the checks that need nothing but the config."""

import dataclasses

from ml_collections import ConfigDict

from paligemma_jax.adapt.lora.method import Lora
from paligemma_jax.adapt.quantization.nf4 import BLOCK_SIZES
from paligemma_jax.adapt.quantization.quantized_kernel import QUANTIZATION_KINDS, make_codec
from paligemma_jax.data.prompts import SPECIAL_TOKENS
from paligemma_jax.data.sources.question_families import QUESTION_FAMILIES
from paligemma_jax.tasks.common import FeatureCacheKeys, StackKeys
from paligemma_jax.tasks.rendered import RenderKeys
from paligemma_jax.tasks.vqa import adapter_config, consistency
from paligemma_jax.tasks.vqa.consistency import Keys as ConsistencyKeys
from paligemma_jax.weights.reader import DTYPES
from train_jax.config.base import check_declared
from train_jax.config.run_keys import MAX_SEED
from train_jax.core.config_keys import config_dict, key, section
from train_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelKeys(StackKeys):
    """`config.model`: the base."""

    path: str = key(
        "tiny",
        "the base: a Hugging Face folder, hf://owner/name, a big_vision .npz, or tiny, which ships with the package",
    )
    image_size: int | None = key(
        None,
        "side of an image in pixels; None = the checkpoint's own. Another size resamples the position embeddings",
        minimum=1,
    )
    param_dtype: str | None = key(
        None, "dtype of the weights; None = compute_dtype if they are frozen, float32 if they train", choices=DTYPES
    )
    quantize: str = key(
        "",
        "format in which frozen kernels are kept, rounded from param_dtype or else from the dtype of the files; '' "
        "= not quantised",
        choices=("", *QUANTIZATION_KINDS),
        architecture=True,
    )
    quantize_block_size: int = key(
        64, "number of weights that share a scale in nf4 and int4", choices=BLOCK_SIZES, architecture=True
    )
    quantize_double: bool = key(False, "whether the scales of nf4 are kept in 8 bits too", architecture=True)


@dataclasses.dataclass(frozen=True)
class InitKeys:
    """`config.init`: parts that start from another model."""

    vision: str | None = key(
        None,
        "SigLIP whose vision tower replaces that of the base: folder, .npz, or workdir of configs/siglip.py; None = "
        "keep the base's",
        architecture=True,
    )


@dataclasses.dataclass(frozen=True)
class AdapterKeys:
    """`config.adapter`: what trains beside a frozen base (docs/peft.md)."""

    name: str = key(
        "lora",
        "method by which the base is tuned; none trains the parameters that `trainable` matches",
        choices=adapter_config.NAMES,
        architecture=True,
    )
    targets: str | None = key(
        None,
        "pattern of the modules (lora, diff_pruning) or parameters (bitfit) that are adapted; None = the method's "
        f"own. That of lora is {Lora.targets}, and .*/(q_proj|o_proj) adapts the tower too, as peft does",
        architecture=True,
    )
    size: int | None = key(
        None,
        "width of a bottleneck, length of a prefix or prompt in tokens, or number of last_layers; None = the "
        "method's own",
        minimum=1,
        architecture=True,
    )
    penalty: float = key(
        0.0, "weight of diff_pruning's penalty, the share of changed entries, in the loss", minimum=0, architecture=True
    )
    rank: int = key(8, "rank of LoRA's update", minimum=1, architecture=True)
    alpha: float = key(32.0, "scale of LoRA's update, which is multiplied by alpha / rank", above=0, architecture=True)
    dropout: float = key(
        0.1, "probability with which an entry of LoRA's input is dropped in training", minimum=0, below=1
    )
    rslora: bool = key(
        False, "whether LoRA's update is multiplied by alpha / sqrt(rank) instead of alpha / rank", architecture=True
    )
    dora: bool = key(False, "whether LoRA trains the magnitude of every output channel too (DoRA)", architecture=True)
    layers: tuple[int, ...] = key(
        (),
        "numbers of the layers that are adapted, in every stack that targets match; () = all",
        minimum=0,
        architecture=True,
    )
    rank_pattern: tuple = key(
        (),
        "pairs (pattern, rank) that replace the rank of matching modules, whose paths have the layer's number, such "
        "as decoder/layers/0/self_attn/q_proj; the first pattern that matches is used",
        architecture=True,
    )
    alpha_pattern: tuple = key((), "pairs (pattern, alpha) that replace alpha in the same way", architecture=True)
    path: str | None = key(
        None,
        "folder of adapters from which training continues: peft's, or `adapter` in the workdir of a run. It decides "
        "all keys above but dropout; None = new adapters",
    )


@dataclasses.dataclass(frozen=True)
class SourceKeys(RenderKeys):
    """`config.data`: questions, answers and images (docs/data.md)."""

    name: str = key(
        "synthetic_clevr", "the data: synthetic_clevr, clevr, parquet, jsonl, or the import path of your own function"
    )
    source: str | None = key(None, "folder or file of the data; synthetic_clevr needs none")
    prompt: str = key(
        "answer en {question}",
        "text of a question for the model, in PaliGemma's form for English; jsonl has prompts of its own",
    )
    blank_images: bool = key(False, "whether all images are black, as in the question-only control")
    fraction: float = key(1.0, "share of the training questions that is used, drawn by subset_seed", above=0, maximum=1)
    families: tuple[str, ...] = key(
        (),
        "families of questions to train on, such as ('query_color',); () = all. The evaluation has all families",
        choices=QUESTION_FAMILIES,
    )
    subset_seed: int = key(
        42,
        "seed by which fraction draws questions (the `datasets` library draws others with the same seed)",
        minimum=0,
        maximum=MAX_SEED,
    )
    tune_fraction: float = key(
        0.05,
        "share of the training images that is held out to choose the checkpoint by, at least one image",
        above=0,
        below=1,
    )
    tune_examples: int = key(300, "largest number of questions on these held-out images", minimum=1)
    validation_split: str = key("validation", "name of the split that the evaluation reports")
    prefix_length: int = key(64, "number of tokens for BOS, prompt and separator", minimum=1)
    suffix_length: int = key(16, "number of tokens for the answer and its EOS", minimum=1)
    on_truncation: str = key(
        "raise",
        "what happens to a text that does not fit, which is never cut: raise stops the run, skip treats its row as "
        "one that cannot be read",
        choices=("raise", "skip"),
    )
    buckets: int = key(
        4,
        "largest number of shapes of a batch, chosen by the lengths of the texts, beside the shape of the longest "
        "text allowed; a step takes the smallest that its texts fit in. 0 = that of the longest text alone",
        minimum=0,
        resume_safe=True,
    )
    packing: bool = key(
        False,
        "whether several examples share a row of the decoder, where none sees another, which gives the same loss "
        "and gradient with little padding; a step still holds batch_size examples",
        resume_safe=True,
    )
    special_tokens: str = key(
        "refuse",
        "what happens to <bos>, <eos> and <pad> in a text, which the format adds itself: refuse makes them an "
        "error, parse reads them as transformers does",
        choices=SPECIAL_TOKENS,
    )
    image_size: int = key(96, "side of a synthetic scene in pixels", minimum=1)
    num_train_scenes: int = key(1000, "number of synthetic scenes to train on", minimum=2)
    num_validation_scenes: int = key(210, "number of synthetic scenes to evaluate on", minimum=1)
    questions_per_scene: int = key(10, "number of questions about a synthetic scene", minimum=1)
    scene_seed: int = key(0, "seed of the synthetic scenes", minimum=0, maximum=MAX_SEED)


@dataclasses.dataclass(frozen=True)
class LossKeys:
    """`config.loss`: cross-entropy of the answers' tokens."""

    reduction: str = key(
        "token_mean",
        "mean of the loss: over all tokens as in transformers (token_mean), or over the means of the examples as in "
        "big_vision (example_mean)",
        choices=("token_mean", "example_mean"),
    )
    chunk_size: int = key(256, "number of tokens whose logits exist at one time", minimum=1, resume_safe=True)
    vocab_chunk: int | None = key(
        None, "number of vocabulary entries whose logits exist at one time; None = all", minimum=1, resume_safe=True
    )


@dataclasses.dataclass(frozen=True)
class EvalKeys:
    """`config.eval`: what an evaluation measures."""

    batch_size: int = key(
        50,
        "largest number of questions at once; fewer are taken where the device has less memory",
        minimum=1,
        resume_safe=True,
    )
    max_new_tokens: int = key(
        16, "largest number of tokens of a generated answer", minimum=1
    )  # changes the accuracy that ranks checkpoints
    max_examples: int | None = key(
        None, "number of questions to evaluate, evenly spread over the split; None = all", minimum=1, resume_safe=True
    )
    candidates: str = key(
        "clevr",
        "answers that are scored by likelihood, joined by |; clevr = the 28 answers of CLEVR, '' = none",
        resume_safe=True,
    )
    captions: int = key(
        0,
        "number of scenes of synthetic_clevr whose captions are scored, before and after training",
        minimum=0,
        resume_safe=True,
    )
    feature_cache_mb: int = key(
        64, "MiB of image features that are kept between questions about the same image", minimum=0, resume_safe=True
    )
    controls: bool = key(
        True,
        "whether the blind controls are evaluated: shuffled images, the most frequent answer, question only",
        resume_safe=True,
    )
    question_only: bool = key(
        True,
        "whether the controls include question only, which trains the whole run again on black images",
        resume_safe=True,
    )
    before: bool = key(True, "whether the model before training is evaluated too, by likelihood", resume_safe=True)
    int8_outliers: float | None = key(
        None,
        "magnitude from which inputs of int8 kernels are multiplied in floating point; all others are multiplied in "
        "int8 (LLM.int8 has 6.0). None = dequantised weights, as in training",
        above=0,
    )


@dataclasses.dataclass(frozen=True)
class Keys(FeatureCacheKeys):
    """The keys of the task."""

    model: ModelKeys = section(lambda: ModelKeys(remat="auto"))
    init: InitKeys = section(InitKeys)
    tokenizer: str | None = key(None, "folder or tokenizer.model of the tokenizer; None = beside the model")
    adapter: AdapterKeys = section(AdapterKeys)
    trainable: str | None = key(
        None, "pattern of the parameters that train with adapter.name=none; None = all", architecture=True
    )
    data: SourceKeys = section(SourceKeys)
    loss: LossKeys = section(LossKeys)
    consistency: ConsistencyKeys = section(ConsistencyKeys)
    eval: EvalKeys = section(EvalKeys)


def check(config: ConfigDict) -> None:
    """Checks values on their own, before data are prepared or the model is read.

    Raises:
      UserError: the first fault found.
    """
    check_declared(config)
    adapter_config.check(config.adapter, config_dict(AdapterKeys))
    if config.adapter.name != "none" and config.trainable is not None:
        raise UserError(
            f"trainable is {config.trainable!r} beside adapter.name={config.adapter.name!r}, which decides what "
            "trains, expected one of the two: set trainable=None or adapter.name=none."
        )
    _check_dtypes(config)
    _check_quantize(config)
    consistency.check(config)
    if config.data.packing and not config.data.buckets:
        raise UserError(
            "data.packing is True beside data.buckets=0, which leaves the one shape that holds one example a row, "
            "expected 1 or more shapes to pack into: raise it."
        )
    if config.eval.captions and config.data.name != "synthetic_clevr":
        raise UserError(
            f"eval.captions is {config.eval.captions} beside data.name={config.data.name!r}, expected 0, as only the "
            "scenes of synthetic_clevr have captions: change it."
        )


def _check_dtypes(config: ConfigDict) -> None:
    """Refuses weights that train in float16: most updates would be rounded away, and loss scaling is of gradients."""
    if config.adapter.name == "none" and config.model.param_dtype == "float16":
        raise UserError(
            "model.param_dtype is float16 beside adapter.name='none', which trains the weights themselves, expected "
            "float32 or bfloat16: change it, or leave it out for float32."
        )


def _check_quantize(config: ConfigDict) -> None:
    """Refuses codecs that do not exist, and what does not go with a quantised base."""
    model, outliers = config.model, config.eval.int8_outliers
    if model.quantize_double and not model.quantize:
        raise UserError(
            "model.quantize_double is True beside model.quantize='', which quantises nothing, expected nf4: set "
            "model.quantize=nf4 or leave it out."
        )
    if model.quantize:
        make_codec(model.quantize, model.quantize_block_size, model.quantize_double)
    if model.quantize and config.adapter.name == "none" and config.trainable is None:
        raise UserError(
            f"model.quantize is {model.quantize!r} beside adapter.name='none' and trainable=None, which trains every "
            "parameter, expected kernels that stay as they are: set adapter.name=lora, or a pattern in trainable."
        )
    if model.quantize and config.init.vision is not None:
        raise UserError(
            f"init.vision is {config.init.vision!r} beside model.quantize={model.quantize!r}, expected a base that "
            "holds its tower already: write one with pg.with_vision and weights.save_orbax, and set model.path to it."
        )
    if outliers is not None and model.quantize != "int8":
        raise UserError(
            f"eval.int8_outliers is {outliers} beside model.quantize={model.quantize!r}, expected int8: set "
            "model.quantize=int8, or eval.int8_outliers=None."
        )
