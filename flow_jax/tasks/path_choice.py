"""The config's `path`, and the path that it names."""

import dataclasses
from collections.abc import Callable

from ml_collections import ConfigDict

from flow_jax import paths
from train_jax.core.config_keys import key
from train_jax.core.errors import UserError
from train_jax.core.import_path import check_arguments, imported

PATHS = {
    "cond_ot": lambda config: paths.CondOT(config.sigma_min),
    "cfm": lambda config: paths.CFM(config.sigma),
    "vp": lambda config: paths.VP(config.beta_min, config.beta_max),
    "linear_vp": lambda config: paths.LinearVP(),
    "ve": lambda config: paths.VE(config.ve_sigma_min, config.ve_sigma_max),
    "cosine": lambda config: paths.Cosine(),
    "polynomial": lambda config: paths.Polynomial(config.degree),
    "schroedinger_bridge": lambda config: paths.SchrodingerBridge(config.sigma),
    "gaussian": lambda config: paths.GaussianPath(_function(config, "mu"), _function(config, "std")),
}
STOCHASTIC = ("cfm", "schroedinger_bridge")  # paths that add noise


@dataclasses.dataclass(frozen=True)
class PathKeys:
    """`config.path`."""

    name: str = key("cond_ot", "probability path from noise to data (docs/flow.md)", choices=PATHS)
    sigma_min: float = key(0.0, "standard deviation of cond_ot around a data point at t = 1", minimum=0, maximum=1)
    sigma: float = key(0.1, "standard deviation of the noise around the line in cfm and schroedinger_bridge", minimum=0)
    beta_min: float = key(0.1, "noise rate of vp at t = 1", minimum=0)
    beta_max: float = key(20.0, "noise rate of vp at t = 0", above=0)
    ve_sigma_min: float = key(0.01, "standard deviation of the noise of ve at t = 1", above=0)
    ve_sigma_max: float = key(50.0, "standard deviation of the noise of ve at t = 0, where sampling starts", above=0)
    degree: float = key(2.0, "exponent of polynomial", minimum=1)
    mu: str | None = key(None, "import path, module:function, of the mean of gaussian (mu of GaussianPath)")
    std: str | None = key(
        None,
        "import path, module:function, of the standard deviation of gaussian (sigma of GaussianPath); at t = 0, "
        "mean and deviation are those of the noise",
    )


def make_path(config: ConfigDict):
    """Returns the path that a config's `path` names.

    Raises:
      UserError: a value is not allowed for the path, or a function does not exist.
    """
    return PATHS[config.name](config)


def _function(config: ConfigDict, name: str) -> Callable:
    function = imported(f"path.{name}", config[name])
    if not callable(function):
        raise UserError(f"path.{name}={config[name]!r} is not a function (t, x_1) of one example: name another.")
    check_arguments(f"path.{name}={config[name]!r}", function, "t", "x_1")
    return function
