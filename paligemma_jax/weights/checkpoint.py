"""An opened checkpoint: what every format's reader returns to `load`, before any array is read."""

import dataclasses
from collections.abc import Callable

from flax import nnx

from paligemma_jax.models.dual_encoder import DualEncoder, DualEncoderConfig
from paligemma_jax.models.gemma import Gemma
from paligemma_jax.models.paligemma import PaliGemma, PaliGemmaConfig
from paligemma_jax.models.vit import ViT
from paligemma_jax.weights.name_table import ArraySource, Row

Config = PaliGemmaConfig | DualEncoderConfig
Model = PaliGemma | DualEncoder | ViT | Gemma


def whole_model(config: Config, rngs: nnx.Rngs | None = None) -> PaliGemma | DualEncoder:
    """Returns a new model; abstract under `nnx.eval_shape`."""
    rngs = rngs or nnx.Rngs(0)
    return DualEncoder(config, rngs=rngs) if isinstance(config, DualEncoderConfig) else PaliGemma(config, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
      source: its arrays.
      names: the arrays that the model must use, all of them.
      rows: the name table.
      config: of the model it holds; its dtypes are ignored.
      dtype_of: name of the array whose dtype is the checkpoint's.
      build: makes the module it holds, the whole model or one tower.
    """

    source: ArraySource
    names: set[str]
    rows: list[Row]
    config: Config
    dtype_of: str
    build: Callable[[Config], Model] = whole_model
