"""Sizes of the learned prompts and adapters of a dual encoder (learned_prompts.py)."""

import dataclasses

from paligemma_jax.models.dual_encoder import DualEncoderConfig
from train_jax.core.config_keys import check_values, declared, key
from train_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """Sizes of prompts and adapters; the defaults are CoPrompt's prompts, without adapters.

    The fields are also config keys (train_jax/core/config_keys.py). The papers call the number of tokens M, the depth K
    and the mix m. A tower with 0 tokens has no prompts, and with depth 1 only its input has some. Without `coupled` the
    tokens of the image tower are parameters of their own.
    """

    text_tokens: int = key(2, "number of learned tokens in the text tower", minimum=0)
    vision_tokens: int = key(2, "number of learned tokens in the image tower", minimum=0)
    depth: int = key(9, "number of layers that have learned tokens, at most those of the tower", minimum=1)
    vision_depth: int | None = key(
        None, "number of layers of the image tower that have learned tokens; None = depth", minimum=1
    )
    coupled: bool = key(True, "whether the tokens of the image tower are linear functions of those of the text tower")
    text_adapter: int = key(0, "number of hidden units of the adapter of text embeddings, 0 = no adapter", minimum=0)
    image_adapter: int = key(0, "number of hidden units of the adapter of image embeddings, 0 = no adapter", minimum=0)
    text_mix: int | float = key(
        0.2, "share of the text adapter's output in the adapted embedding", minimum=0, maximum=1
    )
    image_mix: int | float = key(
        0.1, "share of the image adapter's output in the adapted embedding", minimum=0, maximum=1
    )

    @property
    def depths(self) -> tuple[int, int]:
        """K of the text tower and of the vision tower."""
        return self.depth, self.depth if self.vision_depth is None else self.vision_depth


def check(config: PromptConfig, model: DualEncoderConfig) -> None:
    """Raises UserError for a config that is invalid or does not fit the model."""
    check_values(declared(PromptConfig), vars(config))
    if not any((config.text_tokens, config.vision_tokens, config.text_adapter, config.image_adapter)):
        raise UserError("text_tokens, vision_tokens and both adapters are 0, expected one to be learned: raise one.")
    text, vision = config.depths
    for name, tokens, depth, tower in (
        ("depth", config.text_tokens, text, model.text),
        ("vision_depth", config.vision_tokens, vision, model.vision),
    ):
        if tokens and depth > tower.depth:
            raise UserError(
                f"{name} is {depth}, expected 1 to {tower.depth}, the layers of its tower: change it (vision_depth is "
                "depth where it is None)."
            )
    if config.coupled and config.vision_tokens:
        _check_coupled(config)
    if config.text_tokens and model.text.length <= config.text_tokens + 1:
        raise UserError(
            f"text_tokens is {config.text_tokens}, expected less than {model.text.length - 1}, as texts have "
            f"{model.text.length} tokens: lower it."
        )


def _check_coupled(config: PromptConfig) -> None:
    if config.text_tokens != config.vision_tokens:
        raise UserError(
            f"text_tokens is {config.text_tokens} and vision_tokens is {config.vision_tokens}, expected equal numbers "
            "of coupled prompts: make them equal, or set coupled=False."
        )
    text, vision = config.depths
    if vision > text:
        raise UserError(
            f"vision_depth is {vision}, expected at most depth, {text}, of coupled prompts: lower it, or set "
            "coupled=False."
        )
