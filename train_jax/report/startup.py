"""The start-up report: what trains, what it takes, and on which devices."""

import os
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from train_jax.system.memory import format_bytes, step_memory

KINDS = ("trainable", "frozen", "optimizer")


def startup_report(
    trainable: Mapping[str, Any],
    frozen: Mapping[str, Any],
    opt_state: Any,
    compiled: jax.stages.Compiled | None = None,
    counts: Mapping[str, int] | None = None,
) -> str:
    """Text of the report: table of parameters, memory of the compiled training step, devices, and a hint if any.

    Args:
      trainable, frozen: flat dicts of arrays or `jax.ShapeDtypeStruct`.
      opt_state: the optimizer's state over `trainable`.
      compiled: the training step; its memory is left out when None.
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
    """Parameters and bytes per tower (first part of the path); optimizer state counts where its parameter does."""
    towers = count_parameters(trainable, frozen, opt_state, counts)
    totals = {kind: tuple(sum(row[kind][i] for row in towers.values()) for i in (0, 1)) for kind in KINDS}
    rows = [("", *KINDS)]
    for tower, row in [*sorted(towers.items()), ("total", totals)]:
        rows.append((tower, *(f"{row[kind][0]:,} ({format_bytes(row[kind][1])})" for kind in KINDS)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(row[column].rjust(widths[column]) for column in range(1, len(row)))])
        for row in rows
    )


def count_parameters(
    trainable: Mapping[str, Any], frozen: Mapping[str, Any], opt_state: Any, counts: Mapping[str, int] | None = None
) -> dict[str, dict[str, tuple[int, int]]]:
    """`{tower: {kind: (elements, bytes)}}`, kinds "trainable", "frozen" and "optimizer", over all devices together.

    Step counters and other state that belongs to no parameter stand under the tower "other".

    Args:
      trainable, frozen, opt_state: as of `startup_report`.
      counts: how many parameters an array stands for, by path, where that is not its size (two 4-bit weights a byte).
    """
    towers: dict[str, dict[str, tuple[int, int]]] = defaultdict(lambda: dict.fromkeys(KINDS, (0, 0)))
    counts = counts or {}

    def count(tower, kind, leaf, number):
        elements, size = towers[tower][kind]
        towers[tower][kind] = (elements + number, size + leaf.size * leaf.dtype.itemsize)

    for kind, params in (("trainable", trainable), ("frozen", frozen)):
        for path, leaf in params.items():
            count(path.split("/")[0], kind, leaf, counts.get(path, leaf.size))
    for keys, leaf in jax.tree_util.tree_flatten_with_path(opt_state)[0]:
        owners = [key.key for key in keys if getattr(key, "key", None) in trainable]
        count(owners[0].split("/")[0] if owners else "other", "optimizer", leaf, leaf.size)
    return dict(towers)


def device_summary() -> str:
    """E.g. "8 x NVIDIA H200, 1 process"."""
    kinds = defaultdict(int)
    for device in jax.devices():
        kinds[device.device_kind] += 1
    processes = jax.process_count()
    found = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    return f"{found}, {processes} process{'es' if processes > 1 else ''}"


def accelerator_hint() -> str | None:
    """One sentence when a GPU or a TPU is present and JAX computes on the CPU all the same; None otherwise."""
    if jax.default_backend() != "cpu":
        return None
    for name, present, extra in (("GPU", gpu_present, "cuda"), ("TPU", tpu_present, "tpu")):
        if not present():
            continue
        found = f"a {name} is present but JAX runs on the CPU"
        if os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
            return f'{found} because JAX_PLATFORMS="{os.environ["JAX_PLATFORMS"]}": unset it to use the {name}'
        return f'{found}: stop and run pip install -e ".[{extra}]" to use it'
    return None


def gpu_present() -> bool:
    """Whether an NVIDIA device file exists or `nvidia-smi` finds a GPU."""
    if Path("/dev/nvidia0").exists():
        return True
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=10).stdout.startswith(b"GPU")
    except (OSError, subprocess.TimeoutExpired):
        return False


def tpu_present() -> bool:
    """Whether this looks like a TPU machine: its device file or the variables that its image sets."""
    return Path("/dev/accel0").exists() or any(name in os.environ for name in ("TPU_NAME", "TPU_ACCELERATOR_TYPE"))
