"""The losses of SigLIP and CLIP, without the matrix of all pairs.

Pairs are processed one chunk of texts at a time, and the gradients are computed together with the value: the cotangent
of a scalar only scales them. On several devices, each keeps its images while blocks of texts travel around a ring
(ring.py), so that memory is that of `images per device x chunk_size` pairs, whatever the global batch.

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

from paligemma_jax.losses.contrastive.backward import NeedsGrad
from paligemma_jax.losses.contrastive.pairs import PairMask, local_arrays
from paligemma_jax.losses.contrastive.ring import Ring, ring_of
from paligemma_jax.losses.contrastive.sigmoid_softmax import sigmoid_on_device, softmax_on_device
from train_jax.core import devices
from train_jax.core.errors import UserError

DEFAULT_CHUNK = {"cpu": 256, "gpu": 256, "tpu": 2048}
"""Texts by platform. Each chunk adds to the gradient of all images of a device: on TPUs, small ones wait for memory."""


class _StaticArguments(NamedTuple):
    """The arguments that are not arrays."""

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
    """Returns the mean over images of the sum over texts of `-log sigmoid(+-(exp(log_scale) * zimg @ ztxt.T + bias))`.

    The sign is + for a text of the image and - for all others (Zhai et al. 2023, algorithm 1); the result is float32.
    The specification is losses.reference.sigmoid_loss, which computes the matrix of all pairs. Differentiable in
    embeddings, scale and bias in reverse mode, on one device and on many. Gradients that are not needed (of a locked
    tower) are not computed.

    Args:
        zimg: embeddings of images, usually of unit length; any float dtype. Products accumulate in float32.
        ztxt: embeddings of texts, T = K * B with the K texts of each image one after another; K = 1 is SigLIP.
        log_scale: natural log of the factor on the cosines (`t'` of the paper).
        bias: added to the scaled cosines.
        mesh: the devices over which the rows of both embeddings are split; None means one device.
        axis: name, or names from outermost to innermost, of the mesh axes that split the rows.
        chunk_size: texts per chunk; a device holds its images x `chunk_size` float32 pairs at a time. None means
            DEFAULT_CHUNK, 256 on CPUs.
        mask: the pairs that count, split by rows like `zimg`; the others add nothing. Takes B x T booleans of memory.
        text_ids: equal numbers for equal texts (hashes, for example). A text of another image that equals one of the
            image's own texts does not count. This needs no B x T array.
        image_ids: equal numbers for equal images: texts of one do not count with the other. This needs no B x T array.
        valid: the images that count, with their texts; where False, neither adds anything to any sum.

    Raises:
        UserError: the number of texts is not a multiple of the number of images, or the number of images not a multiple
            of the number of devices; a `chunk_size` below 1; or an axis that the mesh lacks.
    """
    static = _static_arguments(sigmoid_on_device, zimg, ztxt, mesh, axis, chunk_size)
    pair_mask = PairMask(mask, text_ids, image_ids, valid)
    return _contrastive(static, zimg, ztxt, log_scale.reshape(()), bias.reshape(()), pair_mask)


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
    """Returns the mean of the cross entropies of images over texts and of texts over images, float32 (CLIP's loss).

    The specification is losses.reference.softmax_loss (Radford et al. 2021, figure 3), which computes the matrix of all
    pairs. Logits are `exp(log_scale) * zimg @ ztxt.T`. Each of the K texts of an image is a target of weight 1 / K, and
    the cross entropy of texts is a mean over T texts. A pair that does not count is excluded from the sums of
    exponentials and has target weight 0. A first round around the ring computes the log-sum-exps, a second one the
    gradients.

    Args:
        zimg, ztxt, log_scale, mesh, axis, chunk_size, mask, text_ids, image_ids, valid: as in `sigmoid_loss`.

    Raises:
        UserError: as `sigmoid_loss`.
    """
    static = _static_arguments(softmax_on_device, zimg, ztxt, mesh, axis, chunk_size)
    bias = jnp.zeros((), jnp.float32)
    pair_mask = PairMask(mask, text_ids, image_ids, valid)
    return _contrastive(static, zimg, ztxt, log_scale.reshape(()), bias, pair_mask)


def _static_arguments(on_device: Callable, zimg, ztxt, mesh, axis, chunk_size) -> _StaticArguments:
    """Checks the arguments and returns those that are not arrays."""
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
    chunk_size = DEFAULT_CHUNK[devices.platform()] if chunk_size is None else chunk_size
    if chunk_size < 1:
        raise UserError(f"the loss has chunk_size={chunk_size}, expected 1 or more: change it.")
    return _StaticArguments(on_device, mesh, ring, chunk_size)


# ---- value and gradient ---------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contrastive(static, zimg, ztxt, log_scale, bias, pair_mask):
    return _value_and_grad(static, NeedsGrad(), zimg, ztxt, log_scale, bias, pair_mask)[0]


def _contrastive_forward(static, *arguments):
    # With symbolic_zeros, `perturbed` is False for arguments that are not differentiated: their gradients are skipped.
    needs_grad = NeedsGrad(*(argument.perturbed for argument in arguments[:4]))
    arrays = jax.tree.map(lambda argument: argument.value, arguments)
    loss, gradients = _value_and_grad(static, needs_grad, *arrays)
    return loss, (gradients, [jnp.zeros((), array.dtype) for array in arrays[:4]])


def _contrastive_backward(_static, residuals, cotangent):
    gradients, like = residuals
    # Gradients stay in float32 until they are multiplied by the cotangent: a float16 loss scale saves small ones.
    scaled = (
        None if gradient is None else (gradient * cotangent).astype(array.dtype)
        for gradient, array in zip(gradients, like, strict=True)
    )
    return *scaled, None


_contrastive.defvjp(_contrastive_forward, _contrastive_backward, symbolic_zeros=True)


def _value_and_grad(static: _StaticArguments, needs_grad: NeedsGrad, zimg, ztxt, log_scale, bias, pair_mask: PairMask):
    """Returns the loss and its float32 gradients."""
    dtype = jnp.promote_types(zimg.dtype, ztxt.dtype)
    if dtype == jnp.float16:  # gradients of logits, 1e-5 and less for most pairs, are below its normal numbers
        dtype = jnp.float32
    scalars = (jnp.exp(log_scale.astype(jnp.float32)), bias.astype(jnp.float32))
    arguments = (zimg.astype(dtype), ztxt.astype(dtype), *scalars, pair_mask)

    def run(*arguments):
        images, texts = local_arrays(static.ring, *arguments)
        loss, gradients = static.on_device(static.ring, static.chunk_size, needs_grad, images, texts)
        return loss, tuple(gradients)

    if static.ring.size == 1:
        return run(*arguments)
    rows = P(static.ring.axes)
    return jax.shard_map(
        run,
        mesh=static.mesh,
        in_specs=(rows, rows, P(), P(), rows),
        out_specs=(P(), (rows, rows, P(), P())),
        check_vma=False,  # nothing is differentiated through it
    )(*arguments)
