"""Noun phrases with CLEVR's synonyms, shared by the questions and the pretraining texts."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from paligemma_jax.data.synthetic_clevr.attributes import SHAPES
from paligemma_jax.data.synthetic_clevr.meanings import Filters, Phrase

T = TypeVar("T")

SYNONYMS = {
    "cube": ("cube", "block"),
    "sphere": ("sphere", "ball"),
    "large": ("large", "big"),
    "small": ("small", "tiny"),
    "metal": ("metal", "metallic", "shiny"),
    "rubber": ("rubber", "matte"),
    "left": ("left of", "to the left of", "on the left side of"),
    "right": ("right of", "to the right of", "on the right side of"),
    "front": ("in front of",),
    "behind": ("behind",),
}
_NAMELESS = ("thing", "object")


def choose(rng: np.random.Generator, options: Sequence[T]) -> T:
    """Returns one of the options, drawn by one `rng.random()`."""
    return options[int(rng.random() * len(options))]


def synonym(rng: np.random.Generator, word: str) -> str:
    """Returns a random synonym; the word itself if it has none."""
    return choose(rng, SYNONYMS.get(word, (word,)))


def noun(rng: np.random.Generator, filters: Filters, plural: bool = False) -> str:
    """Returns adjectives and a noun, without article: "small red metal cube", "shiny things"."""
    words = [synonym(rng, word) for _, word in filters]
    if not any(word in SHAPES for _, word in filters):
        words.append(choose(rng, _NAMELESS))
    return " ".join(words) + ("s" if plural else "")


def with_article(words: str) -> str:
    """Returns the words after "a" or "an"."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def referent(rng: np.random.Generator, phrase: Phrase, plural: bool = False, linked: bool = True) -> str:
    """Returns a noun phrase with its spatial hops: "cubes [that are] left of the red ball [that is] behind the cube".

    `linked` allows the optional "that is". Callers word shared attributes themselves, as their sentences differ.
    """
    words = noun(rng, phrase.filters, plural)
    if not phrase.hops:
        return words
    link = choose(rng, (" that are " if plural else " that is ", " ")) if linked else " "
    return words + link + spatial(rng, phrase, linked)


def spatial(rng: np.random.Generator, phrase: Phrase, linked: bool = True) -> str:
    """Returns the hops of a phrase: "left of the red ball", "[both] left of the ball and behind the cube"."""
    hops = [f"{synonym(rng, hop.name)} the {referent(rng, hop.anchor, linked=linked)}" for hop in phrase.hops]
    both = choose(rng, ("both ", "")) if len(hops) == 2 else ""
    return both + " and ".join(hops)
