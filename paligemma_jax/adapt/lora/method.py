"""LoRA and DoRA by the protocol of all methods (adapt/method.py)."""

import dataclasses
from typing import ClassVar, cast

from flax import nnx

from paligemma_jax.adapt.lora import adapter
from paligemma_jax.adapt.lora.layer import LoraProjection
from paligemma_jax.adapt.method import Axes, Method, ProjectionSplit
from paligemma_jax.models.paligemma import PaliGemma


@dataclasses.dataclass(frozen=True)
class Lora(Method[PaliGemma]):
    """LoRA, or DoRA with `dora`: a low-rank update of projections.

    The options are those of `attach_lora`; `layers` are all if empty, and patterns are pairs of a pattern and a value.
    """

    name: ClassVar[str] = "lora"
    modules: ClassVar = (LoraProjection,)
    in_peft_format: ClassVar[bool] = True

    targets: str = r"decoder/.*/(q_proj|o_proj)"
    rank: int = 8
    alpha: int | float = 32.0
    dropout: int | float = 0.0
    rslora: bool = False
    dora: bool = False
    layers: tuple = ()
    rank_pattern: tuple = ()
    alpha_pattern: tuple = ()

    @property
    def trainable(self) -> str:
        """Pattern of the factors and magnitudes."""
        return adapter.TRAINABLE

    @classmethod
    def sharding_rules(cls, split: ProjectionSplit) -> tuple[tuple[str, Axes], ...]:
        """Splits A [*layers, *inputs, r] and B [*layers, r, *outputs] like the kernel; the rank is not split."""
        return (
            (f"{split.pattern}/lora_a", (*split.layers, *split.inputs, None)),
            (f"{split.pattern}/lora_b", (*split.layers, None, *split.outputs)),
        )

    def attach(self, model: PaliGemma, rngs: nnx.Rngs) -> PaliGemma:
        """As in Method."""
        attached = adapter.attach_lora(
            model,
            self.targets,
            self.rank,
            self.alpha,
            self.dropout,
            rslora=self.rslora,
            dora=self.dora,
            layers=self.layers or None,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            rngs=rngs,
        )
        return cast(PaliGemma, attached)  # the same model

    @classmethod
    def detach(cls, model: PaliGemma) -> PaliGemma:
        """As in Method."""
        return cast(PaliGemma, adapter.detach_lora(model))  # the same model

    @classmethod
    def merge(cls, model: PaliGemma) -> PaliGemma:
        """As in Method; see `merge_lora`."""
        return cast(PaliGemma, adapter.merge_lora(model))  # the same model

    def describe(self, model: PaliGemma) -> str:
        """Returns a table of the adapted modules."""
        return adapter.format_lora_table(adapter.lora_table(model))
