"""Paths and couplings of flow matching against each other in the plane: Lipman et al. 2023, Tong et al. 2024 in small.

    python train.py --config=configs/flow_paths.py

trains conditional optimal transport (cond_ot), the variance-preserving diffusion path (vp) and minibatch optimal
transport (ot_cfm) on a checkerboard with three seeds, and writes a table (sweep.md) and a figure (sweep.png):
likelihood, W2, evaluations at equal tolerance, straightness; error against evaluations at fixed steps, and W2 in the
course of training. `:sigma_min` varies what is left around a data point at the end of the path.
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
WIDTHS = (0.0, 0.05, 0.2)


def get_config(arg: str | None = None) -> ConfigDict:
    """The config; arg "sigma_min" for the other sweep."""
    arg = parse_arg(arg, sigma_min=False)
    config = flow_2d.get_config("checkerboard")
    config.sweep.metric = "nll"
    config.sweep.more = ("w2", "nfe", "straightness", "coverage")
    config.sweep.curves = ("error_by_nfe", "w2_by_step")
    config.eval_steps = 1000
    if arg.sigma_min:
        config.coupling.name = "independent"
        config.sweep.x = "path.sigma_min"
        runs = {f"sigma_min-{width}": {"path.sigma_min": width} for width in WIDTHS}
    else:
        runs = METHODS
    config.sweep.runs = over_seeds(runs)
    return config
