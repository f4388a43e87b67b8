"""Times decoding with PaliGemma-3B on this machine's device: milliseconds a token, and the share of its bandwidth.

    python benchmarks/decode.py [--kinds=bfloat16,int8,nf4] [--batches=1,16] [--tokens=64] [--prompt=32] [--tiny]

Weights are random with the released sizes (224 pixels), and EOS never ends a row. A token takes at least the time of
reading what every step reads: the decoder's layers, the embedding for its logits, and the cache of image, prompt and
half of the new tokens. "Bandwidth" is that time over the measured one, with the published bandwidth of the device. The
time of a token is the difference of two generations that differ in length, so image and prompt are not in it.
`--tiny` takes the shipped model, to test the script.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.generation.generate import generate
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.weights.reader import load
from train_jax.core import param_tree
from train_jax.system.memory import reported_peak

WEIGHT_KINDS = ("bfloat16", "int8", "nf4")
BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.0e12, "L4": 0.3e12, "T4": 0.32e12, "TPU v5 lite": 0.819e12}
"""Published bytes a second by `device_kind`; of an H100 with HBM3 and an A100 with 80 GB."""


def main() -> None:
    """Prints a row for each kind of weights and batch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kinds", default=",".join(WEIGHT_KINDS), help="weights of the layers: bfloat16, int8, nf4")
    parser.add_argument("--batches", default="1,16", help="numbers of rows")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens, 2 or more")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--repeats", type=int, default=5, help="generations of each length; the median counts")
    parser.add_argument("--tiny", action="store_true", help="the shipped model instead of 3B, to test the script")
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    if not set(kinds) <= set(WEIGHT_KINDS):
        parser.error(f"--kinds is {options.kinds}, expected some of {', '.join(WEIGHT_KINDS)}")
    if options.tokens < 2:
        parser.error(f"--tokens is {options.tokens}, expected 2 or more: the times of two lengths are compared")
    device = jax.devices()[0].device_kind
    bandwidth = next((each for name, each in BANDWIDTH.items() if name in device), float("nan"))
    print(f"{device}, {bandwidth / 1e12:.3g} TB/s, JAX {jax.__version__}")
    print("| weights | batch | ms a token | least | bandwidth | image to first token, ms | compilation, s | peak GiB |")
    print("|---|---|---|---|---|---|---|---|")
    for kind in kinds:
        quantize = None if kind == "bfloat16" else kind
        model = load("tiny" if options.tiny else "random:3b-224", "bfloat16", quantize=quantize)
        assert isinstance(model, PaliGemma)
        for batch in map(int, options.batches.split(",")):
            print(row(model, kind, batch, options, bandwidth), flush=True)


def row(model: PaliGemma, kind: str, batch: int, options: argparse.Namespace, bandwidth: float) -> str:
    """Measures one batch and returns its row of the table."""
    side, numbers = model.config.vision.image_size, np.random.default_rng(0)
    images = jnp.asarray(numbers.uniform(-1, 1, (batch, side, side, 3)), jnp.float32)
    tokens = jnp.asarray(numbers.integers(3, 1000, (batch, options.prompt)), jnp.int32)

    def seconds(count: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(generate(model, images, tokens, max_new_tokens=count, eos_id=-1))
        return time.perf_counter() - began

    compilation = seconds(options.tokens) + seconds(1)
    whole, first = (statistics.median(seconds(n) for _ in range(options.repeats)) for n in (options.tokens, 1))
    token = (whole - first) / (options.tokens - 1)
    least = bytes_per_token(model, batch, options.prompt + options.tokens // 2) / bandwidth
    return (
        f"| {kind} | {batch} | {1e3 * token:.3f} | {1e3 * least:.3f} | {least / token:.0%} | {1e3 * first:.1f} | "
        f"{compilation:.1f} | {(reported_peak() or 0) / 2**30:.2f} |"
    )


def bytes_per_token(model: PaliGemma, batch: int, text: int) -> int:
    """Returns the bytes that a step reads: the decoder's parameters and the cache of the image and `text` tokens."""
    weights = sum(leaf.nbytes for leaf in param_tree.flatten(model.decoder).values())
    cache = jax.eval_shape(lambda: model.decoder.empty_cache(batch, model.config.vision.num_patches + text))
    return weights + sum(leaf.size * leaf.dtype.itemsize for leaf in cache.values())


if __name__ == "__main__":
    main()
