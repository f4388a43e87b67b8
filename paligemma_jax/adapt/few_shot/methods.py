"""Few-shot methods of a dual encoder by name, on one interface: what each attaches, what trains, and by which loss."""

import dataclasses
from collections.abc import Sequence

from flax import nnx

from paligemma_jax.adapt.few_shot import prompts
from paligemma_jax.adapt.few_shot.prompts import PromptConfig
from paligemma_jax.models.dual_encoder import DualEncoder
from train_jax.core.errors import UserError
from train_jax.core.patterns import did_you_mean


@dataclasses.dataclass(frozen=True)
class FewShotMethod:
    """One method.

    Attributes:
      prompts: what is attached, None for nothing.
      trainable: pattern of what trains; None: nothing does.
      consistency: whether the loss holds embeddings near those of the base (losses/coprompt.py).
    """

    prompts: PromptConfig | None
    trainable: str | None
    consistency: bool = False


_ADAPTERS = dict(text_adapter=128, image_adapter=128)

FEW_SHOT_METHODS = {
    "zero_shot": FewShotMethod(None, None),
    "coop": FewShotMethod(PromptConfig(4, 0, depth=1, coupled=False), prompts.TRAINABLE),
    "maple": FewShotMethod(PromptConfig(), prompts.TRAINABLE),
    "adapters": FewShotMethod(PromptConfig(0, 0, coupled=False, **_ADAPTERS), prompts.TRAINABLE),
    "coprompt": FewShotMethod(PromptConfig(**_ADAPTERS), prompts.TRAINABLE, consistency=True),
    "full": FewShotMethod(None, r".*"),
}
"""With the default sizes of the released codes for CLIP B/16; `few_shot_method` changes them.

CoPrompt's code has other prompts for each data set (docs/coprompt.md).
"""


def few_shot_method(name: str, **changes) -> FewShotMethod:
    """A method by name, fields of its `PromptConfig` changed.

    Raises:
      UserError: another name, or changes to a method that attaches nothing.
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
    """The model with what the method learns, in place; arguments and errors as of `attach_prompts`."""
    if method.prompts is None:
        return model
    return prompts.attach_prompts(model, method.prompts, init_words=init_words, rngs=rngs)
