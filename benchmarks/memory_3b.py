"""Memory of fine-tuning and evaluating PaliGemma-3B, from the compiled steps: nothing of the model is allocated.

    python benchmarks/memory_3b.py [--dtype=bfloat16] [--batch=2] [--eval_batch=4] [--prefix=128] [--suffix=384]

Compiles the training step of train_jax and the programs of evaluation, by default at the sizes of configs/clevr.py:3b
(LoRA of rank 8 on the decoder's q_proj and o_proj, 224 pixels), for the device at hand, and prints what the compiler
planned. On a CPU, XLA computes bfloat16 products in float32 and keeps float32 copies of the weights for them, which a
GPU or TPU does not; the last line says how much that is at most.
"""

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from paligemma_jax.adapt import lora
from paligemma_jax.candidates import score_candidates
from paligemma_jax.generate import generate
from paligemma_jax.losses import token_cross_entropy, token_scores
from paligemma_jax.models.paligemma import PaliGemma, variant
from train_jax import metrics, optimizers, params, state
from train_jax.command_line import load_config
from train_jax.config import runtime_defaults
from train_jax.memory import format_bytes, step_memory


def abstract_model(dtype: str) -> PaliGemma:
    """The 3B model with adapters, as shapes."""

    def make():
        config = variant("3b-224").replace(both=dict(dtype=dtype, param_dtype=dtype, remat="block"))
        return lora.attach_lora(PaliGemma(config, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1), dropout=0.1)

    return nnx.eval_shape(make)


def batch_shapes(batch: int, text: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A micro-batch of rows, with the leading axis of micro-batches."""
    row = {"tokens": jnp.int32, "targets": jnp.int32, "mask_ar": jnp.int32, "mask_input": bool, "weights": jnp.float32}
    shapes = {name: jax.ShapeDtypeStruct((1, batch, text), dtype) for name, dtype in row.items()}
    return shapes | {"image": jax.ShapeDtypeStruct((1, batch, 224, 224, 3), jnp.float32)}


def training_step(model: PaliGemma, batch: dict) -> tuple:
    """The step of train_jax.state over this model, and its abstract arguments."""
    graph, arrays = params.split(model)
    trainable = {path: leaf for path, leaf in arrays.items() if path.endswith(("lora_a", "lora_b"))}
    frozen = {path: leaf for path, leaf in arrays.items() if path not in trainable}

    def loss(model, rows, keys):
        features, _ = model.encode_image(rows["image"])
        hidden, _ = model.hidden(features, rows["tokens"], rows["mask_ar"], rows["mask_input"], keys)
        table = model.decoder.embed_tokens.embedding[...]
        return token_cross_entropy(hidden, table, rows["targets"], rows["weights"]), {}

    config = runtime_defaults().optimizer
    schedule = optimizers.make_schedule(config, 100, 0)
    optimizer = optimizers.make_optimizer(config, schedule, trainable)
    step = state.make_train_step(
        lambda arrays: params.merge(graph, arrays), loss, lambda b: b["weights"].sum(), optimizer, schedule, seed=0
    )
    start = jax.eval_shape(lambda t: state.create(t, optimizer, ema=False, float16=False), trainable)
    zeros = jax.eval_shape(lambda: metrics.zeros_like(["loss", "grad_norm", "learning_rate"]))
    return step, (start, zeros, frozen, batch)


def report(name: str, compiled) -> None:
    """One line: what the compiled program takes on the device."""
    memory = step_memory(compiled)
    print(
        f"{name:<34} arguments {format_bytes(memory.argument):>9}  temporary {format_bytes(memory.temp):>9}  "
        f"in all {format_bytes(memory.total):>9}",
        flush=True,
    )


def main() -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    config = load_config(str(Path(__file__).parent.parent / "configs/clevr.py:3b"))
    parser.add_argument("--dtype", default=config.compute_dtype)
    parser.add_argument("--batch", type=int, default=config.micro_batch)
    parser.add_argument("--eval_batch", type=int, default=config.eval.batch_size)
    parser.add_argument("--prefix", type=int, default=config.data.prefix_length)
    parser.add_argument("--suffix", type=int, default=config.data.suffix_length)
    options = parser.parse_args()
    text = options.prefix + options.suffix - 1  # the first token is only read, the last only predicted
    model = abstract_model(options.dtype)
    print(
        f"{jax.devices()[0].device_kind}, {options.dtype}, 256 image + {text} text tokens, batch {options.batch} in "
        f"training and {options.eval_batch} in evaluation"
    )
    step, arguments = training_step(model, batch_shapes(options.batch, text))
    report("LoRA training step", jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile())

    B = options.eval_batch
    rows = {name: jax.ShapeDtypeStruct(s.shape[1:], s.dtype) for name, s in batch_shapes(B, text).items()}
    prompt = jax.ShapeDtypeStruct((B, options.prefix), jnp.int32)
    mask = jax.ShapeDtypeStruct((B, options.prefix), bool)
    features = jax.ShapeDtypeStruct((B, 256, 2048), jnp.float32)
    candidates = jax.ShapeDtypeStruct((28, 3), jnp.int32), jax.ShapeDtypeStruct((28, 3), bool)

    def token_loss(model, rows, features):
        hidden, _ = model.hidden(features, rows["tokens"], rows["mask_ar"], rows["mask_input"])
        return token_scores(hidden, model.decoder.embed_tokens.embedding[...], rows["targets"]).log_probs

    answer = functools.partial(generate, max_new_tokens=options.suffix)
    report(
        "evaluation: image features", jax.jit(lambda m, i: m.encode_image(i)[0]).lower(model, rows["image"]).compile()
    )
    report(
        "evaluation: generated answers",
        jax.jit(lambda m, f, t, k: answer(m, None, t, k, image_features=f))
        .lower(model, features, prompt, mask)
        .compile(),
    )
    report(
        "evaluation: likelihood of 28",
        jax.jit(score_candidates).lower(model, features, prompt, mask, *candidates).compile(),
    )
    report("evaluation: token loss", jax.jit(token_loss).lower(model, rows, features).compile())
    if jax.default_backend() == "cpu" and options.dtype != "float32":
        weights = sum(leaf.size for leaf in params.abstract(model).values()) * 4
        print(f"(of which float32 copies that the CPU backend makes of the weights: up to {format_bytes(weights)})")


if __name__ == "__main__":
    main()
