"""Meanings of questions, independent of their wording: sampled from a scene and turned into a program.

`questions` words meanings as CLEVR does and `pretraining_texts` words them differently, about the same facts.
Sets of objects are bit masks (bit i is object i).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from paligemma_jax.data.synthetic_clevr.attributes import ATTRIBUTES, RELATIONS

T = TypeVar("T")
Filters = tuple[tuple[str, str], ...]  # (attribute, word) pairs in the order of ATTRIBUTES


@dataclass(frozen=True)
class Phrase:
    """Objects with certain attributes that every `hop` reaches from its anchor: "small cubes left of the red ball"."""

    filters: Filters
    hops: tuple["Hop", ...] = ()


@dataclass(frozen=True)
class Hop:
    """A step from one object, the anchor, to others: by a spatial relation, or by an attribute that they share."""

    name: str
    anchor: Phrase

    @property
    def is_same(self) -> bool:
        """Whether the hop is a shared attribute."""
        return self.name in ATTRIBUTES


@dataclass(frozen=True)
class Meaning:
    """A question; `function` is the last of its program. Comparisons, and a count over a union, have two phrases."""

    function: str
    phrases: tuple[Phrase, ...]


Form = Literal["zero", "one", "two", "and", "or", "same"]


@dataclass(frozen=True)
class Family:
    """A kind of question: the answering function and the form of its phrases (hops, and, or, same attribute)."""

    function: str
    form: Form
    attribute: str = ""  # the shared attribute of form "same"


COMPARE_NUMBERS = ("equal_integer", "less_than", "greater_than")

# The position in this list is `question_family_index`. All families get equal shares, which brings the shares of the
# answering functions near CLEVR's: exist 14 %, count 18 %, compare numbers 12 %, query 40 %, compare attributes 16 %.
FAMILIES: tuple[Family, ...] = (
    *(Family("exist", form) for form in ("zero", "one", "two")),
    *(Family("exist", "same", name) for name in ATTRIBUTES),
    *(Family("count", form) for form in ("zero", "one", "two", "and", "or")),
    *(Family("count", "same", name) for name in ATTRIBUTES),
    *(Family(function, form) for function in COMPARE_NUMBERS for form in ("zero", "one")),
    *(Family(f"query_{name}", form) for name in ATTRIBUTES for form in ("zero", "one", "two", "and", "same")),
    *(Family(f"equal_{name}", form) for name in ATTRIBUTES for form in ("zero", "one")),
)


def program(meaning: Meaning) -> list[dict[str, Any]]:
    """Returns the functional program in the official layout."""
    nodes: list[dict[str, Any]] = []

    def add(function: str, inputs: list[int], values: list[str] | None = None) -> int:
        nodes.append({"function": function, "inputs": inputs, "value_inputs": values or []})
        return len(nodes) - 1

    def objects(phrase: Phrase) -> int:
        starts = [step(hop) for hop in phrase.hops] or [add("scene", [])]
        at = starts[0] if len(starts) == 1 else add("intersect", starts)
        for name, word in phrase.filters:
            at = add(f"filter_{name}", [at], [word])
        return at

    def step(hop: Hop) -> int:
        anchor = add("unique", [objects(hop.anchor)])
        return add(f"same_{hop.name}", [anchor]) if hop.is_same else add("relate", [anchor], [hop.name])

    function, phrases = meaning.function, meaning.phrases
    if function in COMPARE_NUMBERS:
        add(function, [add("count", [objects(p)]) for p in phrases])
    elif function.startswith("equal_"):
        name = function.removeprefix("equal_")
        add(function, [add(f"query_{name}", [add("unique", [objects(p)])]) for p in phrases])
    elif function.startswith("query_"):
        add(function, [add("unique", [objects(phrases[0])])])
    else:
        sets = [objects(p) for p in phrases]
        add(function, [add("union", sets)] if len(sets) == 2 else sets)
    return nodes


class MeaningSampler:
    """Draws meanings that are valid on one scene and whose wording does not give away the answer.

    Every referent is unique, every hop excludes some object, no filter names the attribute asked for, and two compared
    phrases select different objects and do not contain one another in their words.
    """

    def __init__(self, scene: dict, rng: np.random.Generator):
        self._rng = rng
        self._items = scene["objects"]
        self._all = (1 << len(self._items)) - 1
        self._filters = [_subsets(item) for item in self._items]
        self._sets: dict[Filters, int] = {}
        for index, subsets in enumerate(self._filters):
            for filters in subsets:
                self._sets[filters] = self._sets.get(filters, 0) | 1 << index
        self._reach = {
            **{r: [sum(1 << j for j in row) for row in scene["relationships"][r]] for r in RELATIONS},
            **{name: self._sharing(name) for name in ATTRIBUTES},
        }

    def draw(self, family: Family) -> Meaning | None:
        """Returns one random meaning of that family, or None if this attempt failed."""
        function = family.function
        if function in COMPARE_NUMBERS:
            return self._compare_numbers(function, family.form)
        if function.startswith("equal_"):
            return self._compare_attributes(function, family.form)
        if function.startswith("query_"):
            phrase = self._one_object(family.form, function.removeprefix("query_"))
        elif family.form == "or":
            return self._union(function)
        else:
            phrase = self._objects(family)
        return phrase and Meaning(function, (phrase,))

    def description(self) -> Filters:
        """Returns a description that fits at least one object."""
        return self._short(self._pick(self._filters))

    def name(self, index: int, hops: int = 0) -> Phrase | None:
        """Returns a phrase that only object `index` fits, with `hops` relations, or None if this attempt failed."""
        return self._named(index, (), hops)

    # Random choices -------------------------------------------------------------------------------------------------

    def _pick(self, options: Sequence[T]) -> T:
        return options[int(self._rng.random() * len(options))]

    def _short(self, options: list[Filters]) -> Filters:
        """Returns the shorter of two draws: descriptions with all attributes are the most frequent, but tedious."""
        return min(self._pick(options), self._pick(options), key=len)

    def _some_filters(self, banned: tuple[str, ...] = (), present: float = 0.6) -> Filters:
        """Returns filters that match some object with probability `present` or more."""
        if self._rng.random() < present:
            return self._short(_without(self._pick(self._filters), banned))
        names = [name for name in ATTRIBUTES if name not in banned]
        chosen = [name for name in names if self._rng.random() < 0.5] or [self._pick(names)]
        return tuple((name, self._pick(ATTRIBUTES[name])) for name in chosen)

    # Phrases for one object -----------------------------------------------------------------------------------------

    def _named(self, index: int, banned: tuple[str, ...] = (), hops: int = 0) -> Phrase | None:
        """Returns a phrase that only object `index` fits, with `hops` spatial relations."""
        if hops == 0:
            options = [f for f in _without(self._filters[index], banned) if self._sets[f] == 1 << index]
            return Phrase(self._short(options)) if options else None
        hop, reached = self._hop(self._pick(RELATIONS), hops - 1)
        return hop and self._narrowed(index, (hop,), reached, banned)

    def _narrowed(self, index: int, hops: tuple[Hop, ...], reached: int, banned: tuple[str, ...]) -> Phrase | None:
        """Returns a phrase for object `index`: filters that identify it with the hops, but not without them."""
        bit = 1 << index
        options = [f for f in _without(self._filters[index], banned) if self._sets[f] & reached == bit != self._sets[f]]
        if reached == bit and () not in options and len(self._items) > 2:
            options.append(())
        return Phrase(self._short(options), hops) if options else None

    def _hop(self, name: str, anchor_hops: int = 0) -> tuple[Hop | None, int]:
        """Returns a hop from a random object and the set it reaches; the anchor's phrase omits a shared attribute."""
        anchor = int(self._rng.random() * len(self._items))
        phrase = self._named(anchor, (name,) if name in ATTRIBUTES else (), anchor_hops)
        return (Hop(name, phrase), self._reach[name][anchor]) if phrase else (None, 0)

    def _one_object(self, form: Form, attribute: str) -> Phrase | None:
        index = int(self._rng.random() * len(self._items))
        if form in ("zero", "one", "two"):
            return self._named(index, (attribute,), ("zero", "one", "two").index(form))
        if form == "and":
            hops, reached = self._crossing()
            return self._narrowed(index, hops, reached, (attribute,)) if hops else None
        shared = self._pick([name for name in ATTRIBUTES if name != attribute])
        hop, reached = self._hop(shared)
        return hop and self._narrowed(index, (hop,), reached, (attribute, shared))

    def _crossing(self) -> tuple[tuple[Hop, ...], int]:
        """Returns two relations to two anchors, neither of which implies the other."""
        (first, a), (second, b) = self._hop(self._pick(RELATIONS)), self._hop(self._pick(RELATIONS))
        if first is None or second is None or first.anchor == second.anchor or a & b in (a, b):
            return (), 0
        return (first, second), a & b

    # Phrases for any number of objects ------------------------------------------------------------------------------

    def _objects(self, family: Family) -> Phrase | None:
        """Returns a phrase for exist and count; it may match no object."""
        if family.form == "zero":
            everything = family.function == "count" and self._rng.random() < 0.1
            return Phrase(() if everything else self._some_filters())
        if family.form == "and":
            hops, reached = self._crossing()
            return self._restricted(hops, reached, ()) if hops else None
        if family.form == "same":
            hop, reached = self._hop(family.attribute)
            return hop and self._restricted((hop,), reached, (family.attribute,))
        hop, reached = self._hop(self._pick(RELATIONS), ("one", "two").index(family.form))
        return hop and self._restricted((hop,), reached, ())

    def _restricted(self, hops: tuple[Hop, ...], reached: int, banned: tuple[str, ...]) -> Phrase | None:
        """Returns a phrase with random filters, sometimes none; the hops must exclude some of their matches."""
        filters = () if self._rng.random() < 0.25 else self._some_filters(banned, present=0.9)
        matches = self._matches(filters)
        return Phrase(filters, hops) if matches & reached != matches else None

    def _matches(self, filters: Filters) -> int:
        return self._sets.get(filters, 0) if filters else self._all

    # Two phrases ----------------------------------------------------------------------------------------------------

    def _two_sets(self) -> tuple[Phrase, Phrase] | None:
        first, second = self._some_filters(present=0.85), self._some_filters(present=0.85)
        overlap = set(first) <= set(second) or set(second) <= set(first)
        return None if overlap or self._matches(first) == self._matches(second) else (Phrase(first), Phrase(second))

    def _union(self, function: str) -> Meaning | None:
        pair = self._two_sets()
        return pair and Meaning(function, pair)

    def _compare_numbers(self, function: str, form: Form) -> Meaning | None:
        pair = self._two_sets()
        if pair and form == "one":
            hop, reached = self._hop(self._pick(RELATIONS))
            matches = self._matches(pair[0].filters)
            if hop is None or matches & reached == matches:
                return None
            pair = Phrase(pair[0].filters, (hop,)), pair[1]
        return pair and Meaning(function, pair)

    def _compare_attributes(self, function: str, form: Form) -> Meaning | None:
        name = function.removeprefix("equal_")
        first, second = (int(self._rng.random() * len(self._items)) for _ in range(2))
        if first == second:
            return None
        left, right = self._named(first, (name,), ("zero", "one").index(form)), self._named(second, (name,))
        return Meaning(function, (left, right)) if left and right else None

    def _sharing(self, name: str) -> list[int]:
        return [self._sets[((name, item[name]),)] & ~(1 << i) for i, item in enumerate(self._items)]


def _subsets(item: dict) -> list[Filters]:
    """Returns all 15 non-empty descriptions of an object by its attributes."""
    pairs = [(name, item[name]) for name in ATTRIBUTES]
    return [tuple(p for k, p in enumerate(pairs) if mask >> k & 1) for mask in range(1, 1 << len(pairs))]


def _without(options: list[Filters], banned: tuple[str, ...]) -> list[Filters]:
    return [f for f in options if not any(name in banned for name, _ in f)] if banned else options
