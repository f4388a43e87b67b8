"""Sizes of the learned prompts and adapters of a dual encoder (learned_prompts.py)."""

import dataclasses

from paligemma_jax.models.dual_encoder import DualEncoderConfig
from train_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """Sizes of prompts and adapters; the defaults are CoPrompt's prompts, without adapters.

    Attributes:
      text_tokens, vision_tokens: number of prompts M of either tower, 0 for none.
      depth: number of layers K with prompts in the text tower; with 1 only the input has prompts.
      vision_depth: K of the vision tower; None means `depth`.
      coupled: whether vision prompts are linear maps of text prompts, or else parameters of their own.
      text_adapter, image_adapter: hidden units of the adapters of the embeddings, 0 for none.
      text_mix, image_mix: m, the weight of an adapter's output, 0 to 1.
    """

    text_tokens: int = 2
    vision_tokens: int = 2
    depth: int = 9
    vision_depth: int | None = None
    coupled: bool = True
    text_adapter: int = 0
    image_adapter: int = 0
    text_mix: int | float = 0.2
    image_mix: int | float = 0.1

    @property
    def depths(self) -> tuple[int, int]:
        """K of the text tower and of the vision tower."""
        return self.depth, self.depth if self.vision_depth is None else self.vision_depth


def check(config: PromptConfig, model: DualEncoderConfig) -> None:
    """Raises UserError for a config that is invalid or does not fit the model."""
    sizes = dataclasses.asdict(config)
    for key in ("text_tokens", "vision_tokens", "text_adapter", "image_adapter"):
        if sizes[key] < 0:
            raise UserError(f"{key} is {sizes[key]}, expected 0 or more: change it.")
    for key in ("text_mix", "image_mix"):
        if not 0.0 <= sizes[key] <= 1.0:
            raise UserError(f"{key} is {sizes[key]}, expected a share between 0 and 1: change it.")
    if not any((config.text_tokens, config.vision_tokens, config.text_adapter, config.image_adapter)):
        raise UserError("text_tokens, vision_tokens and both adapters are 0, expected one to be learned: raise one.")
    text, vision = config.depths
    for key, tokens, depth, tower in (
        ("depth", config.text_tokens, text, model.text),
        ("vision_depth", config.vision_tokens, vision, model.vision),
    ):
        if tokens and not 1 <= depth <= tower.depth:
            raise UserError(
                f"{key} is {depth}, expected 1 to {tower.depth}, the layers of its tower: change it (vision_depth is "
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
