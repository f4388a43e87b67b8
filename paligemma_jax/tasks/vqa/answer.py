"""One question and what a model said to it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Answer:
    """One question and what the model said."""

    image_name: str
    question: str
    family: str
    reference: str
    prediction: str | None = None  # generated greedily
    likeliest: str | None = None  # of the candidates
    nll: float | None = None  # of the reference with its EOS, summed over tokens, in nats
    tokens: float | None = None  # how many those are
    ended: bool | None = None  # whether the prediction ended by itself, with EOS
    image_index: int | None = None  # see Record

    @property
    def image(self) -> int | str:
        """What tells its image from others: the index, or where that is not known the name."""
        return self.image_name if self.image_index is None else self.image_index


def question_of(prefix: str, prompt: str) -> str:
    """The question inside a prompt made from a template."""
    head, _, tail = prompt.partition("{question}")
    if prefix.startswith(head) and prefix.endswith(tail):
        return prefix[len(head) : len(prefix) - len(tail)]
    return prefix
