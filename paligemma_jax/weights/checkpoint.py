"""What every format's reader hands to `load`: a checkpoint that is opened and described, with nothing read yet."""

import dataclasses
from collections.abc import Callable

from flax import nnx

from paligemma_jax.models.dual_encoder import DualEncoder, DualEncoderConfig
from paligemma_jax.models.paligemma import PaliGemma, PaliGemmaConfig
from paligemma_jax.weights.name_table import Row, Source

Config = PaliGemmaConfig | DualEncoderConfig


def whole_model(config: Config, rngs: nnx.Rngs | None = None) -> nnx.Module:
    """A new model; abstract under `nnx.eval_shape`."""
    make = DualEncoder if isinstance(config, DualEncoderConfig) else PaliGemma
    return make(config, rngs=rngs or nnx.Rngs(0))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
      source: its arrays.
      names: those of its arrays that the model must use up.
      rows: the name table.
      config: of the model it holds; its dtypes do not matter.
      dtype_of: the array whose dtype counts as the checkpoint's.
      build: makes the module it holds, the whole model or one tower.
    """

    source: Source
    names: set[str]
    rows: list[Row]
    config: Config
    dtype_of: str
    build: Callable[[Config], nnx.Module] = whole_model
