"""Sweep over paths and couplings of flow matching in the plane, after Lipman et al. 2023 and Tong et al. 2024.

    python train.py --config=configs/flow_paths.py

trains conditional optimal transport (cond_ot), the variance-preserving diffusion path (vp) and minibatch optimal
transport (ot_cfm) on the checkerboard of configs/flow_2d.py, three seeds each. The table (sweep.md) and the figure
(sweep.png) show likelihood, W2, evaluations of the velocity at equal tolerance, straightness, the error against the
number of fixed steps, and W2 over the course of training.

`:sigma_min` sweeps `path.sigma_min` instead, the standard deviation around a data point at the end of the path.
"""

from ml_collections import ConfigDict

from configs import flow_2d
from train_jax.config import parse_arg
from train_jax.sweep.seeds import over_seeds

METHODS = {
    "cond_ot": {"path.name": "cond_ot", "coupling.name": "independent"},
    "vp": {"path.name": "vp", "coupling.name": "independent"},
    "ot_cfm": {"path.name": "cond_ot", "coupling.name": "exact"},
}
SIGMA_MIN = (0.0, 0.05, 0.2)


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the sweep; arg is "sigma_min"."""
    arg = parse_arg(arg, sigma_min=False)
    config = flow_2d.get_config("checkerboard")
    config.sweep.metric = "nll"
    config.sweep.more = ("w2", "nfe", "straightness", "coverage")
    config.sweep.curves = ("error_by_nfe", "w2_by_step")
    config.eval_steps = 1000
    if arg.sigma_min:
        config.coupling.name = "independent"
        config.sweep.x = "path.sigma_min"
        runs = {f"sigma_min-{sigma}": {"path.sigma_min": sigma} for sigma in SIGMA_MIN}
    else:
        runs = METHODS
    config.sweep.runs = over_seeds(runs)
    return config
