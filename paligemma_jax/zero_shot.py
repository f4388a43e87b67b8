"""Zero-shot classification and retrieval with a dual encoder. Axes: N images, C classes, E of an embedding."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, UInt8

from paligemma_jax.data.few_shot.descriptions import fill_templates
from paligemma_jax.images.preprocessing import preprocessing_of
from paligemma_jax.models.dual_encoder import DualEncoder, unit
from train_jax.core.errors import UserError

BATCH_SIZE = 64  # rows per batch
Tokenize = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


def class_embeddings(
    model: DualEncoder, tokenize: Tokenize, classes: Sequence[str], templates: Sequence[str] = ("{}",)
) -> Float[np.ndarray, "C E"]:
    """Returns one unit vector per class: the mean of its prompts' embeddings (Radford et al. 2021, section 3.1.4).

    Args:
      model: a SigLIP or a CLIP.
      tokenize: its `load_text_tokenizer(...)`.
      classes: names that replace {} in the templates.
      templates: "a photo of a {}.", each with one {}.

    Raises:
      UserError: no class, or a template without {}.
    """
    prompts = [prompt for group in fill_templates(classes, templates) for prompt in group]
    embeddings = embed_texts(model, tokenize, prompts).reshape(len(classes), len(templates), -1)
    return np.asarray(unit(jnp.asarray(embeddings.mean(1))))


def check_tokens(model: DualEncoder, tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and mask unchanged after checking that they come from the model's tokenizer.

    Args:
      model: a SigLIP or a CLIP.
      tokens, mask: int [N, T] and bool [N, T], as its tokenizer returns them.

    Raises:
      UserError: an id outside the model's vocabulary, or, for a CLIP, a text without the end mark that it pools at.
    """
    text = model.config.text
    wrong = tokens[(tokens < 0) | (tokens >= text.vocab_size)]
    if wrong.size:
        raise UserError(
            f"texts hold the id {wrong[0]}, expected ids from 0 to {text.vocab_size - 1}: use this model's tokenizer."
        )
    if text.eos_token is not None and not (tokens == text.eos_token).any(axis=1).all():
        raise UserError(f"a text lacks the end mark {text.eos_token} that the model reads: use this model's tokenizer.")
    return tokens, mask


def zero_shot(
    model: DualEncoder,
    tokenize: Tokenize,
    images: Float[np.ndarray, "N I I 3"],
    classes: Sequence[str],
    templates: Sequence[str] = ("{}",),
) -> Float[np.ndarray, "N C"]:
    """Returns the cosine of every image and class; the class with the highest one is the prediction.

    Args:
      images: as `model.config.preprocessing` prepares them.
      model, tokenize, classes, templates: as in `class_embeddings`.

    Raises:
      UserError: as `class_embeddings`.
    """
    texts = class_embeddings(model, tokenize, classes, templates)
    batches = _batches(images, _batch_size(len(images)))
    parts = [np.asarray(_embed_prepared(model, np.stack(batch))) for batch in batches]
    return np.concatenate(parts)[: len(images)] @ texts.T


@jax.jit
def _embed_prepared(model: DualEncoder, images: Float[jax.Array, "B I I 3"]) -> Float[jax.Array, "B E"]:
    return model.encode_image(images)[0]


def recall(
    similarity: Float[np.ndarray, "N C"],
    right: Int[np.ndarray, " N"] | Bool[np.ndarray, "N C"],
    at: Sequence[int],
) -> dict[int, float]:
    """Returns the share of rows with a right column among the `k` most similar, for every `k` of `at`; ties are misses.

    Args:
      similarity: of rows and columns.
      right: the right column of every row, or a mask if there may be several.
      at: numbers of columns k.
    """
    if right.ndim == 1:
        right = right[:, None] == np.arange(similarity.shape[1])
    best = np.where(right, similarity, -np.inf).max(1)
    others = (~right & ~(similarity < best[:, None])).sum(1)  # wrong and at least as similar, or NaN
    lost = ~right.any(1) | np.isnan(np.where(right, similarity, 0)).any(1)
    return {k: float(((others < k) & ~lost).mean()) for k in at}


def retrieval(images: ArrayLike, texts: ArrayLike, captions: Sequence[str] | None = None) -> Mapping[str, float]:
    """Returns R@1, 5 and 10 of N pairs in both directions, in [0, 1], and `mean_r1`, the mean of the two R@1.

    Images may have equal captions. Any of these captions, or of these images, is then a hit, as no model can tell
    them apart.

    Args:
      images, texts: embeddings [N, E], pairs in order.
      captions: the N texts. None: equal embeddings count as equal captions, unless all are equal: a text tower that
        maps everything to one point retrieves nothing.

    Returns:
      `image_to_text_r1`, `_r5`, `_r10`, `text_to_image_r1`, `_r5`, `_r10` and `mean_r1`.

    Raises:
      UserError: embeddings of different shapes, no pairs, or another number of captions.
    """
    images, texts = np.asarray(images), np.asarray(texts)
    if images.ndim != 2 or images.shape != texts.shape or not len(images):
        raise UserError(
            f"image embeddings are {list(images.shape)} and text embeddings {list(texts.shape)}, expected one shape, "
            "[pairs, width]: give one row of each per pair."
        )
    if captions is not None and len(captions) != len(images):
        raise UserError(f"{len(images)} pairs come with {len(captions)} captions, expected one each: give them all.")
    similarity = images @ texts.T
    same = _equal_rows(texts) if captions is None else _equal(list(captions))
    if captions is None and same.all():
        same = np.eye(len(texts), dtype=bool)
    metrics = {}
    for name, matrix in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        metrics |= {f"{name}_r{k}": value for k, value in recall(matrix, same, (1, 5, 10)).items()}
    metrics["mean_r1"] = (metrics["image_to_text_r1"] + metrics["text_to_image_r1"]) / 2
    return metrics


def _equal(values: Sequence[Hashable]) -> Bool[np.ndarray, "N N"]:
    """Returns whether each pair of values is equal."""
    seen: dict[Hashable, int] = {}
    numbers = np.array([seen.setdefault(value, len(seen)) for value in values])
    return numbers[:, None] == numbers[None]


def _equal_rows(rows: Float[np.ndarray, "N E"]) -> Bool[np.ndarray, "N N"]:
    return _equal([row.tobytes() for row in np.asarray(rows)])


class Calibration(NamedTuple):
    """Pairs in bins of equal width of their likelihood: mean likelihood, share of true pairs (NaN if empty), count."""

    likely: Float[np.ndarray, " K"]
    true: Float[np.ndarray, " K"]
    count: Int[np.ndarray, " K"]


def calibration(likely: Float[np.ndarray, " N"], true: Bool[np.ndarray, " N"], bins: int = 10) -> Calibration:
    """Compares likelihoods with outcomes (Guo et al. 2017, section 2).

    Args:
      likely: likelihood that the model gives to each pair, in [0, 1].
      true: whether each pair is true.
      bins: number of bins of equal width between 0 and 1.
    """
    bin_of_pair = np.minimum((likely * bins).astype(int), bins - 1)
    count = np.bincount(bin_of_pair, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean, share = (np.bincount(bin_of_pair, values, minlength=bins) / count for values in (likely, true))
    return Calibration(mean, share, count)


def calibration_error(bins: Calibration) -> float:
    """Returns the expected calibration error: the mean over pairs of the bins' gaps (Guo et al. 2017, equation 3)."""
    return float(np.nansum(bins.count * np.abs(bins.likely - bins.true)) / bins.count.sum())


@jax.jit
def embed_rows(model: DualEncoder, rows: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns the embeddings [B, E] of uint8 `image` [B, I, I, 3], and of `tokens` and `mask` [B, T]."""
    images = preprocessing_of(model.config).normalize(rows["image"])
    return model(jnp.asarray(images), rows["tokens"], rows["mask"])[:2]


def embed_images(
    model: DualEncoder, images: Sequence[UInt8[np.ndarray, "height width 3"]], batch_size: int = BATCH_SIZE
) -> Float[np.ndarray, "N E"]:
    """Returns the embeddings of RGB images of any size, in batches; resizes them as the model's family does.

    The last batch is padded, so that one program is compiled. Embeddings are float32, of unit length.
    """
    resize, batches = preprocessing_of(model.config).resize, _batches(images, batch_size)
    parts = [np.asarray(embed_pixels(model, np.stack([resize(image) for image in batch]))) for batch in batches]
    return np.concatenate(parts)[: len(images)]


@jax.jit
def embed_pixels(model: DualEncoder, pixels: UInt8[jax.Array, "B I I 3"]) -> Float[jax.Array, "B E"]:
    """Returns the embeddings, float32 of unit length, of images that `Preprocessing.resize` has resized."""
    return model.encode_image(jnp.asarray(preprocessing_of(model.config).normalize(pixels)))[0]


def embed_texts(model: DualEncoder, tokenize: Tokenize, texts: Sequence[str]) -> Float[np.ndarray, "N E"]:
    """Returns the embeddings, float32 of unit length, of any number of texts, in batches; pads the last batch.

    Raises:
      UserError: as `check_tokens`.
    """
    batches = _batches(texts, _batch_size(len(texts)))
    parts = [np.asarray(_embed_tokens(model, *check_tokens(model, *tokenize(batch)))) for batch in batches]
    return np.concatenate(parts)[: len(texts)]


def _batch_size(count: int) -> int:
    """Returns a batch size for `count` rows: a power of two, so that few programs are compiled."""
    return min(BATCH_SIZE, 1 << (count - 1).bit_length())


def _batches(rows: Sequence | np.ndarray, size: int) -> Iterator[list]:
    """Yields the rows in batches; the last one is padded with copies of the last row."""
    for start in range(0, len(rows), size):
        yield [rows[min(index, len(rows) - 1)] for index in range(start, start + size)]


@jax.jit
def _embed_tokens(model: DualEncoder, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    return model.encode_text(tokens, mask)[0]


@runtime_checkable  # so that beartype can check it in tests
class Rows(Protocol):
    """Rows with uint8 `image`, `tokens` and `mask`, and optionally `weight`, 0 for rows that cannot be used."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]: ...


class Embedded(NamedTuple):
    """Embeddings of pairs, float32 of unit length, and the numbers of their rows."""

    images: Float[np.ndarray, "N E"]
    texts: Float[np.ndarray, "N E"]
    rows: list[int]


def embed(model: DualEncoder, rows: Rows, batch_size: int = BATCH_SIZE) -> Embedded:
    """Applies `embed_rows` to any number of rows in batches, leaving out rows that cannot be used.

    The last batch is padded, so that one program is compiled.

    Raises:
      UserError: as `check_tokens`.
    """
    images, texts, used = [], [], []
    for start in range(0, len(rows), batch_size):
        part = [rows[min(index, len(rows) - 1)] for index in range(start, start + batch_size)]
        batch = {name: np.stack([row[name] for row in part]) for name in ("image", "tokens", "mask")}
        check_tokens(model, batch["tokens"], batch["mask"])
        good = [index for index, row in enumerate(part[: len(rows) - start]) if row.get("weight", 1)]
        zimg, ztxt = jax.device_get(embed_rows(model, batch))
        images.append(zimg[good])
        texts.append(ztxt[good])
        used += [start + index for index in good]
    return Embedded(np.concatenate(images), np.concatenate(texts), used)
