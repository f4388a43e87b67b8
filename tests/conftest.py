"""Configures all tests: 8 simulated CPU devices, no implicit rank promotion, shapes and types checked at runtime."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jaxtyping import install_import_hook

# Sharding is tested on several devices, and broadcasting between ranks must be explicit.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Annotations are checked by jaxtyping and beartype in the runtime and in all code that computes with arrays. Readers
# and scene generators are left out: they handle single Python objects, and the checks would cost more than the work.
PACKAGE = Path(__file__).parent.parent / "paligemma_jax"
COMPUTING = {f"paligemma_jax.{path.stem}" for path in PACKAGE.iterdir()} - {"paligemma_jax.data"}
install_import_hook(["train_jax", "flow_jax", *COMPUTING], "beartype.beartype")

# Plugins: exhaustive cases, fast compilation, freeing memory, and fixtures of a small model and its runs.
pytest_plugins = ["tests.exhaustive", "tests.fast_compile", "tests.free_memory", "tests.paligemma_jax.mini"]
