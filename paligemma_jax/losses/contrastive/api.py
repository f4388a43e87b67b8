"""The losses of SigLIP and CLIP, of which no matrix of all pairs is ever held.

Pairs are taken a chunk of texts at a time, and the gradients are computed with the value: the cotangent of a scalar
only scales them. Over several devices each keeps its images and the texts travel around the ring (ring.py),
so that memory is that of `images of a device x chunk_size` pairs, whatever the global batch.

Axes as in pairs.py: B images, T = K * B texts, of which image i owns [K * i, K * (i + 1)), and D.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from paligemma_jax.losses.contrastive.backward import Gradients, NeedsGrad
from paligemma_jax.losses.contrastive.pairs import PairMask, sides_of
from paligemma_jax.losses.contrastive.ring import Ring, ring_of
from paligemma_jax.losses.contrastive.sigmoid_softmax import sigmoid_on_device, softmax_on_device
from train_jax.core.errors import UserError

DEFAULT_CHUNK = 256  # texts


class _Settings(NamedTuple):
    """What of the arguments is no array."""

    on_device: Callable
    mesh: Mesh | None
    ring: Ring
    chunk_size: int


def sigmoid_loss(
    zimg: Float[Array, "B D"],
    ztxt: Float[Array, "T D"],
    log_scale: Float[Array, ""] | Float[Array, "1"],
    bias: Float[Array, ""] | Float[Array, "1"],
    mesh: Mesh | None = None,
    axis: str | tuple[str, ...] = "data",
    chunk_size: int | None = None,
    mask: Bool[Array, "B T"] | None = None,
    text_ids: Int[Array, " T"] | None = None,
    image_ids: Int[Array, " B"] | None = None,
    valid: Bool[Array, " B"] | None = None,
) -> Float[Array, ""]:
    """Mean over images of the sum over texts of `-log sigmoid(+-(exp(log_scale) * zimg @ ztxt.T + bias))`, float32.

    The sign is + for a text of the image and - for all others (Zhai et al. 2023, algorithm 1). The specification is
    losses.reference.sigmoid_loss, which holds the matrix of all pairs.

    Args:
        zimg: embeddings of images, of unit length by custom; any float type. Products accumulate in float32.
        ztxt: embeddings of texts, T = K * B with the K texts of each image one after another; K = 1 is SigLIP.
        log_scale: natural log of what multiplies the cosines (`t'` of the paper).
        bias: added to the scaled cosines.
        mesh: the devices over which the rows of both embeddings are split; None: one device.
        axis: name, or names from the outermost to the innermost, of the mesh's axes that split the rows.
        chunk_size: texts met at a time; float32 pairs alive on a device are its images x `chunk_size`. None: 256.
        mask: the pairs that count, split by rows like `zimg`; the others add nothing. B x T bits are what it costs.
        text_ids: equal numbers for equal texts (a hash, say). A text that equals one of the image's own but belongs
            to another image is not counted. Needs no B x T array.
        image_ids: equal numbers for equal images: a text of one is not counted with the other. Likewise.
        valid: the images that count, with their texts; where False, neither adds anything to any sum.

    Differentiable in embeddings, scale and bias in reverse mode, exactly, on one device and on many. What is not
    differentiated (a locked tower) is not computed.
    Raises UserError where the rows do not divide: texts by images, or images by devices; for a `chunk_size` below 1
    and an axis that the mesh lacks.
    """
    settings = _settings(sigmoid_on_device, zimg, ztxt, mesh, axis, chunk_size)
    pair_mask = PairMask(mask, text_ids, image_ids, valid)
    return _contrastive(settings, zimg, ztxt, log_scale.reshape(()), bias.reshape(()), pair_mask)


def softmax_loss(
    zimg: Float[Array, "B D"],
    ztxt: Float[Array, "T D"],
    log_scale: Float[Array, ""] | Float[Array, "1"],
    mesh: Mesh | None = None,
    axis: str | tuple[str, ...] = "data",
    chunk_size: int | None = None,
    mask: Bool[Array, "B T"] | None = None,
    text_ids: Int[Array, " T"] | None = None,
    image_ids: Int[Array, " B"] | None = None,
    valid: Bool[Array, " B"] | None = None,
) -> Float[Array, ""]:
    """Mean of the cross entropies of images over texts and of texts over images, float32 (CLIP's loss).

    Logits are `exp(log_scale) * zimg @ ztxt.T`. Of K texts of an image each is a target of weight 1 / K, and the mean
    over texts is one over T. A pair that does not count is in no sum of exponentials, and as a target it has weight 0.
    The log-sum-exps are streamed in a first round, gradients take a second one. Arguments and errors: `sigmoid_loss`.
    """
    settings = _settings(softmax_on_device, zimg, ztxt, mesh, axis, chunk_size)
    bias = jnp.zeros((), jnp.float32)
    pair_mask = PairMask(mask, text_ids, image_ids, valid)
    return _contrastive(settings, zimg, ztxt, log_scale.reshape(()), bias, pair_mask)


def _settings(on_device: Callable, zimg, ztxt, mesh, axis, chunk_size) -> _Settings:
    axes = (axis,) if isinstance(axis, str) else axis
    if mesh is not None and (missing := [name for name in axes if name not in mesh.shape]):
        raise UserError(f"the loss has axis {', '.join(missing)}, expected some of {', '.join(mesh.shape)}: change it.")
    ring = Ring() if mesh is None else ring_of(mesh, axes)
    images, texts = zimg.shape[0], ztxt.shape[0]
    if images == 0 or texts == 0 or texts % images:
        raise UserError(f"the loss has {texts} texts of {images} images, expected a multiple: change the batch.")
    if images % ring.size:
        raise UserError(
            f"the loss has {images} images on {ring.size} devices, expected a multiple: change the batch size."
        )
    chunk_size = DEFAULT_CHUNK if chunk_size is None else chunk_size
    if chunk_size < 1:
        raise UserError(f"the loss has chunk_size={chunk_size}, expected 1 or more: change it.")
    return _Settings(on_device, mesh, ring, chunk_size)


# ---- value and gradient ---------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contrastive(settings, zimg, ztxt, log_scale, bias, pair_mask):
    return _run(settings, NeedsGrad(), zimg, ztxt, log_scale, bias, pair_mask)[0]


def _contrastive_forward(settings, *arguments):
    # symbolic_zeros tells which arguments the caller differentiates: a locked tower costs nothing.
    needs_grad = NeedsGrad(*(argument.perturbed for argument in arguments[:4]))
    arrays = jax.tree.map(lambda argument: argument.value, arguments)
    loss, gradients = _run(settings, needs_grad, *arrays)
    return loss, (gradients, [jnp.zeros((), array.dtype) for array in arrays[:4]])


def _contrastive_backward(_settings, residuals, cotangent):
    gradients, like = residuals
    # Gradients wait in float32 and are cast after scaling: a float16 loss scale arrives in time to save small ones.
    scaled = (
        None if gradient is None else (gradient * cotangent).astype(array.dtype)
        for gradient, array in zip(gradients, like, strict=True)
    )
    return *scaled, None


_contrastive.defvjp(_contrastive_forward, _contrastive_backward, symbolic_zeros=True)


def _run(settings: _Settings, needs_grad: NeedsGrad, zimg, ztxt, log_scale, bias, pair_mask: PairMask):
    """Loss, and its float32 gradients."""
    dtype = jnp.promote_types(zimg.dtype, ztxt.dtype)
    if dtype == jnp.float16:  # gradients of logits, 1e-5 and less for most pairs, are below its normal numbers
        dtype = jnp.float32
    scalars = (jnp.exp(log_scale.astype(jnp.float32)), bias.astype(jnp.float32))
    arguments = (zimg.astype(dtype), ztxt.astype(dtype), *scalars, pair_mask)

    def run(*arguments):
        return settings.on_device(settings.ring, settings.chunk_size, needs_grad, *sides_of(settings.ring, *arguments))

    if settings.ring.size == 1:
        return run(*arguments)
    rows = P(settings.ring.axes)
    return jax.shard_map(
        run,
        mesh=settings.mesh,
        in_specs=(rows, rows, P(), P(), rows),
        out_specs=(P(), Gradients(rows, rows, P(), P())),
        check_vma=False,  # nothing is differentiated through it
    )(*arguments)
