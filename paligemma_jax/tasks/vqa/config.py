"""The config keys of visual question answering, and the checks that need nothing but the config."""

import dataclasses

from ml_collections import ConfigDict

from paligemma_jax.adapt.quantization.quantized_kernel import KINDS, make_codec
from paligemma_jax.data.prompts import SPECIAL_TOKENS
from paligemma_jax.data.sources.question_families import QUESTION_FAMILIES
from paligemma_jax.models.attention import KERNELS
from paligemma_jax.tasks import common
from paligemma_jax.tasks.vqa import adapter_config, consistency
from paligemma_jax.tasks.vqa.consistency import Keys as ConsistencyKeys
from train_jax.config.base import check_declared
from train_jax.core.config_keys import config_dict, key, section
from train_jax.core.errors import UserError
from train_jax.core.files import cache_dir


@dataclasses.dataclass(frozen=True)
class ModelKeys:
    """`config.model`: the base."""

    path: str = key("tiny", "Hugging Face folder, hf://owner/name, big_vision .npz, or tiny (ships with the package)")
    image_size: int | None = key(None, "pixels; None = the checkpoint's own, else positions are resampled")
    remat: str = key("block", "what the backward pass recomputes", choices=common.REMAT, resume_safe=True)
    unroll: bool = key(
        False, "compile the layers without a loop: faster steps on a CPU, slower to compile", resume_safe=True
    )
    attention: str = key(
        "auto",
        "plain; flash, which holds no matrix of scores; auto = flash on TPUs from 512 tokens on (docs/attention.md)",
        choices=KERNELS,
        resume_safe=True,
    )
    param_dtype: str | None = key(None, "of the weights; None = compute_dtype if frozen, float32 if trained")
    quantize: str = key(
        "",
        "keep the kernels in so many bits, frozen, rounded from param_dtype or else the files' dtype; '' = no",
        choices=("", *KINDS),
        architecture=True,
    )
    quantize_block_size: int = key(64, "weights per scale of nf4 and int4: 64 or 128", architecture=True)
    quantize_double: bool = key(False, "nf4: the scales in 8 bits too", architecture=True)


@dataclasses.dataclass(frozen=True)
class InitKeys:
    """`config.init`: parts that start from another model."""

    vision: str | None = key(
        None, "vision tower of a SigLIP: folder, .npz, or workdir of configs/siglip.py", architecture=True
    )


@dataclasses.dataclass(frozen=True)
class AdapterKeys:
    """`config.adapter`: what trains beside a frozen base (docs/peft.md)."""

    name: str = key(
        "lora", "method; none trains what `trainable` says", choices=adapter_config.NAMES, architecture=True
    )
    targets: str | None = key(
        None,
        r"pattern of modules (lora, diff_pruning) or parameters (bitfit); None = the method's own, lora's being "
        r"decoder/.*/(q_proj|o_proj). .*/(q_proj|o_proj) also adapts the tower, as peft does",
        architecture=True,
    )
    size: int | None = key(
        None, "width of a bottleneck, length of a prefix or prompt, number of last_layers", architecture=True
    )
    penalty: float = key(
        0.0, "diff_pruning: weight of the share of changed entries, beside the loss", architecture=True
    )
    rank: int = key(8, "of LoRA", minimum=1, architecture=True)
    alpha: float = key(32.0, "LoRA's update is scaled by alpha / rank", architecture=True)
    dropout: float = key(0.1, "of the adapter's inputs")
    rslora: bool = key(False, "scale by alpha / sqrt(rank) instead", architecture=True)
    dora: bool = key(False, "train the magnitude of every output channel too", architecture=True)
    layers: tuple = key(
        (), "numbers of the layers to adapt in every stack that targets reach; () = all", architecture=True
    )
    rank_pattern: tuple = key(
        (),
        "((pattern, rank), ...) over paths with the layer's number, as decoder/layers/0/self_attn/q_proj; the first "
        "that matches wins",
        architecture=True,
    )
    alpha_pattern: tuple = key((), "((pattern, alpha), ...), likewise", architecture=True)
    path: str | None = key(
        None,
        "continue from the adapters of a folder: peft's, or the `adapter` in a run's workdir. It decides all of the "
        "above but the dropout",
    )


@dataclasses.dataclass(frozen=True)
class SourceKeys:
    """`config.data`: questions, answers and images (docs/data.md)."""

    name: str = key("synthetic_clevr", "synthetic_clevr, clevr, parquet, jsonl, or an import path of your own")
    source: str | None = key(None, "where the data are; synthetic_clevr needs none")
    cache_dir: str = key(cache_dir, "folder for rendered scenes", resume_safe=True)
    build_workers: int = key(2, "processes that render", resume_safe=True)
    prompt: str = key("answer en {question}", "PaliGemma's prefix for questions in English; jsonl brings its own")
    blank_images: bool = key(False, "black images: the question-only control")
    fraction: float = key(1.0, "of the training questions")
    families: tuple = key((), "of questions to train on, such as ('query_color',); () = all. All are evaluated")
    subset_seed: int = key(42, "draws that fraction (not the permutation of the `datasets` library)")
    tune_fraction: float = key(0.05, "of the training images, held out to choose the checkpoint by; at least one image")
    tune_examples: int = key(300, "questions on those images, at most")
    validation_split: str = key("validation", "split that the evaluation reports")
    prefix_length: int = key(64, "tokens of BOS + prompt + separator", minimum=1)
    suffix_length: int = key(16, "tokens of the answer with its EOS", minimum=1)
    on_truncation: str = key(
        "raise", "a text that does not fit is never cut; skip: its row is a bad row", choices=("raise", "skip")
    )
    buckets: int = key(
        4,
        "shapes of a batch at most, chosen by the lengths of the texts, beside that of the longest text allowed; a "
        "step takes the smallest one that it fits in. 0 = that of the longest text alone",
        minimum=0,
        resume_safe=True,
    )
    packing: bool = key(
        False,
        "put several examples into one row of the decoder, where none sees another: the same loss and gradient with "
        "little padding. A step still holds batch_size examples",
        resume_safe=True,
    )
    special_tokens: str = key(
        "refuse",
        "<bos>, <eos>, <pad> and <image> in a text, which the format adds; parse reads them as transformers does",
        choices=SPECIAL_TOKENS,
    )
    image_size: int = key(96, "synthetic scenes: pixels")
    num_train_scenes: int = key(1000, "synthetic scenes to train on")
    num_validation_scenes: int = key(210, "synthetic scenes to evaluate on")
    questions_per_scene: int = key(10, "synthetic scenes: questions each")
    scene_seed: int = key(0, "synthetic scenes: seed")


@dataclasses.dataclass(frozen=True)
class LossKeys:
    """`config.loss`: cross-entropy of the answers' tokens."""

    reduction: str = key(
        "token_mean", "token_mean as transformers, example_mean as big_vision", choices=("token_mean", "example_mean")
    )
    chunk_size: int = key(256, "tokens whose logits exist at one time", minimum=1, resume_safe=True)
    vocab_chunk: int | None = key(
        None, "vocabulary entries whose logits exist at one time; None = all", minimum=1, resume_safe=True
    )


@dataclasses.dataclass(frozen=True)
class EvalKeys:
    """`config.eval`: what an evaluation measures."""

    batch_size: int = key(
        50, "questions at once, at most; shrinks where the device has less memory", minimum=1, resume_safe=True
    )
    max_new_tokens: int = key(16, "of a generated answer", minimum=1)  # changes the accuracy that ranks checkpoints
    max_examples: int | None = key(None, "evenly spread over the split; None = all", minimum=1, resume_safe=True)
    candidates: str = key(
        "clevr", "answers scored by likelihood: clevr = its 28, '' = none, else answers joined by |", resume_safe=True
    )
    captions: int = key(
        0, "scenes of synthetic_clevr whose captions are scored, before and after training", minimum=0, resume_safe=True
    )
    feature_cache_mb: int = key(
        64, "MiB of image features kept between questions on the same image", minimum=0, resume_safe=True
    )
    controls: bool = key(
        True, "the blind controls: shuffled images, most frequent answer, question only", resume_safe=True
    )
    question_only: bool = key(
        True, "the last of these, which trains the whole run again on black images", resume_safe=True
    )
    before: bool = key(True, "the model before training, by likelihood", resume_safe=True)
    int8_outliers: float | None = key(
        None,
        "int8: inputs from this magnitude on are multiplied in floating point, the rest int8 x int8 (LLM.int8: 6.0); "
        "None = dequantised weights, as in training",
    )


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys of the task."""

    model: ModelKeys = section(ModelKeys)
    init: InitKeys = section(InitKeys)
    tokenizer: str | None = key(None, "folder or tokenizer.model; None = beside the model")
    adapter: AdapterKeys = section(AdapterKeys)
    trainable: str | None = key(None, "pattern of parameter paths, for adapter none; None = all", architecture=True)
    cache_features: bool = key(
        False, "encode each training image once; exact while the tower is frozen, costs memory", resume_safe=True
    )
    cache_features_mb: int = key(
        2048, "host memory for that, MiB; data that need more stop the run at its start", minimum=0, resume_safe=True
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
    _check_families(config.data)
    if config.data.get("packing", False) and not config.data.buckets:
        raise UserError(
            "data.packing is True beside data.buckets=0, which leaves the one shape that holds one example a row, "
            "expected 1 or more shapes to pack into: raise it."
        )
    if config.eval.captions and config.data.name != "synthetic_clevr":
        raise UserError(
            f"eval.captions is {config.eval.captions} beside data.name={config.data.name!r}, expected 0, as only the "
            "scenes of synthetic_clevr have captions: change it."
        )


def _check_families(data: ConfigDict) -> None:
    """Refuses families of questions that do not exist."""
    unknown = [name for name in data.families if name not in QUESTION_FAMILIES]
    if unknown:
        raise UserError(
            f"data.families holds {unknown[0]!r}, expected some of {', '.join(QUESTION_FAMILIES)}: change it."
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
    # Without a codec too: a block size that none has is a mistake, whatever a sweep sets beside it.
    make_codec(model.quantize or "nf4", model.quantize_block_size, model.quantize_double)
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
    if outliers is not None and (model.quantize != "int8" or outliers <= 0):
        raise UserError(
            f"eval.int8_outliers is {outliers} beside model.quantize={model.quantize!r}, expected a positive number "
            "beside int8: set it to None, or to 6.0 with model.quantize=int8."
        )
