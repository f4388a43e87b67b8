"""The config's `path`, and the path that it names."""

from collections.abc import Callable

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from flow_jax import paths
from train_jax.core.errors import UserError
from train_jax.core.import_path import imported

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


def defaults() -> ConfigDict:
    """The config's `path`."""
    return ConfigDict(
        {
            "name": "cond_ot",  # a key of PATHS; docs/flow.md says what they are
            "sigma_min": 0.0,  # of cond_ot: standard deviation of what is left around a data point at t = 1
            "sigma": 0.1,  # of cfm and schroedinger_bridge: noise around the line
            "beta_min": 0.1,  # of vp
            "beta_max": 20.0,
            "ve_sigma_min": 0.01,  # of ve: noise at t = 1, and at t = 0, where sampling starts from
            "ve_sigma_max": 50.0,
            "degree": 2.0,  # of polynomial
            "mu": placeholder(str),  # of gaussian: import paths "module:function" of GaussianPath's mu and sigma, which
            "std": placeholder(str),  # at t = 0 are those of the noise, whatever the data
        }
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
    return function
