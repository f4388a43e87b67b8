"""Velocity models, all called as model(t, x, labels=None, dropout_keys=None)."""

from flow_jax.models.dit import DiT, DiTConfig
from flow_jax.models.mlp import MLP, MLPConfig
from flow_jax.models.unet import UNet, UNetConfig

__all__ = ["MLP", "DiT", "DiTConfig", "MLPConfig", "UNet", "UNetConfig"]
