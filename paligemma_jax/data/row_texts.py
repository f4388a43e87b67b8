"""Checks the texts of a row in one way for all file formats: JSONL, parquet, CLEVR and captions."""

from collections.abc import Mapping, Sequence
from typing import Any

from paligemma_jax.data.records import BadRow
from train_jax.core.errors import UserError, quoted

UNUSABLE = b"\xffno text: "  # marks values that `stored` writes in place of non-text; 0xff occurs in no UTF-8


def check_texts(row: Any, fields: Sequence[str], where: str, remedy: str = "correct it") -> list[str]:
    """Returns the values of `fields`, which must be text; bytes are decoded as UTF-8.

    Args:
      row: an object with these fields, if it is valid.
      fields: names.
      where: file and line, or number, of the row.
      remedy: end of the error message.

    Raises:
      BadRow: a field that is missing or not text (a number or null), or text with half of a surrogate pair, as is left
        where a text is cut within an emoji.
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
    """Returns whether a value is text that UTF-8 can encode."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def check_prompt(value: Any, what: str) -> None:
    """Refuses an argument that is not text; `what` names it in the message: "the prompt".

    Raises:
      UserError: another type, or text that UTF-8 cannot encode.
    """
    if not isinstance(value, str):
        raise UserError(f"{what} {quoted(value)} is of type {type(value).__name__}, expected text: give a string.")
    if not is_text(value):
        raise UserError(f"{what} {quoted(value)} holds bytes that are not UTF-8, expected text: correct it.")


def stored(value: Any) -> str | bytes:
    """Returns a value for a field that holds text; a non-text becomes bytes that `check_texts` refuses."""
    return value if is_text(value) else UNUSABLE + quoted(value).encode()


def _decoded(value: bytes, field: str, where: str, remedy: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        marked = value.startswith(UNUSABLE)
        shown = value.removeprefix(UNUSABLE).decode(errors="replace") if marked else quoted(value)
        raise BadRow(f"{where} has the {field} {shown}, expected text in UTF-8; {remedy}.") from None
