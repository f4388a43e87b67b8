"""Keeps compiled programs on disk, so that a second start of a run, a sweep or an evaluation compiles nothing."""

import hashlib
import platform
from pathlib import Path

import jax

from train_jax.core.files import cache_dir

DEFAULT_MB = 2048


def enable(megabytes: int = DEFAULT_MB) -> None:
    """Keeps the programs that are compiled from now on in the cache folder, the most recently used ones.

    Does nothing if the folder of the cache is already set, as by JAX_COMPILATION_CACHE_DIR. Faults of the cache (a
    damaged file, a full disk) are warnings of JAX, which compiles instead.

    Args:
      megabytes: limit of the folder's size; 0 keeps none.
    """
    if megabytes == 0 or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    folder = Path(cache_dir()).expanduser() / "compiled" / _machine()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", megabytes * 2**20)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _machine() -> str:
    """Returns a name of this kind of CPU: JAX's keys of CPU programs leave out the instructions that they need."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
