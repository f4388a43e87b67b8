"""One question with a model's answer to it, and the mean token loss of many."""

import dataclasses

from paligemma_jax.metrics.text import exact_match


@dataclasses.dataclass(frozen=True)
class Answer:
    """One question and what the model answered; None where a value was not computed."""

    image_name: str
    question: str
    family: str
    reference: str
    prediction: str | None = None  # generated greedily
    likeliest: str | None = None  # of the candidates
    nll: float | None = None  # of the reference with its EOS, summed over tokens, in nats
    tokens: float | None = None  # number of tokens in that sum
    ended: bool | None = None  # whether generation stopped at EOS
    image_index: int | None = None  # see Record

    @property
    def image(self) -> int | str:
        """The identity of the image: its index, or its name where the index is not known."""
        return self.image_name if self.image_index is None else self.image_index

    @property
    def correct(self) -> bool:
        """Whether the generated answer equals the reference; False where none was generated."""
        return self.prediction is not None and exact_match(self.prediction, self.reference)

    @property
    def likeliest_correct(self) -> bool:
        """Whether the likeliest candidate equals the reference; False where none was scored."""
        return self.likeliest is not None and exact_match(self.likeliest, self.reference)


class TokenLoss:
    """Negative log-likelihood in nats and number of tokens, summed over answers."""

    def __init__(self) -> None:
        self.nll, self.tokens = 0.0, 0.0

    def add(self, answer: Answer) -> None:
        """Adds the sums of an answer whose loss was computed."""
        if answer.nll is not None and answer.tokens is not None:
            self.nll, self.tokens = self.nll + answer.nll, self.tokens + answer.tokens

    @property
    def mean(self) -> float:
        """Nats a token; 0 without tokens."""
        return self.nll / max(self.tokens, 1.0)


def question_of(prefix: str, prompt: str) -> str:
    """Returns the question inside a prompt made from a template."""
    head, _, tail = prompt.partition("{question}")
    if prefix.startswith(head) and prefix.endswith(tail):
        return prefix[len(head) : len(prefix) - len(tail)]
    return prefix
