"""Quantization error of each codec.

    python benchmarks/quantization.py [--model=tiny]

Prints for every codec the bits per weight (with constants) and the relative error (root mean squared error / root mean
square), for normal random numbers (16 matrices of 1024 x 1024, seed 0) and for all projections of a model, by default
the shipped one. Errors are summed over all weights, so larger kernels count more.
"""

import argparse

import jax
import numpy as np

from paligemma_jax.adapt.quantization.quantize import TARGETS
from paligemma_jax.adapt.quantization.quantized_kernel import QuantizedKernel, make_codec
from paligemma_jax.models.projection import projections
from paligemma_jax.weights.reader import load
from train_jax.core import patterns

CODECS = {
    "NF4, block 64": ("nf4", 64, False),
    "NF4, block 64, double": ("nf4", 64, True),
    "NF4, block 128": ("nf4", 128, False),
    "int4, block 64": ("int4", 64, False),
    "int4, block 128": ("int4", 128, False),
    "int8, by channel": ("int8", 64, False),
}


def normal_kernels() -> list[tuple]:
    """Returns one stack of normal random kernels, with its input and output shapes."""
    return [(jax.random.normal(jax.random.key(0), (16, 1024, 1024)), (1024,), (1024,))]


def model_kernels(path: str) -> list[tuple]:
    """Returns the kernels that `quantize` quantizes by default, with their input and output shapes."""
    modules = projections(load(path, "float32"))
    return [
        (modules[name].kernel[...], modules[name].in_shape, modules[name].out_shape)
        for name in patterns.select(TARGETS, modules)
    ]


def measure(kernels: list[tuple], codec) -> tuple[float, float]:
    """Returns the bits per weight and the relative error over all kernels."""
    error = power = weights = size = 0.0
    for kernel, in_shape, out_shape in kernels:
        stored = QuantizedKernel.of(kernel, codec, in_shape, out_shape)
        values = np.asarray(kernel, np.float64)
        error += np.square(np.asarray(stored.dequantize(), np.float64) - values).sum()
        power += np.square(values).sum()
        weights, size = weights + stored.size, size + stored.nbytes
    return 8 * size / weights, float(np.sqrt(error / power))


def main() -> None:
    """Prints a row for each codec."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="path or name for pg.load")
    options = parser.parse_args()
    cases = {"normal": normal_kernels(), options.model: model_kernels(options.model)}
    print(f"{'':<24}" + "".join(f" {f'bits, {name}':>14} {f'error, {name}':>14}" for name in cases))
    for name, settings in CODECS.items():
        codec = make_codec(*settings)
        results = [measure(kernels, codec) for kernels in cases.values()]
        print(f"{name:<24}" + "".join(f" {bits:>14.3f} {error:>14.4f}" for bits, error in results), flush=True)


if __name__ == "__main__":
    main()
