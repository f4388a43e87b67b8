"""Starts multi-process runs: reads the flags by which the processes find each other.

Every process runs the same command. On a TPU pod, under Slurm, Open MPI or Kubernetes, `--distributed` is enough.
Elsewhere each process is given its index:

    python train.py --config=configs/clevr.py --coordinator=10.0.0.1:1234 --num_processes=2 --process_id=0   # and 1
"""

from typing import Any

import jax
from absl import flags

from train_jax.core.errors import UserError

FLAGS = ("coordinator", "num_processes", "process_id")


def define_flags(values: flags.FlagValues) -> None:
    """Adds the flags that `start_from_flags` reads."""
    flags.DEFINE_bool("distributed", False, "join the processes of a cluster that JAX detects", flag_values=values)
    flags.DEFINE_string("coordinator", None, "host:port of process 0, on other clusters", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "number of processes", flag_values=values)
    flags.DEFINE_integer("process_id", None, "index of this process, from 0", flag_values=values)


def start_from_flags(values: Any) -> None:
    """Calls `start` if the flags ask for it; does nothing otherwise."""
    arguments = {name: values[name].value for name in FLAGS}
    if values.distributed or any(value is not None for value in arguments.values()):
        start(**arguments)


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the other processes. Call it once, before any computation.

    If all three arguments are None, JAX reads them from the environment of the cluster.

    Args:
      coordinator: "host:port" of process 0, a free port that all processes can reach.
      num_processes: number of processes.
      process_id: index of this process, 0 to `num_processes` - 1.

    Raises:
      UserError: some of the arguments are missing or out of range, or no cluster is found.
    """
    arguments = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in arguments.items() if value is None]
    if 0 < len(missing) < len(FLAGS):
        raise UserError(f"{' and '.join(missing)} not given, expected --coordinator, --num_processes and --process_id "
                        "together: add what is missing, or use --distributed alone on a cluster")  # fmt: skip
    if coordinator is None or num_processes is None or process_id is None:
        try:
            jax.distributed.initialize()
        except ValueError as error:  # JAX detects no cluster
            raise UserError("--distributed finds no cluster that JAX knows, expected a TPU pod, Slurm, Open MPI or "
                            "Kubernetes: give --coordinator, --num_processes and --process_id") from error  # fmt: skip
        return
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id}, expected 0 to {num_processes - 1}: correct it or --num_processes")
    if not coordinator.rpartition(":")[2].isdigit():
        raise UserError(f"--coordinator={coordinator}, expected host:port such as 10.0.0.1:1234: add the port")
    jax.distributed.initialize(coordinator, num_processes, process_id)
