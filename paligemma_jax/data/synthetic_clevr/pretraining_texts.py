"""Texts that pretrain the small base on a scene, in PaliGemma's task style (Beyer et al. 2024, arXiv 2407.07726).

caption en                  -> 3 objects: a small red metal cube, two large blue rubber spheres. The cube is left of ...
detect <things>             -> <loc0123><loc0456><loc0789><loc1000> small red metal cube ; <loc...> ...
detect object               -> every object, from left to right
point <thing>               -> <loc0456><loc0728>, the middle of its box
describe <loc><loc><loc><loc> -> small red metal cube
answer en <question>        -> one of CLEVR's 28 answers

Boxes are y0 x0 y1 x1 in 1024ths of the image. Questions are about the same facts as those of `questions`, but in none
of their sentence patterns, so that fine-tuning has something to teach. All their words do occur, as LoRA leaves the
embeddings frozen.
"""

import numpy as np

from paligemma_jax.data.synthetic_clevr.attributes import ATTRIBUTES
from paligemma_jax.data.synthetic_clevr.geometry import boxes
from paligemma_jax.data.synthetic_clevr.meanings import (
    COMPARE_NUMBERS,
    FAMILIES,
    Meaning,
    MeaningSampler,
    Phrase,
    program,
)
from paligemma_jax.data.synthetic_clevr.programs import answer
from paligemma_jax.data.synthetic_clevr.wording import choose, noun, referent, spatial, with_article

Segment = tuple[str, str]

# answer 70 %, caption 10 %, detect 8 %, detect object 2 %, point 4 %, describe 6 %
_CUMULATIVE_SHARES = (0.7, 0.8, 0.88, 0.9, 0.94)
_NUMBER_WORDS = ("", "", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_TRIES_PER_TARGET_ANSWER = 8
# Plain questions are twice as frequent as each other form, as all others build on them.
_MIXTURE = tuple(family for family in FAMILIES for _ in range(2 if family.form == "zero" else 1))
_TARGET_ANSWERS = {"exist": ("yes", "no"), "count": tuple(str(n) for n in range(11))}


def pretraining_segments(scene: dict, rng: np.random.Generator, num_segments: int) -> list[Segment]:
    """Returns `num_segments` random (prefix, suffix) pairs about a scene: 70 % questions, 10 % captions, 20 % boxes."""
    writer = _Writer(scene, rng)
    return [writer.segment() for _ in range(num_segments)]


def plain_caption(scene: dict) -> Segment:
    """Returns the caption that counts the objects and lists them all, without relations."""
    writer = _Writer(scene, np.random.default_rng(0))
    return "caption en", writer.total() + writer.listed()


def every_box(scene: dict) -> Segment:
    """Returns `detect object` and every object with its box, from left to right."""
    return _Writer(scene, np.random.default_rng(0)).every_box()


class _Writer:
    """Writes segments about one scene; deterministic parts are computed once."""

    def __init__(self, scene: dict, rng: np.random.Generator):
        self._scene, self._rng = scene, rng
        self._sampler = MeaningSampler(scene, rng)
        self._boxes = np.minimum(boxes(scene) * 1024, 1023).astype(int)
        self._order = np.argsort(self._boxes[:, 1] + self._boxes[:, 3], kind="stable").tolist()  # from left to right
        self._names = [" ".join(item[name] for name in ATTRIBUTES) for item in scene["objects"]]

    def segment(self) -> Segment:
        """Returns one segment of a random kind."""
        writers = (self._answer, self._caption, self._detect, self.every_box, self._point, self._describe)
        kind = int(np.searchsorted(_CUMULATIVE_SHARES, self._rng.random(), side="right"))
        return writers[kind]()

    def _located(self, index: int) -> str:
        return "".join(f"<loc{v:04d}>" for v in self._boxes[index])

    def every_box(self) -> Segment:
        """Returns all objects with their boxes, from left to right."""
        return "detect object", " ; ".join(f"{self._located(i)} {self._names[i]}" for i in self._order)

    def _detect(self) -> Segment:
        filters = self._sampler.description()
        things = [i for i in self._order if all(self._scene["objects"][i][name] == word for name, word in filters)]
        return f"detect {noun(self._rng, filters)}", " ; ".join(f"{self._located(i)} {self._names[i]}" for i in things)

    def _point(self) -> Segment:
        index = choose(self._rng, self._order)
        phrase = self._sampler.name(index)
        if phrase is None:
            return self._describe()
        y0, x0, y1, x1 = self._boxes[index]
        return f"point {noun(self._rng, phrase.filters)}", f"<loc{(y0 + y1) // 2:04d}><loc{(x0 + x1) // 2:04d}>"

    def _describe(self) -> Segment:
        index = choose(self._rng, self._order)
        return f"describe {self._located(index)}", self._names[index]

    def _caption(self) -> Segment:
        # Large numbers are rare as answers; here every number up to ten occurs, before the objects that it counts.
        total = self.total() if self._rng.random() < 0.5 else ""
        relation = self._relation_sentence() if self._rng.random() < 0.5 else ""
        return "caption en", total + self.listed() + relation

    def total(self) -> str:
        """Returns the number of objects, to precede their list."""
        return f"{len(self._order)} objects: "

    def listed(self) -> str:
        """Returns a list of all objects, with equal ones counted."""
        groups: dict[str, int] = {}
        for i in self._order:
            groups[self._names[i]] = groups.get(self._names[i], 0) + 1
        return ", ".join(f"a {name}" if n == 1 else f"{_NUMBER_WORDS[n]} {name}s" for name, n in groups.items())

    def _relation_sentence(self) -> str:
        index = choose(self._rng, self._order)
        subject, place = self._sampler.name(index), self._sampler.name(index, hops=1)
        if subject is None or place is None:
            return ""
        where = spatial(self._rng, place, linked=False)
        named = f"The {noun(self._rng, subject.filters)} is"
        return f". {choose(self._rng, (named, f'There is a {self._names[index]}'))} {where}."

    def _answer(self) -> Segment:
        meaning, word = self._question()
        return f"answer en {word_plainly(meaning, self._rng)}", word

    def _question(self) -> tuple[Meaning, str]:
        """Returns a random question and its answer; yes and no, and the numbers, are about equally frequent."""
        while True:
            family = choose(self._rng, _MIXTURE)
            target = None
            if not family.function.startswith("query_"):
                target = choose(self._rng, _TARGET_ANSWERS.get(family.function, _TARGET_ANSWERS["exist"]))
            question = None
            for _ in range(_TRIES_PER_TARGET_ANSWER):
                meaning = self._sampler.draw(family)
                if meaning is not None:
                    question = meaning, answer(program(meaning), self._scene)
                    if target in (None, question[1]):
                        break
            if question is not None:
                return question


def word_plainly(meaning: Meaning, rng: np.random.Generator) -> str:
    """Returns a phrasing of a meaning that CLEVR does not have: a fragment or, with a capital, a sentence."""
    function = meaning.function
    if function in COMPARE_NUMBERS:
        options = _compare_numbers(meaning, rng)
    elif function.startswith("equal_"):
        options = _compare_attributes(meaning, rng)
    elif function.startswith("query_"):
        options = _query(meaning, rng)
    elif len(meaning.phrases) == 2:
        options = _union(meaning, rng)
    else:
        options = _exist(meaning, rng) if function == "exist" else _count(meaning, rng)
    return choose(rng, options)


def _set(rng: np.random.Generator, phrase: Phrase, plural: bool) -> str:
    """Returns a noun phrase with any hops; shared attributes are worded "other cubes matching the ball in color"."""
    if not any(hop.is_same for hop in phrase.hops):
        return referent(rng, phrase, plural)
    (hop,) = phrase.hops
    share = "share" if plural else "shares"
    anchor = f"the {referent(rng, hop.anchor)}"
    likeness = (
        f"matching {anchor} in {hop.name}",
        f"with the {hop.name} that {anchor} has",
        f"like {anchor} in {hop.name}",
        f"that {share} with {anchor} its {hop.name}",
    )
    return f"{noun(rng, phrase.filters, plural)} {choose(rng, likeness)}"


def _other(phrase: Phrase, one: bool = False) -> str:
    """Returns the word that excludes the anchor of a shared attribute."""
    return ("another " if one else "other ") if any(hop.is_same for hop in phrase.hops) else ""


def _exist(meaning: Meaning, rng: np.random.Generator) -> tuple[str, ...]:
    (phrase,) = meaning.phrases
    many, one = _other(phrase) + _set(rng, phrase, True), _set(rng, phrase, False)
    one = _other(phrase, one=True) + one if _other(phrase) else with_article(one)
    options = (
        f"any {many}",
        f"any {many} visible?",
        f"exists {one}",
        f"Does {one} exist?",
        f"Do you see {many}?",
        f"There in view: {one}?",
    )
    if _other(phrase) and not phrase.filters:
        rest = _set(rng, phrase, False).split(" ", 1)[1]
        options += (f"anything else {rest}", f"anything else {rest}?", f"Is something or anything else {rest}?")
    return options


def _count(meaning: Meaning, rng: np.random.Generator) -> tuple[str, ...]:
    (phrase,) = meaning.phrases
    many = _other(phrase) + _set(rng, phrase, True)
    return (
        f"number of {many}",
        f"count the {many}",
        f"the {many}: how many",
        f"How numerous are the {many}?",
        f"total of {many}",
        f"Number of {many} there?",
    )


def _union(meaning: Meaning, rng: np.random.Generator) -> tuple[str, ...]:
    first, second = (noun(rng, phrase.filters) for phrase in meaning.phrases)
    one, two = with_article(first), with_article(second)
    return (
        f"number of things, each {one} or {two}",
        f"count all objects: either {first} or {second}",
        f"How numerous are things of either kind, {first} or {second}?",
        f"total of {first}s and {second}s, none counted twice",
    )


def _query(meaning: Meaning, rng: np.random.Generator) -> tuple[str, ...]:
    (phrase,) = meaning.phrases
    name = meaning.function.removeprefix("query_")
    thing = "the " + _other(phrase) + _set(rng, phrase, False)
    options = (
        f"{name} of {thing}",
        f"name the {name} that {thing} has",
        f"{thing}: its {name}",
        f"The {name} of {thing}?",
        f"Which {name} does {thing} have?",
        f"look at {thing}; its {name}?",
    )
    if name == "material":
        options += (f"substance {thing} is made of", f"Made of what, {thing}?")
    if name == "size":
        options += (f"is it big or small: {thing}",)
    return options


def _compare_numbers(meaning: Meaning, rng: np.random.Generator) -> tuple[str, ...]:
    first, second = (referent(rng, phrase, plural=True) for phrase in meaning.phrases)
    if meaning.function == "equal_integer":
        return (
            f"as many {first} as {second}",
            f"number of {first} equal to number of {second}",
            f"Do {first} and {second} come in equal numbers?",
            f"an equal count, {first} and {second}?",
            f"same number: {first}, {second}",
        )
    if meaning.function == "less_than":
        return (
            f"fewer {first} than {second}",
            f"number of {first} less than number of {second}",
            f"Do {second} outnumber {first}?",
            f"Are {first} fewer than {second}?",
        )
    return (
        f"more {first} than {second}",
        f"number of {first} greater than number of {second}",
        f"Do {first} outnumber {second}?",
        f"Are {second} less numerous than {first}?",
    )


def _compare_attributes(meaning: Meaning, rng: np.random.Generator) -> tuple[str, ...]:
    name = meaning.function.removeprefix("equal_")
    first, second = (referent(rng, phrase) for phrase in meaning.phrases)
    return (
        f"same {name}: {first}, {second}",
        f"{first} and {second} of one {name}?",
        f"the {first} matches the {second} in {name}",
        f"Is one {name} shared by both the {first} and the {second}?",
        f"What the {first} has as its {name}, does the {second} have it?",
        f"{name} alike on it and on the other: {first}, {second}",
    )
