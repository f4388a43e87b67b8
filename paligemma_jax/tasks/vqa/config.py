"""The config keys of visual question answering: defaults, and the checks that need nothing but the config."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from paligemma_jax.adapt.quantization.quantized_kernel import KINDS, make_codec
from paligemma_jax.data.prompts import SPECIAL_TOKENS
from paligemma_jax.data.sources.question_families import QUESTION_FAMILIES
from paligemma_jax.tasks import common
from paligemma_jax.tasks.vqa import adapter as vqa_adapter
from paligemma_jax.tasks.vqa import consistency
from train_jax.config.base import check_choices, leaves
from train_jax.core.errors import UserError
from train_jax.core.files import cache_dir

CHOICES = {
    "model.remat": common.REMAT,
    "model.quantize": ("", *KINDS),
    "adapter.name": vqa_adapter.NAMES,
    "loss.reduction": ("token_mean", "example_mean"),
    "data.on_truncation": ("raise", "skip"),
    "data.special_tokens": SPECIAL_TOKENS,
} | consistency.CHOICES
# The smallest value allowed, where one is set.
MINIMA = {
    "adapter.rank": 1,
    "cache_features_mb": 0,
    "data.prefix_length": 1,
    "data.suffix_length": 1,
    "loss.chunk_size": 1,
    "loss.vocab_chunk": 1,
    "eval.batch_size": 1,
    "eval.max_new_tokens": 1,
    "eval.max_examples": 1,
    "eval.captions": 0,
    "eval.feature_cache_mb": 0,
}


def defaults() -> ConfigDict:
    """The keys of the task with their defaults."""
    config = ConfigDict()
    config.model = ConfigDict(
        {
            "path": "tiny",  # a Hugging Face folder, a big_vision .npz, or "tiny" (ships with the package)
            "image_size": placeholder(int),  # None = the checkpoint's own; else positions are resampled
            "remat": "block",  # none | block | dots: what the backward pass recomputes
            "unroll": False,  # compile the layers without a loop: faster steps on CPU, slower to compile
            "param_dtype": placeholder(str),  # of the weights; None = compute_dtype if frozen, float32 if trained
            # nf4 | int8 | int4: keep the kernels in so many bits, frozen; "" = in param_dtype. They are rounded from
            # param_dtype, or from the dtype of the files where that is None.
            "quantize": "",
            "quantize_block_size": 64,  # 64 | 128 weights with a constant of their own, of nf4 and int4
            "quantize_double": False,  # of nf4: the constants in 8 bits too
        }
    )
    # What starts from elsewhere: the vision tower of a SigLIP (folder, .npz, or workdir of configs/siglip.py).
    config.init = ConfigDict({"vision": placeholder(str)})
    config.tokenizer = placeholder(str)  # folder or tokenizer.model; None = beside the model
    config.adapter = ConfigDict(
        {
            # lora | bottleneck | prefix | prompt | bitfit | diff_pruning | last_layers (docs/peft.md), or none, which
            # trains what `trainable` says
            "name": "lora",
            # Pattern of modules (lora, diff_pruning) or parameters (bitfit); None is the method's own, lora's being
            # r"decoder/.*/(q_proj|o_proj)". r".*/(q_proj|o_proj)" also adapts the tower, as peft does.
            "targets": placeholder(str),
            "size": placeholder(int),  # width of a bottleneck, length of prefix or prompt, number of last_layers
            "penalty": 0.0,  # of diff_pruning: weight of the share of entries that change, beside the loss
            "rank": 8,
            "alpha": 32.0,
            "dropout": 0.1,
            "rslora": False,  # scale alpha / sqrt(rank) instead of alpha / rank
            "dora": False,  # train the magnitude of every output channel too
            "layers": (),  # numbers of the layers to adapt, of every stack that targets reach; () = all
            # ((pattern, rank), ...) over paths with the layer's number, "decoder/layers/0/self_attn/q_proj"; the first
            # that matches wins. Likewise for alpha.
            "rank_pattern": (),
            "alpha_pattern": (),
            # Go on from the adapters of a folder: peft's, or the `adapter` in another run's workdir. It decides all of
            # the above but the dropout.
            "path": placeholder(str),
        }
    )
    config.trainable = placeholder(str)  # pattern of parameter paths, for adapter "none"; None = all
    config.cache_features = False  # encode each training image once; exact while the tower is frozen, costs memory
    config.cache_features_mb = 2048  # host memory that may cost, MiB; data that need more stop the run at its start
    config.data = _data_defaults()
    config.loss = ConfigDict(
        {
            "reduction": "token_mean",  # token_mean (transformers) | example_mean (big_vision)
            "chunk_size": 256,  # tokens whose logits exist at one time
            "vocab_chunk": placeholder(int),  # words whose logits exist at one time; None = all
        }
    )
    config.consistency = consistency.defaults()
    config.eval = ConfigDict(
        {
            "batch_size": 50,  # questions at once, at most; shrinks where the device has less memory
            "max_new_tokens": 16,
            "max_examples": placeholder(int),  # evenly spread over the split; None = all of it
            "candidates": "clevr",  # "clevr": the 28 answers; "": no likelihood scoring; else answers joined by |
            "captions": 0,  # scenes of synthetic_clevr whose captions are scored too, before and after training
            "feature_cache_mb": 64,  # image features kept between questions on the same image
            "controls": True,  # the blind controls: shuffled images, most frequent answer, question only
            "question_only": True,  # the last of these, which trains the whole run again on black images
            "before": True,  # the model before training, by likelihood
            # Of int8: inputs from this magnitude on are multiplied in floating point, the rest int8 x int8 (LLM.int8
            # has 6.0). None = as in training: dequantised weights. Training is the same with both.
            "int8_outliers": placeholder(float),
        }
    )
    return config


def _data_defaults() -> ConfigDict:
    return ConfigDict(
        {
            "name": "synthetic_clevr",  # synthetic_clevr | clevr | parquet | jsonl | import path, see docs/data.md
            "source": placeholder(str),  # where the data lie; synthetic_clevr needs none
            "cache_dir": cache_dir(),
            "build_workers": 2,  # processes that render
            "prompt": "answer en {question}",  # PaliGemma's prefix for questions in English; jsonl brings its own
            "blank_images": False,  # the question-only control: same run, black images
            "fraction": 1.0,  # of the training questions
            "families": (),  # of questions to train on, such as ("query_color",); () = all. All are evaluated.
            "subset_seed": 42,  # draws that fraction (not the permutation of the `datasets` library)
            "tune_fraction": 0.05,  # of the training images, kept apart to choose the checkpoint by; at least one
            "tune_examples": 300,  # questions on those images, at most
            "validation_split": "validation",
            "prefix_length": 64,  # tokens of BOS + prompt + separator
            "suffix_length": 16,  # tokens of the answer with its EOS
            "on_truncation": "raise",  # raise | skip (a bad row): a text that does not fit is never cut
            # refuse | parse: <bos>, <eos>, <pad> and <image> in a text, which the format adds itself; "parse" reads
            # them as transformers does
            "special_tokens": "refuse",
            # Synthetic scenes only:
            "image_size": 96,
            "num_train_scenes": 1000,
            "num_validation_scenes": 210,
            "questions_per_scene": 10,
            "scene_seed": 0,
        }
    )


def check(config: ConfigDict) -> None:
    """Checks values on their own, before data are prepared or the model is read.

    Raises:
      UserError: the first fault found.
    """
    values = leaves(config)
    check_choices(config, CHOICES)
    for key, minimum in MINIMA.items():
        if values[key] is not None and values[key] < minimum:
            raise UserError(f"{key} is {values[key]}, expected {minimum} or more: change it.")
    vqa_adapter.check(config.adapter, defaults().adapter)
    if config.adapter.name != "none" and config.trainable is not None:
        raise UserError(
            f"trainable is {config.trainable!r} beside adapter.name={config.adapter.name!r}, which decides what "
            "trains, expected one of the two: set trainable=None or adapter.name=none."
        )
    _check_dtypes(config)
    _check_quantize(config)
    consistency.check(config)
    _check_families(config.data)
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
