"""The start-up report: trainable parameters, memory and devices."""

import os
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from train_jax.system.memory import format_bytes, step_memory

ARRAY_KINDS = ("trainable", "frozen", "optimizer")


def startup_report(
    trainable: Mapping[str, Any],
    frozen: Mapping[str, Any],
    opt_state: Any,
    compiled: jax.stages.Compiled | None = None,
    counts: Mapping[str, int] | None = None,
) -> str:
    """Returns the report: a table of parameters, the memory of the compiled training step, devices, and a hint if any.

    Args:
      trainable: arrays or `jax.ShapeDtypeStruct` by path.
      frozen: arrays or `jax.ShapeDtypeStruct` by path.
      opt_state: the optimizer's state for `trainable`.
      compiled: the training step; None leaves out its memory.
      counts: see `count_parameters`.
    """
    lines = [parameter_table(trainable, frozen, opt_state, counts)]
    memory = step_memory(compiled) if compiled is not None else None
    if memory is not None:
        lines.append(
            f"training step, per device: {format_bytes(memory.total)} = arguments {format_bytes(memory.argument)} + "
            f"outputs {format_bytes(memory.output)} - reused {format_bytes(memory.alias)} + "
            f"temporary {format_bytes(memory.temp)}"
        )
    lines.append(f"devices: {device_summary()}")
    hint = accelerator_hint()
    return "\n".join([*lines, hint] if hint else lines)


def parameter_table(
    trainable: Mapping[str, Any], frozen: Mapping[str, Any], opt_state: Any, counts: Mapping[str, int] | None = None
) -> str:
    """Returns a table of parameters and bytes for each module, the first part of a path; arguments as above."""
    modules = count_parameters(trainable, frozen, opt_state, counts)
    totals = {
        kind: (sum(row[kind][0] for row in modules.values()), sum(row[kind][1] for row in modules.values()))
        for kind in ARRAY_KINDS
    }
    rows: list[tuple[str, ...]] = [("", *ARRAY_KINDS)]
    for module, row in [*sorted(modules.items()), ("total", totals)]:
        rows.append((module, *(f"{row[kind][0]:,} ({format_bytes(row[kind][1])})" for kind in ARRAY_KINDS)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(row[column].rjust(widths[column]) for column in range(1, len(row)))])
        for row in rows
    )


def count_parameters(
    trainable: Mapping[str, Any], frozen: Mapping[str, Any], opt_state: Any, counts: Mapping[str, int] | None = None
) -> dict[str, dict[str, tuple[int, int]]]:
    """Returns `{module: {kind: (elements, bytes)}}` over all devices; kinds are "trainable", "frozen" and "optimizer".

    Optimizer state belongs to the module of its parameter; state without one, such as step counters, to "other".

    Args:
      trainable: arrays or `jax.ShapeDtypeStruct` by path.
      frozen: arrays or `jax.ShapeDtypeStruct` by path.
      opt_state: the optimizer's state for `trainable`.
      counts: number of parameters by path, for arrays whose size differs from it (two 4-bit weights in a byte).
    """
    modules: dict[str, dict[str, tuple[int, int]]] = defaultdict(lambda: dict.fromkeys(ARRAY_KINDS, (0, 0)))
    counts = counts or {}

    def count(module, kind, leaf, number):
        elements, size = modules[module][kind]
        modules[module][kind] = (elements + number, size + leaf.size * leaf.dtype.itemsize)

    for kind, params in (("trainable", trainable), ("frozen", frozen)):
        for path, leaf in params.items():
            count(path.split("/")[0], kind, leaf, counts.get(path, leaf.size))
    for keys, leaf in jax.tree_util.tree_flatten_with_path(opt_state)[0]:
        owners = [key.key for key in keys if getattr(key, "key", None) in trainable]
        count(owners[0].split("/")[0] if owners else "other", "optimizer", leaf, leaf.size)
    return dict(modules)


def device_summary() -> str:
    """Returns a summary such as "8 x NVIDIA H200, 1 process"."""
    kinds = defaultdict(int)
    for device in jax.devices():
        kinds[device.device_kind] += 1
    processes = jax.process_count()
    devices = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    return f"{devices}, {processes} process{'es' if processes > 1 else ''}"


def accelerator_hint() -> str | None:
    """Returns a hint if a GPU or TPU is present but JAX computes on the CPU; None otherwise."""
    if jax.default_backend() != "cpu":
        return None
    for name, present, extra in (("GPU", gpu_present, "cuda"), ("TPU", tpu_present, "tpu")):
        if not present():
            continue
        fact = f"a {name} is present but JAX runs on the CPU"
        if os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
            return f'{fact} because JAX_PLATFORMS="{os.environ["JAX_PLATFORMS"]}": unset it to use the {name}'
        return f'{fact}: stop and run pip install -e ".[{extra}]" to use it'
    return None


def gpu_present() -> bool:
    """Returns whether an NVIDIA device file exists or `nvidia-smi` finds a GPU."""
    if Path("/dev/nvidia0").exists():
        return True
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=10).stdout.startswith(b"GPU")
    except (OSError, subprocess.TimeoutExpired):
        return False


def tpu_present() -> bool:
    """Returns whether this seems to be a TPU machine, by its device file or environment variables."""
    return Path("/dev/accel0").exists() or any(name in os.environ for name in ("TPU_NAME", "TPU_ACCELERATOR_TYPE"))
