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

    name: str = key("cond_ot", "probability path (docs/flow.md)", choices=PATHS)
    sigma_min: float = key(0.0, "cond_ot: standard deviation around a data point at t = 1")
    sigma: float = key(0.1, "cfm and schroedinger_bridge: standard deviation of the noise around the line")
    beta_min: float = key(0.1, "vp: noise rate at one end")
    beta_max: float = key(20.0, "vp: noise rate at the other")
    ve_sigma_min: float = key(0.01, "ve: standard deviation of the noise at t = 1")
    ve_sigma_max: float = key(50.0, "ve: standard deviation of the noise at t = 0, where sampling starts")
    degree: float = key(2.0, "polynomial: the exponent")
    mu: str | None = key(None, "gaussian: import path, module:function, of GaussianPath's mu")
    std: str | None = key(None, "gaussian: import path of its sigma; both are those of the noise at t = 0")


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
