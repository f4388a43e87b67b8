"""TPU slices to plan for on a machine without TPUs: libtpu (the extra [tpu]) compiles without the devices.

The numbers of the chips are those that Google publishes; the clock converts the compiler's cycles to time.
"""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax

from train_jax.core.errors import UserError

# Without these libtpu asks the cloud's metadata server where it runs, and prints warnings.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two plans at a time, as nothing opens a device
}


# Of the compiler: "HLO temporaries (461.65G) exceeds", "Used 17.2G of 15.75G hbm".
_NEEDED = re.compile(r"(?:temporaries \(|Used )([\d.]+)([KMGT])")


class Chip(NamedTuple):
    """A TPU chip, or a core of one.

    Attributes:
      name: as in the name of a topology.
      memory: HBM in bytes.
      clock: cycles per second.
      flops: peak of bfloat16 products per second.
      bandwidth: of HBM, bytes per second.
      link_bandwidth: of all links to other chips together, bytes per second.
    """

    name: str
    memory: float
    clock: float
    flops: float
    bandwidth: float
    link_bandwidth: float

    def core(self, cores: int) -> "Chip":
        """Returns one of several cores that share the chip."""
        memory, flops, bandwidth, links = (
            value / cores for value in (self.memory, self.flops, self.bandwidth, self.link_bandwidth)
        )
        return Chip(self.name, memory, self.clock, flops, bandwidth, links)


CHIPS = {
    "TPU v4": Chip("v4", 32e9, 1.05e9, 275e12, 1228e9, 300e9),
    "TPU v5 lite": Chip("v5e", 16e9, 1.5e9, 197e12, 819e9, 200e9),
    "TPU v5": Chip("v5p", 95e9, 1.75e9, 459e12, 2765e9, 600e9),
    "TPU v6 lite": Chip("v6e", 32e9, 1.75e9, 918e12, 1640e9, 448e9),
}
"""Chips by `device_kind`."""


class DoesNotFitError(UserError):
    """A program needs more memory than a chip has, so the compiler makes none.

    Attributes:
      needed: memory of the program in GiB by the compiler's message; NaN if it does not say.
    """

    def __init__(self, name: str, chip: Chip, error: Exception):
        """Takes the name of the program and the compiler's error."""
        sizes = _NEEDED.search(str(error))
        self.needed = float("nan") if sizes is None else float(sizes[1]) * 1024 ** (" KMGT".index(sizes[2]) - 3)
        amount = "more memory" if sizes is None else f"{self.needed:.3g} GiB of memory"
        super().__init__(
            f"the {name} needs {amount} on each {chip.name}, expected at most {chip.memory / 2**30:.3g} GiB: plan for "
            "more chips with --mesh=fsdp=N, a smaller batch or micro-batch, or a quantized base"
        )


class Slice(NamedTuple):
    """The devices of a slice to compile for, and the properties of one of them."""

    devices: Sequence[jax.Device]  # pyright: ignore[reportInvalidTypeForm]  (JAX assigns the class)
    chip: Chip


def open_slice(name: str) -> Slice:
    """Returns the slice of a topology such as "v5e:4x4" or "v4:2x2x4"; nothing runs on it.

    Raises:
      UserError: libtpu is not installed, or there is no such topology.
    """
    if not name:
        raise UserError("--tpu is empty, expected a topology: write --tpu=v5e:4x4 or the like")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--tpu={name} needs libtpu, which compiles for TPUs: pip install 'paligemma-jax[tpu]'")
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    chips = math.prod(int(size) for size in re.findall(r"\d+", name.partition(":")[2]))
    hosts = {"chips_per_host_bounds": (1, 1, 1)} if chips == 1 else {}  # the default is four chips
    try:
        devices = list(topologies.get_topology_desc(platform="tpu", topology_name=name, **hosts).devices)
    except Exception as error:  # JAX's own class for errors of the compiler is not public
        reason = str(error).splitlines()[0]
        raise UserError(f"--tpu={name} is no topology ({reason}): write one such as v5e:4x4 or v5p:2x2x4") from error
    kind = devices[0].device_kind
    if kind not in CHIPS:
        raise UserError(f"--tpu={name} has chips of kind {kind!r}, expected one of {', '.join(CHIPS)}: choose another")
    return Slice(devices, CHIPS[kind].core(len(devices) // chips))
