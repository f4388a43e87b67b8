"""The losses of all pairs as plain matrices, and batches for them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from train_jax.parallel.sharding import make_mesh


def counted_and_positive(zimg, ztxt, mask=None, text_ids=None, image_ids=None, valid=None):
    """Returns which pairs count and which are positive, [B, T]."""
    images, texts = zimg.shape[0], ztxt.shape[0]
    positive = np.kron(np.eye(images, dtype=bool), np.ones((1, texts // images), bool))
    counted = np.ones((images, texts), bool) if mask is None else np.array(mask)
    if text_ids is not None:
        for image in range(images):
            own = set(np.asarray(text_ids)[positive[image]].tolist())
            for text in range(texts):
                if not positive[image, text] and int(text_ids[text]) in own:
                    counted[image, text] = False
    owner = positive.argmax(axis=0)
    for image, text in np.ndindex(images, texts):
        if image_ids is not None and not positive[image, text] and image_ids[image] == image_ids[owner[text]]:
            counted[image, text] = False
        if valid is not None and not (valid[image] and valid[owner[text]]):
            counted[image, text] = False
    return jnp.asarray(counted), jnp.asarray(positive)


def plain_sigmoid(zimg, ztxt, log_scale, bias, **which):
    counted, positive = counted_and_positive(zimg, ztxt, **which)
    logits = jnp.exp(log_scale) * zimg.astype(jnp.float32) @ ztxt.astype(jnp.float32).T + bias
    losses = -jax.nn.log_sigmoid(jnp.where(positive, logits, -logits))
    return jnp.where(counted, losses, 0.0).sum(axis=1).mean()


def plain_softmax(zimg, ztxt, log_scale, _bias, **which):
    counted, positive = counted_and_positive(zimg, ztxt, **which)
    logits = jnp.exp(log_scale) * zimg.astype(jnp.float32) @ ztxt.astype(jnp.float32).T
    share = zimg.shape[0] / ztxt.shape[0]

    def cross_entropy(axis):
        log_probs = jax.nn.log_softmax(jnp.where(counted, logits, -1e30), axis)
        return -jnp.where(counted & positive, share * log_probs, 0.0).sum()

    return 0.5 * (cross_entropy(0) + cross_entropy(1)) / zimg.shape[0]


def make_batch(images=16, texts_of_each=1, width=6, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    zimg = rng.normal(size=(images, width))
    ztxt = rng.normal(size=(images * texts_of_each, width)) + 0.5 * np.repeat(zimg, texts_of_each, axis=0)
    unit = [jnp.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype) for rows in (zimg, ztxt)]
    return *unit, jnp.float32(1.5), jnp.float32(-2.0)


def mesh_of(data, fsdp=1, tensor=1):
    return make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor})


def abstract_batch(batch, width, devices, dtype=jnp.float32):
    """Shapes of a batch that is split over a mesh of so many devices, and the mesh."""
    mesh = mesh_of(devices)
    rows = jax.ShapeDtypeStruct((batch, width), dtype, sharding=NamedSharding(mesh, P("data")))
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, P()))
    return (rows, rows, scalar, scalar), mesh
