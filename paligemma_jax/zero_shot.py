"""Zero-shot classification and retrieval with a dual encoder. Axes: N images, C classes, E of an embedding."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, UInt8

from paligemma_jax.data.few_shot.descriptions import fill_templates
from paligemma_jax.models.dual_encoder import DualEncoder, unit
from train_jax.core.errors import UserError

AT_ONCE = 64  # rows embedded at a time
Tokenize = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


def class_embeddings(
    model: DualEncoder, tokenize: Tokenize, classes: Sequence[str], templates: Sequence[str] = ("{}",)
) -> Float[np.ndarray, "C E"]:
    """One unit vector a class: the mean of its prompts' embeddings (Radford et al. 2021, section 3.1.4).

    Args:
      model: a SigLIP or a CLIP.
      tokenize: its `load_text_tokenizer(...)`.
      classes: what stands for {} in the prompts.
      templates: "a photo of a {}.", each with one {}.

    Raises:
      UserError: no class, or a template without {}.
    """
    prompts = [prompt for group in fill_templates(classes, templates) for prompt in group]
    embeddings = embed_texts(model, tokenize, prompts).reshape(len(classes), len(templates), -1)
    return np.asarray(unit(jnp.asarray(embeddings.mean(1))))


def check_tokens(model: DualEncoder, tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of texts, as they came.

    Raises:
      UserError: an id that is no word of the model's, or of a CLIP a text without the end mark that it pools at: the
        tokenizer is another model's.
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
    """Scores of every image for every class: cosines, the highest of which is the answer.

    Args:
      images: as `model.config.preprocessing` prepares them.

    Other arguments and errors: `class_embeddings`.
    """
    texts = class_embeddings(model, tokenize, classes, templates)
    parts = [np.asarray(_embed_prepared(model, np.stack(part))) for part in _batches(images, _at_once(len(images)))]
    return np.concatenate(parts)[: len(images)] @ texts.T


@jax.jit
def _embed_prepared(model: DualEncoder, images: Float[jax.Array, "B I I 3"]) -> Float[jax.Array, "B E"]:
    return model.encode_image(images)[0]


def recall(
    similarity: Float[np.ndarray, "N C"],
    right: Int[np.ndarray, " N"] | Bool[np.ndarray, "N C"],
    at: Sequence[int],
) -> dict[int, float]:
    """How often a right column is among the `k` most similar ones, for every `k` of `at`; ties count against it.

    Args:
      similarity: of rows and columns.
      right: the right column of every row, or where there may be several a mask of these.
      at: numbers of columns looked at.
    """
    if right.ndim == 1:
        right = right[:, None] == np.arange(similarity.shape[1])
    best = np.where(right, similarity, -np.inf).max(1)
    others = (~right & ~(similarity < best[:, None])).sum(1)  # wrong, and at least as similar, or not a number
    lost = ~right.any(1) | np.isnan(np.where(right, similarity, 0)).any(1)
    return {k: float(((others < k) & ~lost).mean()) for k in at}


def retrieval(images: ArrayLike, texts: ArrayLike, captions: Sequence[str] | None = None) -> Mapping[str, float]:
    """R@1, 5 and 10 of N pairs, both ways; and `mean_r1`, the mean of the two R@1.

    An image may have the caption of another: of equal captions any is a hit, and of their images too, as no model could
    tell them apart.

    Args:
      images, texts: embeddings [N, E], pairs in order.
      captions: the N texts. None: equal embeddings are taken for equal captions, unless all are equal: a text tower
        that maps everything to one point retrieves nothing.

    Raises:
      UserError: embeddings of other shapes than one another's, none at all, or captions of another number.
    """
    images, texts = np.asarray(images), np.asarray(texts)
    if images.ndim != 2 or images.shape != texts.shape or not len(images):
        raise UserError(
            f"image embeddings are {list(images.shape)} and text embeddings {list(texts.shape)}, expected one shape, "
            "[pairs, width]: give a row of each for every pair."
        )
    if captions is not None and len(captions) != len(images):
        raise UserError(f"{len(images)} pairs come with {len(captions)} captions, expected one each: give them all.")
    similarity = images @ texts.T
    same = _equal_rows(texts) if captions is None else _equal(list(captions))
    if captions is None and same.all():
        same = np.eye(len(texts), dtype=bool)
    found = {}
    for name, matrix in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        found |= {f"{name}_r{k}": value for k, value in recall(matrix, same, (1, 5, 10)).items()}
    found["mean_r1"] = (found["image_to_text_r1"] + found["text_to_image_r1"]) / 2
    return found


def _equal(values: Sequence[Hashable]) -> Bool[np.ndarray, "N N"]:
    """Which are equal to which."""
    numbers: dict[Hashable, int] = {}
    places = np.array([numbers.setdefault(value, len(numbers)) for value in values])
    return places[:, None] == places[None]


def _equal_rows(rows: Float[np.ndarray, "N E"]) -> Bool[np.ndarray, "N N"]:
    return _equal([row.tobytes() for row in np.asarray(rows)])


class Calibration(NamedTuple):
    """Pairs in bins of equal width of their likelihood: its mean, the share of true ones (NaN if empty), the number."""

    likely: Float[np.ndarray, " K"]
    true: Float[np.ndarray, " K"]
    count: Int[np.ndarray, " K"]


def calibration(likely: Float[np.ndarray, " N"], true: Bool[np.ndarray, " N"], bins: int = 10) -> Calibration:
    """Likelihoods against what came true, in `bins` bins between 0 and 1 (Guo et al. 2017, section 2)."""
    place = np.minimum((likely * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean, share = (np.bincount(place, values, minlength=bins) / count for values in (likely, true))
    return Calibration(mean, share, count)


def calibration_error(bins: Calibration) -> float:
    """The expected calibration error: the mean over pairs of the bins' gaps (Guo et al. 2017, equation 3)."""
    return float(np.nansum(bins.count * np.abs(bins.likely - bins.true)) / bins.count.sum())


@jax.jit
def embed_rows(model: DualEncoder, rows: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Embeddings [B, E] of uint8 `image` [B, I, I, 3], and of `tokens` and `mask` [B, T]."""
    images = model.config.preprocessing.normalize(rows["image"])
    return model(images, rows["tokens"], rows["mask"])[:2]


def embed_images(
    model: DualEncoder, images: Sequence[UInt8[np.ndarray, "height width 3"]], batch_size: int = AT_ONCE
) -> Float[np.ndarray, "N E"]:
    """Embeddings of pictures of any size, resized as the model's family does it; the last batch is filled up."""
    resize, found = model.config.preprocessing.resize, []
    for part in _batches(images, batch_size):
        found.append(np.asarray(embed_pixels(model, np.stack([resize(image) for image in part]))))
    return np.concatenate(found)[: len(images)]


@jax.jit
def embed_pixels(model: DualEncoder, pixels: UInt8[jax.Array, "B I I 3"]) -> Float[jax.Array, "B E"]:
    """Embeddings of pictures that `Preprocessing.resize` made."""
    return model.encode_image(model.config.preprocessing.normalize(pixels))[0]


def embed_texts(model: DualEncoder, tokenize: Tokenize, texts: Sequence[str]) -> Float[np.ndarray, "N E"]:
    """Embeddings of any number of texts, a batch at a time; the last batch is filled up."""
    batches = _batches(texts, _at_once(len(texts)))
    found = [np.asarray(_embed_tokens(model, *check_tokens(model, *tokenize(part)))) for part in batches]
    return np.concatenate(found)[: len(texts)]


def _at_once(number: int) -> int:
    """Rows of a batch for so many in all: a power of two, so that a handful of programs do, and few rows stay few."""
    return min(AT_ONCE, 1 << (number - 1).bit_length())


def _batches(rows: Sequence | np.ndarray, size: int) -> Iterator[list]:
    """The rows in batches; the last one is filled up with copies of the last row."""
    for start in range(0, len(rows), size):
        yield [rows[min(index, len(rows) - 1)] for index in range(start, start + size)]


@jax.jit
def _embed_tokens(model: DualEncoder, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    return model.encode_text(tokens, mask)[0]


@runtime_checkable  # so that beartype can check it in tests
class Rows(Protocol):
    """Rows with uint8 `image`, `tokens` and `mask`; and perhaps a `weight`, 0 of those that cannot be used."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]: ...


class Embedded(NamedTuple):
    """Embeddings of pairs, and the numbers of the rows that they are of."""

    images: Float[np.ndarray, "N E"]
    texts: Float[np.ndarray, "N E"]
    rows: list[int]


def embed(model: DualEncoder, rows: Rows, batch_size: int = AT_ONCE) -> Embedded:
    """`embed_rows` of any number of rows, without those that cannot be used, read a batch at a time.

    The last batch is filled up, so that one program does.
    """
    images, texts, used = [], [], []
    for start in range(0, len(rows), batch_size):
        part = [rows[min(index, len(rows) - 1)] for index in range(start, start + batch_size)]
        batch = {name: np.stack([row[name] for row in part]) for name in ("image", "tokens", "mask")}
        check_tokens(model, batch["tokens"], batch["mask"])
        good = [at for at, row in enumerate(part[: len(rows) - start]) if row.get("weight", 1)]
        zimg, ztxt = jax.device_get(embed_rows(model, batch))
        images.append(zimg[good])
        texts.append(ztxt[good])
        used += [start + at for at in good]
    return Embedded(np.concatenate(images), np.concatenate(texts), used)
