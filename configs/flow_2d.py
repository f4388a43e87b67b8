"""Flow matching between distributions in the plane; the first thing to try.

    python train.py --config=configs/flow_2d.py
    python train.py --config=configs/flow_2d.py:moons

learns a flow from a Gaussian to a checkerboard (or to 8gaussians, moons, spirals; `:8gaussians_to_moons` starts from
eight Gaussians instead) and leaves samples, density, learned field, trajectories and an animated flow.gif in the
workdir.
"""

from ml_collections import ConfigDict

from train_jax.config import base_config
from train_jax.core.errors import UserError

DATA = ("checkerboard", "8gaussians", "moons", "spirals")


def get_config(arg: str | None = None) -> ConfigDict:
    """The config; arg: the data, or "8gaussians_to_moons".

    Raises:
      UserError: another one.
    """
    config = base_config("flow_jax.tasks.plane:PlaneFlow")
    config.data.noise, config.data.name = endpoints(arg or DATA[0])
    config.coupling.name = "exact"  # straighter paths, and fewer steps to sample
    config.total_steps = 10_000
    config.batch_size = 256  # an exact coupling of 512 takes eight times as long as one of 256
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 200
    config.ema_decay = 0.999
    config.log_steps = 500
    config.eval_steps = 2000
    config.eval.validation_draws = 5  # one draw of points differs more from another than W2 falls in training
    config.checkpoint_steps = 2000
    return config


def endpoints(arg: str) -> tuple[str, str]:
    """Where the flow starts and where it ends."""
    noise, _, data = arg.rpartition("_to_")
    if data not in DATA or (noise and noise not in DATA):
        raise UserError(f"the config argument is {arg!r}, expected one of {', '.join(DATA)}, or two joined by _to_.")
    return noise or "gaussian", data
