"""Questions in the wording of CLEVR v1.0 with programs and answers, balanced over a whole split.

The sentences are our own in CLEVR's style, so that a model tuned on them understands official questions.
"""

from collections import Counter, defaultdict
from typing import Any

import numpy as np

from paligemma_jax.data.synthetic_clevr.meanings import COMPARE_NUMBERS, FAMILIES, Meaning, MeaningSampler, program
from paligemma_jax.data.synthetic_clevr.programs import answer
from paligemma_jax.data.synthetic_clevr.wording import choose, noun, referent, spatial, synonym, with_article

_TRIES_PER_FAMILY = 25


class AnswerBalance:
    """Counts answers per family over a split, to decide which family is next and which answers it may still add.

    As in CLEVR's generator, an answer is rejected while it is more than 10 % ahead of the most frequent other answer,
    so that yes and no stay about even. Deterministic: a function of the questions so far.
    """

    def __init__(self) -> None:
        self._answers: dict[int, Counter[str]] = defaultdict(Counter)

    def due(self) -> list[int]:
        """Returns the family indices, those with the fewest questions first."""
        return sorted(range(len(FAMILIES)), key=lambda index: (self._answers[index].total(), index))

    def accepts(self, family: int, word: str) -> bool:
        """Returns whether the family may add a question with this answer."""
        others = [count for other, count in self._answers[family].items() if other != word]
        return self._answers[family][word] <= 1.1 * max(others, default=0)

    def add(self, family: int, word: str) -> None:
        """Counts one question."""
        self._answers[family][word] += 1

    def counts(self, family: int) -> Counter[str]:
        """Returns the answers of one family so far, with their counts."""
        return Counter(self._answers[family])


def generate_questions(
    scene: dict, per_scene: int, seed: tuple[int, ...] | int, balance: AnswerBalance | None = None
) -> list[dict[str, Any]]:
    """Returns `per_scene` questions about a scene in the official layout (fewer only if no family has one left).

    Families with the fewest questions come first, so over a split all get equal shares; if a scene has no question of
    a family, the next one is used. `balance` carries the counts from scene to scene and is updated. `question_index`
    counts within the scene; `build_tree` renumbers.
    """
    balance = AnswerBalance() if balance is None else balance
    rng = np.random.Generator(np.random.PCG64(seed))
    sampler = MeaningSampler(scene, rng)
    out: list[dict[str, Any]] = []
    while len(out) < per_scene:
        used = {item["question"] for item in out}
        new = next(filter(None, (_ask(scene, sampler, rng, index, balance, used) for index in balance.due())), None)
        if new is None:
            break
        out.append(new | {"question_index": len(out)})
    return out


def _ask(
    scene, sampler: MeaningSampler, rng, index: int, balance: AnswerBalance, used: set[str]
) -> dict[str, Any] | None:
    """Returns a new question of one family with an answer that the balance accepts, or None."""
    for _ in range(_TRIES_PER_FAMILY):
        meaning = sampler.draw(FAMILIES[index])
        if meaning is None:
            continue
        nodes = program(meaning)
        word = answer(nodes, scene)
        if not balance.accepts(index, word):
            continue
        text = word_question(meaning, rng)
        if text in used:
            continue
        balance.add(index, word)
        about = {key: scene[key] for key in ("image_index", "image_filename", "split")}
        return about | {"question": text, "answer": word, "program": nodes, "question_family_index": index}
    return None


def word_question(meaning: Meaning, rng: np.random.Generator) -> str:
    """Returns one of the phrasings of a meaning, capitalised, with its question mark."""
    function = meaning.function
    if function in COMPARE_NUMBERS:
        text = _word_compare_numbers(meaning, rng)
    elif function.startswith("equal_"):
        text = _word_compare_attributes(meaning, rng)
    elif function.startswith("query_"):
        text = _word_query(meaning, rng)
    elif len(meaning.phrases) == 2:
        text = _word_union(meaning, rng)
    elif any(hop.is_same for hop in meaning.phrases[0].hops):
        text = _word_same(meaning, rng)
    else:
        text = _word_set(meaning, rng)
    return text[0].upper() + text[1:]


def _word_set(meaning: Meaning, rng: np.random.Generator) -> str:
    """Words exist and count, with spatial relations or none."""
    (phrase,) = meaning.phrases
    things = noun(rng, phrase.filters, plural=True)
    one = with_article(things[:-1])
    if not phrase.hops:
        if meaning.function == "count":
            return f"{_how_many(rng)} {things} are there?"
        return choose(rng, (f"are there any {things}?", f"is there {one}?", f"are any {things} visible?"))
    if len(phrase.hops) == 1 and rng.random() < 0.4:
        (hop,) = phrase.hops
        start = f"there is {with_article(referent(rng, hop.anchor))};"
        where = f"{synonym(rng, hop.name)} it"
        if meaning.function == "count":
            return f"{start} {_how_many(rng)} {things} are {where}?"
        return f"{start} " + choose(rng, (f"are there any {things} {where}?", f"is there {one} {where}?"))
    where = spatial(rng, phrase)
    if meaning.function == "count":
        return f"{_how_many(rng)} {things} are {where}?"
    plural, single = choose(rng, ((f"{things} that are", f"{one} that is"), (things, one)))
    return choose(rng, (f"are there any {plural} {where}?", f"is there {single} {where}?"))


def _how_many(rng: np.random.Generator) -> str:
    return choose(rng, ("how many", "what number of"))


def _word_union(meaning: Meaning, rng: np.random.Generator) -> str:
    """Words count over "either ... or ..."."""
    first, second = (noun(rng, phrase.filters, plural=True) for phrase in meaning.phrases)
    things, either = choose(rng, ("things", "objects")), choose(rng, ("either ", ""))
    return f"{_how_many(rng)} {things} are {either}{first} or {second}?"


def _word_same(meaning: Meaning, rng: np.random.Generator) -> str:
    """Words exist and count among the other objects that share an attribute with one."""
    (phrase,) = meaning.phrases
    (hop,) = phrase.hops
    likeness = f"the same {hop.name} as the {referent(rng, hop.anchor)}?"
    made = choose(rng, ("made of ", "")) if hop.name == "material" else ""
    others = noun(rng, phrase.filters, plural=True)
    if meaning.function == "count":
        return f"{_how_many(rng)} other {others} {choose(rng, ('have ', f'are {made}'))}{likeness}"
    another = f"is there another {others[:-1]}" if phrase.filters else "is there anything else"
    plural = choose(rng, ("that have ", f"that are {made}", made or "of "))
    single = choose(rng, ("that has ", f"that is {made}", made or "of "))
    return choose(rng, (f"are there any other {others} {plural}{likeness}", f"{another} {single}{likeness}"))


def _word_query(meaning: Meaning, rng: np.random.Generator) -> str:
    """Words a question for the colour, shape, size or material of one object."""
    (phrase,) = meaning.phrases
    name = meaning.function.removeprefix("query_")
    shared = [hop for hop in phrase.hops if hop.is_same]
    if shared:
        (hop,) = shared
        made = choose(rng, ("made of ", "")) if hop.name == "material" else ""
        thing = f"{noun(rng, phrase.filters)} that is {made}the same {hop.name} as the {referent(rng, hop.anchor)}"
        the, a = f"the other {thing}", f"another {thing}"
    else:
        thing = referent(rng, phrase)
        the, a = f"the {thing}", with_article(thing)
    options = [f"what {name} is {the}?", f"what is the {name} of {the}?", f"{the} is what {name}?"]
    options += [f"there is {a}; what {name} is it?", f"there is {a}; what is its {name}?"]
    if name == "size":
        options += [f"how big is {the}?", f"there is {a}; how big is it?"]
    if name == "material":
        options[2] = f"{the} is made of what material?"
        options += [f"what is {the} made of?", f"there is {a}; what is it made of?"]
    return choose(rng, options)


def _word_compare_numbers(meaning: Meaning, rng: np.random.Generator) -> str:
    """Words equal_integer, less_than and greater_than."""
    first, second = (referent(rng, phrase, plural=True) for phrase in meaning.phrases)
    if meaning.function == "equal_integer":
        together = choose(rng, ("an equal number", "the same number"))
        return choose(
            rng,
            (
                f"are there {together} of {first} and {second}?",
                f"is the number of {first} the same as the number of {second}?",
            ),
        )
    fewer, less = ("fewer", "less") if meaning.function == "less_than" else ("more", "greater")
    return choose(
        rng,
        (f"are there {fewer} {first} than {second}?", f"is the number of {first} {less} than the number of {second}?"),
    )


def _word_compare_attributes(meaning: Meaning, rng: np.random.Generator) -> str:
    """Words a question whether two objects share an attribute."""
    name = meaning.function.removeprefix("equal_")
    first, second = (referent(rng, phrase) for phrase in meaning.phrases)
    options = [
        f"do the {first} and the {second} have the same {name}?",
        f"does the {first} have the same {name} as the {second}?",
        f"is the {name} of the {first} the same as the {second}?",
        f"is the {first} {'made of ' if name == 'material' else ''}the same {name} as the {second}?",
    ]
    if name == "material":
        options.append(f"are the {first} and the {second} made of the same material?")
    else:
        start = f"there is {with_article(first)};"
        options.append(f"{start} does it have the same {name} as the {second}?")
        options.append(f"{start} is it the same {name} as the {second}?")
        options.append(f"{start} is its {name} the same as the {second}?")
    return choose(rng, options)
