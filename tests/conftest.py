"""Every test runs on 8 fake CPU devices, with strict broadcasting, and with shapes and types checked at each call."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jaxtyping import install_import_hook

# Sharding code meets several devices, and shapes of different rank meet only where the code says so.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Annotations are executed: jaxtyping's shapes under beartype, in the runtime and in everything that computes on arrays.
# Readers and scene makers are left out: they handle one Python object at a time, and the checks would cost more than
# the work.
PACKAGE = Path(__file__).parent.parent / "paligemma_jax"
COMPUTING = {f"paligemma_jax.{path.stem}" for path in PACKAGE.iterdir()} - {"paligemma_jax.data"}
install_import_hook(["train_jax", "flow_jax", *COMPUTING], "beartype.beartype")

# Cases that run only when asked for; fixtures for quick compilation, for memory, and of a small model and its runs, for
# the tests of tasks and entry points.
pytest_plugins = ["tests.exhaustive", "tests.fast_compile", "tests.let_go", "tests.paligemma_jax.mini"]
