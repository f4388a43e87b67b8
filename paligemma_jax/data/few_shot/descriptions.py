"""Sentences about each class: from templates, or from a JSON object {class: [sentences]} that a language model wrote.

For consistency with the frozen text encoder CoPrompt (Roy & Etemad 2024) draws one place in these lists for each step,
the same for all classes. A place is `draw` (a function of the seed and the step) times the length of a class's list, so
classes may have lists of different lengths.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax.data.row_texts import check_prompt, is_text
from train_jax.core.errors import UserError, quoted

_DRAWS = zlib.crc32(b"descriptions")
_STEPS = 1 << 16  # the draw's values: float32 holds them, and their products with a length stay below it
_NAMED = 3  # classes that a message names

Sentences = tuple[tuple[str, ...], ...]


def fill_templates(classes: Sequence[str], templates: Sequence[str]) -> Sentences:
    """Every class in every template, by class.

    Raises:
      UserError: no class, a template without {}, names or templates that are no whole characters, or one text in place
        of a list.
    """
    for given in (classes, templates):
        if isinstance(given, str):
            raise UserError(
                f"classes or templates are the one text {quoted(given)}, expected several: give a list of it."
            )
    for text in (*classes, *templates):
        check_prompt(text, "the class or template")
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong or not templates or not classes:
        raise UserError(
            f"zero-shot classification has {len(classes)} classes and the template {quoted((wrong or ['none'])[0])}, "
            "expected one class at least, and templates with one {} each: change them."
        )
    return tuple(tuple(fill(template, name) for template in templates) for name in classes)


def fill(template: str, name: str) -> str:
    """A template with a name for its {}; other braces are text."""
    return template.replace("{}", name)


def read_descriptions(file: str | Path, classes: Sequence[str]) -> Sentences:
    """The sentences of each class, in the order of `classes`.

    Further classes of the file are ignored. Names are compared without case, and with spaces for underscores.

    Raises:
      UserError: no such file, no object of lists of sentences, or a class that is missing (naming the first ones).
    """
    try:
        content = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}), expected {{class: [sentences]}}: mend it.") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object, expected {{class: [sentences]}}: mend it.")
    found = {_key(name): sentences for name, sentences in content.items()}
    missing = [name for name in classes if _key(name) not in found]
    if missing:
        raise UserError(
            f"{file} has no sentences about {len(missing)} of {len(classes)} classes ({_first(missing)}), expected a "
            "list for each: have them written too."
        )
    wrong = [name for name in classes if not _is_list(found[_key(name)])]
    if wrong:
        raise UserError(
            f"{file} has something else than a list of sentences, none of them empty, for {len(wrong)} of "
            f"{len(classes)} classes ({_first(wrong)}): mend it."
        )
    return tuple(tuple(sentence.strip() for sentence in found[_key(name)]) for name in classes)


def write_descriptions(file: str | Path, sentences: Mapping[str, Sequence[str]]) -> None:
    """Writes {class: [sentences]} for `read_descriptions`, to be read and changed by people."""
    Path(file).write_text(json.dumps({k: list(v) for k, v in sentences.items()}, indent=1, ensure_ascii=False), "utf-8")


def draw(seed: int, step: int) -> np.float32:
    """A uniform number in [0, 1) for a step, a multiple of 2^-16."""
    rng = np.random.Generator(np.random.PCG64((seed, _DRAWS, step)))
    return np.float32(int(rng.integers(_STEPS)) / _STEPS)


def place(draw, lengths):
    """Where in its list each class's sentence of the draw stands: floor(draw * length); numpy or JAX, int32 [C].

    Equal for classes with lists of one length, and each place of a list equally likely (to 2^-16).
    """
    return (draw * lengths.astype(np.float32)).astype(np.int32)


def _key(name: str) -> str:
    return name.replace("_", " ").strip().casefold()


def _first(names: Sequence[str]) -> str:
    return ", ".join(map(quoted, names[:_NAMED])) + (", ..." if len(names) > _NAMED else "")


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(is_text(s) and s.strip() for s in value)
