"""Few-shot methods of a dual encoder by name: the prompts of each, the parameters that train, and the loss."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from flax import nnx

from paligemma_jax.adapt.few_shot import learned_prompts
from paligemma_jax.adapt.few_shot.prompt_config import PromptConfig
from paligemma_jax.adapt.method import Method, not_mergeable
from paligemma_jax.models.dual_encoder import DualEncoder
from train_jax.core.errors import UserError
from train_jax.core.patterns import did_you_mean


@dataclasses.dataclass(frozen=True)
class LearnedPrompts(Method[DualEncoder]):
    """Prompts and adapters, by the protocol of all methods.

    Attributes:
      config: sizes.
      init_words: see `attach_prompts`.
    """

    name: ClassVar[str] = "prompts"
    modules: ClassVar = (learned_prompts.PromptedDualEncoder,)

    config: PromptConfig
    init_words: tuple[int, ...] | None = None

    @property
    def trainable(self) -> str:
        """Pattern of all parameters of the prompts and adapters."""
        return learned_prompts.TRAINABLE

    def attach(self, model: DualEncoder, rngs: nnx.Rngs) -> DualEncoder:
        """As in Method."""
        return learned_prompts.attach_prompts(model, self.config, init_words=self.init_words, rngs=rngs)

    @classmethod
    def detach(cls, model: DualEncoder) -> DualEncoder:
        """As in Method."""
        return learned_prompts.detach_prompts(model)

    @classmethod
    def merge(cls, model: DualEncoder) -> DualEncoder:
        """Raises UserError."""
        raise not_mergeable("learned prompts", "they come from no image and no text")


@dataclasses.dataclass(frozen=True)
class FewShotMethod:
    """A few-shot method.

    Attributes:
      prompts: the prompts and adapters to attach, or None.
      trainable: pattern of the parameters that train; None if none train.
      consistency: whether the loss has CoPrompt's consistency terms (losses/coprompt.py).
    """

    prompts: PromptConfig | None
    trainable: str | None
    consistency: bool = False

    @property
    def keeps_base(self) -> bool:
        """Whether the base stays as it is: nothing trains, or only what the method attaches."""
        return self.trainable in (None, learned_prompts.TRAINABLE)


FEW_SHOT_METHODS = {
    "zero_shot": FewShotMethod(None, None),
    "coop": FewShotMethod(PromptConfig(4, 0, depth=1, coupled=False), learned_prompts.TRAINABLE),
    "maple": FewShotMethod(PromptConfig(), learned_prompts.TRAINABLE),
    "adapters": FewShotMethod(
        PromptConfig(0, 0, coupled=False, text_adapter=128, image_adapter=128), learned_prompts.TRAINABLE
    ),
    "coprompt": FewShotMethod(
        PromptConfig(text_adapter=128, image_adapter=128), learned_prompts.TRAINABLE, consistency=True
    ),
    "full": FewShotMethod(None, r".*"),
}
"""Methods with the default sizes of the released code for CLIP B/16; `few_shot_method` changes them.

CoPrompt's code has other prompts for each data set (docs/coprompt.md).
"""


def few_shot_method(name: str, **changes) -> FewShotMethod:
    """Returns a method by name, with fields of its `PromptConfig` changed.

    Args:
      name: a key of `FEW_SHOT_METHODS`: zero_shot, coop, maple, adapters, coprompt or full.
      **changes: fields of `PromptConfig` and their new values.

    Raises:
      UserError: an unknown name or field, or changes to a method without prompts and adapters.
    """
    if name not in FEW_SHOT_METHODS:
        raise UserError(
            f"method {name!r} is unknown, expected one of {', '.join(FEW_SHOT_METHODS)}"
            f"{did_you_mean(name, FEW_SHOT_METHODS) or ': choose one'}"
        )
    method = FEW_SHOT_METHODS[name]
    if not changes:
        return method
    fields = [field.name for field in dataclasses.fields(PromptConfig)]
    unknown = [key for key in changes if key not in fields]
    if unknown or method.prompts is None:
        raise UserError(
            f"{(unknown or list(changes))[0]} is given to the method {name!r}, expected "
            f"{'one of ' + ', '.join(fields) if method.prompts else 'nothing, as it attaches nothing'}: leave it out."
        )
    return dataclasses.replace(method, prompts=dataclasses.replace(method.prompts, **changes))


def attach_method(
    model: DualEncoder, method: FewShotMethod, *, init_words: Sequence[int] | None = None, rngs: nnx.Rngs
) -> DualEncoder:
    """Attaches a method's prompts and adapters, if any, in place; arguments and errors as in `attach_prompts`."""
    if method.prompts is None:
        return model
    words = None if init_words is None else tuple(init_words)
    return LearnedPrompts(method.prompts, words).attach(model, rngs)
