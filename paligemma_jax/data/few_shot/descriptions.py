"""Sentences about each class: from templates, or from a JSON object {class: [sentences]} that a language model wrote.

For consistency with the frozen text encoder CoPrompt (Roy & Etemad 2024) draws one position in these lists per step,
the same for all classes. A position is a uniform number (`uniform_of_step`) times the length of a class's list,
so lists may differ in length.
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
_STEPS = 1 << 16  # number of values of a draw, so that float32 is exact and a product with a length stays below it
_MAX_NAMED = 3  # classes that a message names

Sentences = tuple[tuple[str, ...], ...]


def fill_templates(classes: Sequence[str], templates: Sequence[str]) -> Sentences:
    """Returns every class in every template, by class.

    Raises:
      UserError: no class, a template without {}, names or templates that are not text, or one text in place of a list.
    """
    for given in (classes, templates):
        if isinstance(given, str):
            raise UserError(f"classes or templates are the one text {quoted(given)}, expected a list: put it into one.")
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
    """Returns a template with a name in place of its {}; other braces are text."""
    return template.replace("{}", name)


def read_descriptions(file: str | Path, classes: Sequence[str]) -> Sentences:
    """Returns the sentences of each class, in the order of `classes`.

    Other classes of the file are ignored. Names are compared without case, and with spaces for underscores.

    Raises:
      UserError: no such file, no object of lists of sentences, or missing classes (naming the first ones).
    """
    try:
        content = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file} cannot be read as JSON ({error}), expected {{class: [sentences]}}: correct it."
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object, expected {{class: [sentences]}}: correct it.")
    sentences = {_key(name): values for name, values in content.items()}
    missing = [name for name in classes if _key(name) not in sentences]
    if missing:
        raise UserError(
            f"{file} has no sentences about {len(missing)} of {len(classes)} classes ({_first(missing)}), expected a "
            "list for each: add them."
        )
    wrong = [name for name in classes if not _is_list(sentences[_key(name)])]
    if wrong:
        raise UserError(
            f"{file} has no list of non-empty sentences for {len(wrong)} of "
            f"{len(classes)} classes ({_first(wrong)}): correct it."
        )
    return tuple(tuple(sentence.strip() for sentence in sentences[_key(name)]) for name in classes)


def write_descriptions(file: str | Path, sentences: Mapping[str, Sequence[str]]) -> None:
    """Writes {class: [sentences]} for `read_descriptions`, indented for people to read and edit."""
    Path(file).write_text(json.dumps({k: list(v) for k, v in sentences.items()}, indent=1, ensure_ascii=False), "utf-8")


def uniform_of_step(seed: int, step: int) -> np.float32:
    """Returns a uniform number in [0, 1) for a step, a multiple of 2^-16."""
    rng = np.random.Generator(np.random.PCG64((seed, _DRAWS, step)))
    return np.float32(int(rng.integers(_STEPS)) / _STEPS)


def positions(draw, lengths):
    """Returns the position of each class's sentence in its list: floor(draw * length); numpy or JAX, int32 [C].

    Classes with equally long lists have equal positions; each position of a list is equally likely (to 2^-16).
    """
    return (draw * lengths.astype(np.float32)).astype(np.int32)


def _key(name: str) -> str:
    return name.replace("_", " ").strip().casefold()


def _first(names: Sequence[str]) -> str:
    return ", ".join(map(quoted, names[:_MAX_NAMED])) + (", ..." if len(names) > _MAX_NAMED else "")


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(is_text(s) and s.strip() for s in value)
