"""Flow matching between two distributions in the plane; the flow to try first.

    python train.py --config=configs/flow_2d.py
    python train.py --config=configs/flow_2d.py:moons

trains a flow from a Gaussian to a checkerboard, with minibatch optimal transport. The argument names other data:
8gaussians, moons or spirals; two of them joined by `_to_`, as in `:8gaussians_to_moons`, start from the first instead
of a Gaussian. The workdir gets figures of samples, density, learned field and trajectories, and an animation, flow.gif.
"""

from ml_collections import ConfigDict

from train_jax.config import base_config
from train_jax.core.errors import UserError

DATA = ("checkerboard", "8gaussians", "moons", "spirals")


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; arg is a name in `DATA`, or two joined by "_to_".

    Raises:
      UserError: another argument.
    """
    config = base_config("flow_jax.tasks.plane:PlaneFlow")
    config.data.noise, config.data.name = endpoints(arg or DATA[0])
    config.coupling.name = "exact"  # straighter paths, so that sampling takes fewer steps
    config.total_steps = 10_000
    config.batch_size = 256  # an exact coupling of 512 takes eight times as long as one of 256
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 200
    config.ema_decay = 0.999
    config.log_steps = 500
    config.eval_steps = 2000
    config.eval.validation_draws = 5  # W2 varies more between draws than it falls in training
    config.checkpoint_steps = 2000
    return config


def endpoints(arg: str) -> tuple[str, str]:
    """Returns the names of the distributions at which the flow starts and ends."""
    noise, _, data = arg.rpartition("_to_")
    if data not in DATA or (noise and noise not in DATA):
        raise UserError(f"config argument {arg!r}: expected one of {', '.join(DATA)}, or two of them joined by _to_.")
    return noise or "gaussian", data
