"""The texts of a row, checked in one way whatever file they come from: JSONL, parquet, CLEVR or captions."""

from collections.abc import Mapping, Sequence
from typing import Any

from paligemma_jax.data.records import BadRow
from train_jax.core.errors import UserError, quoted

UNUSABLE = b"\xffno text: "  # begins what `stored` writes in place of a value that is no text; no UTF-8 does


def check_texts(row: Any, fields: Sequence[str], where: str, remedy: str = "mend it") -> list[str]:
    """The values of `fields`, which are text; bytes are read as UTF-8.

    Args:
      row: an object with these fields, if all is well.
      fields: names.
      where: file and line, or number, of the row.
      remedy: ends the sentence.

    Raises:
      BadRow: a field that is missing or no text (a number or null is none), or text that no file can hold: half of a
        surrogate pair, as is left where a text is cut within an emoji.
    """
    texts = []
    for field in fields:
        value = row.get(field) if isinstance(row, Mapping) else None
        if isinstance(value, bytes):
            value = _decoded(value, field, where, remedy)
        if not isinstance(value, str):
            raise BadRow(
                f"{where} is {quoted(row)}, expected an object with the texts {', '.join(fields)}, where {field} is "
                f"{quoted(value)}; {remedy}."
            )
        if not is_text(value):
            raise BadRow(
                f"{where} has the {field} {quoted(value)}, which holds half a surrogate pair, expected whole "
                f"characters; {remedy}."
            )
        texts.append(value)
    return texts


def is_text(value: Any) -> bool:
    """Whether a value is text that UTF-8 can write."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def check_prompt(value: Any, what: str) -> None:
    """Refuses a value that a caller gives for a text and is none; `what` names it: "the prompt".

    Raises:
      UserError: another type, or text that UTF-8 cannot write.
    """
    if not isinstance(value, str):
        raise UserError(f"{what} {quoted(value)} is of type {type(value).__name__}, expected text: give a string.")
    if not is_text(value):
        raise UserError(f"{what} {quoted(value)} holds bytes that are no UTF-8, expected text: write it anew.")


def stored(value: Any) -> str | bytes:
    """A value to be written where only text can be: bytes that `check_texts` refuses, if it is no text."""
    return value if is_text(value) else UNUSABLE + quoted(value).encode()


def _decoded(value: bytes, field: str, where: str, remedy: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        marked = value.startswith(UNUSABLE)
        found = value.removeprefix(UNUSABLE).decode(errors="replace") if marked else quoted(value)
        raise BadRow(f"{where} has the {field} {found}, expected text in UTF-8; {remedy}.") from None
