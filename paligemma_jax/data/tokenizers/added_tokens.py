"""Tokens that were added to a tokenizer after its pieces were learned, and how they cut a text, as in transformers.

Three files name them, and older and newer releases of transformers write some of the three:

  added_tokens.json        {"<answer>": 257153}
  tokenizer_config.json    "added_tokens_decoder": {"257153": {"content": "<answer>", "lstrip": false, ...}}
  tokenizer.json           "added_tokens": [{"id": 257153, "content": "<answer>", "lstrip": false, ...}]
"""

import dataclasses
import re
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from paligemma_jax.data.row_texts import is_text
from paligemma_jax.files.side_files import Keys, account, is_off, read_json, refusal
from train_jax.core.errors import UserError, quoted

JSON, CONFIG, ADDED, SPECIAL = "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
_TOKEN = Keys(read=frozenset({"content", "id", *FLAGS}), idle=frozenset({"__type"}))
_MARKS = frozenset({"bos_token", "eos_token", "pad_token", "unk_token", "mask_token", "sep_token", "cls_token"})
# What the families' own marks are called.
OWN_MARKS = frozenset({"<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<s>", "</s>", "<|startoftext|>", "<|endoftext|>"})
# Keys that hold tokens by name; their ids are the pieces' or those of the files above.
_NAMES = _MARKS | {"image_token", "boi_token", "eoi_token"}
_LISTS = frozenset({"additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"})
CONFIG_KEYS = Keys(
    read=_NAMES | _LISTS | {"added_tokens_decoder", "do_lower_case", "model_max_length"},
    only={"split_special_tokens": (False,), "add_prefix_space": (False,)},
    # Marks are set, texts padded and cut by data/prompts.py and text_tower.py, which refuses sides other than the
    # right; the rest is of chats, of decoding by other classes, and of where the files came from.
    idle=frozenset(
        {
            "_commit_hash",
            "add_bos_token",
            "add_eos_token",
            "backend",
            "chat_template",
            "clean_up_tokenization_spaces",
            "device_map",
            "errors",
            "fix_mistral_regex",
            "image_token_id",
            "is_local",
            "legacy",
            "local_files_only",
            "max_length",
            "model_input_names",
            "name_or_path",
            "pad_to_multiple_of",
            "pad_token_type_id",
            "padding_side",
            "processor_class",
            "spaces_between_special_tokens",
            "special_tokens_map_file",
            "stride",
            "tokenizer_class",  # the file of the pieces says their kind
            "tokenizer_file",
            "truncation_side",
            "truncation_strategy",
            "use_default_system_prompt",
            "vocab_file",
        }
    ),
)
SPECIAL_KEYS = Keys(read=_NAMES | _LISTS)


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token with a text of its own.

    Attributes:
      id, content: its id and text.
      lstrip, rstrip: whether white space before and behind it is taken along.
      single_word: whether it counts only where no letter, digit or underscore stands beside it.
      normalized: whether tokens that are not cut the text first.
      special: whether transformers' `skip_special_tokens` drops it.
    """

    id: int
    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False
    special: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As tokenizer_config.json has it under the id."""
        return {"content": self.content} | {flag: getattr(self, flag) for flag in sorted(FLAGS)}


def read_added_tokens(folder: Path) -> dict[str, AddedToken]:
    """The tokens that a folder's files add, by their text.

    Raises:
      UserError: a file that is broken, or files of which one says another id than the other.
    """
    found: dict[str, AddedToken] = {}
    at: dict[int, str] = {}
    for file, token in _tokens(folder):
        same = found.setdefault(token.content, token)
        other = at.setdefault(token.id, token.content)
        if same.id != token.id or other != token.content:
            raise UserError(
                f"{file} has {quoted(token.content)} = {token.id}, but another file of the tokenizer says "
                f"{quoted(other)} for that id or {same.id} for that token: give the files of one tokenizer."
            )
    return found


def _tokens(folder: Path) -> Iterable[tuple[Path, AddedToken]]:
    """Every token of every file, the file whose flags count first."""
    if (file := folder / JSON).is_file():
        listed = read_json(file).get("added_tokens")
        listed = [] if listed is None else listed
        if not isinstance(listed, list):
            raise refusal(file, "added_tokens", listed, "a list of tokens", "download it again")
        for values in listed:
            yield file, _token(values, values.get("id") if isinstance(values, dict) else None, file)
    if (file := folder / CONFIG).is_file():
        values = read_json(file)
        account(values, CONFIG_KEYS, file)
        decoder = values.get("added_tokens_decoder")
        decoder = {} if decoder is None else decoder
        if not isinstance(decoder, dict):
            raise refusal(file, "added_tokens_decoder", decoder, "an object of tokens by id", "download it again")
        for index, values in decoder.items():
            yield file, _token(values, int(index) if index.isdecimal() else index, file)
    if (file := folder / ADDED).is_file():
        for content, index in read_json(file).items():
            yield file, _token({"content": content}, index, file)


def _token(values: Any, index: Any, file: Path) -> AddedToken:
    """One token of a file."""
    fine = isinstance(values, dict) and is_text(values.get("content")) and values["content"]
    if not fine or type(index) is not int or index < 0:
        raise refusal(file, f"the added token {index!r}", values, "a text with an id", "download it again")
    account(values, _TOKEN, file, f"the added token {index} ")
    given = {flag: values[flag] for flag in FLAGS if values.get(flag) is not None}
    for flag, value in given.items():
        if type(value) is not bool:
            raise refusal(file, f"the added token {index} {flag}", value, "true or false", "correct it")
    return AddedToken(index, values["content"], **given)


def check_pieces(
    added: Iterable[AddedToken], index: Callable[[str], int | None], pieces: int, file: str | Path
) -> None:
    """Refuses an added token whose text is a piece of another id already: transformers would take the piece's.

    Args:
      added: tokens of the files beside `file`.
      index: id of a text that is a piece, below `pieces`; what it says of others is no matter.
      pieces: how many there are.
      file: of the pieces.

    Raises:
      UserError: the first of them.
    """
    for token in added:
        piece = index(token.content)
        if piece is not None and piece < pieces and piece != token.id:
            raise UserError(
                f"the tokenizer of {file} adds {quoted(token.content)} = {token.id}, but that is a piece already, "
                f"{piece}: add the token with that id, or another text."
            )


def listed_tokens(folder: Path, index: Callable[[str], int | None], known: Container[str]) -> list[AddedToken]:
    """Pieces that tokenizer_config.json or special_tokens_map.json name, for texts are cut at them too.

    Marks of the families are left out: what they are in a text, their tokenizers say.

    Args:
      folder: of the files.
      index: id of a piece, None for what is none.
      known: texts of tokens that are cut at already.

    Raises:
      UserError: one that is no piece, whose id no file says.
    """
    found = {}
    for key, (at, tokens) in _named(folder).items():
        for token in tokens:
            values = token if isinstance(token, dict) else {"content": token}
            if (content := values["content"]) in OWN_MARKS or content in known:
                continue
            if (piece := index(content)) is None:
                if key == "mask_token":  # transformers appends one that nothing here uses
                    continue
                raise refusal(at, key, content, "a token that a piece or an added token has", "add it with its id")
            found[content] = dataclasses.replace(_token(values, piece, at), special=True)
    return list(found.values())


def named_tokens(folder: Path) -> dict[str, tuple[Path, list[str]]]:
    """What tokenizer_config.json and special_tokens_map.json call marks and further tokens: by key, file and texts.

    Raises:
      UserError: a file that is broken, or a key that is not known.
    """
    return {
        key: (file, [value["content"] if isinstance(value, dict) else value for value in values])
        for key, (file, values) in _named(folder).items()
    }


def _named(folder: Path) -> dict[str, tuple[Path, list[str | dict[str, Any]]]]:
    """By key, the file and its tokens, each a text or an object with its content."""
    found: dict[str, tuple[Path, list[str | dict[str, Any]]]] = {}
    for name, keys in ((SPECIAL, SPECIAL_KEYS), (CONFIG, CONFIG_KEYS)):
        if not (file := folder / name).is_file():
            continue
        values = read_json(file)
        account(values, keys, file)
        for key in sorted(keys.read & (_NAMES | _LISTS)):
            if not is_off(values.get(key)):
                found[key] = file, _several(values[key], key, file)
    return found


def _several(value: Any, key: str, file: Path) -> list[str | dict[str, Any]]:
    """One token or several, each a text or an object with its content."""
    several = list(value.values()) if isinstance(value, dict) and "content" not in value else value
    several = several if isinstance(several, list) else [several]
    if not all(is_text(each.get("content") if isinstance(each, dict) else each) for each in several):
        raise refusal(file, key, value, "texts", "download it again")
    return several


class Splitter:
    """Cuts texts at added tokens as the tokenizers library does: the leftmost first, of those the longest."""

    def __init__(self, tokens: Iterable[AddedToken]):
        self._tokens = {token.content: token for token in tokens}
        self._passes = [
            _pattern([content for content, token in self._tokens.items() if token.normalized is normalized])
            for normalized in (False, True)
        ]

    def __call__(self, text: str) -> list[str | int]:
        """Pieces of the text and ids of the tokens between them, none of them empty."""
        parts: list[str | int] = [text] if text else []
        for pattern in filter(None, self._passes):
            parts = [each for part in parts for each in (self._cut(pattern, part) if isinstance(part, str) else [part])]
        return parts

    def _cut(self, pattern: re.Pattern, text: str) -> list[str | int]:
        parts: list[str | int] = []
        done = 0
        for match in pattern.finditer(text):
            token, (start, end) = self._tokens[match[0]], match.span()
            if start < done or (token.single_word and _inside_word(text, start, end)):
                continue
            if token.lstrip:
                start = max(done, len(text[:start].rstrip()))
            if token.rstrip:
                end = len(text) - len(text[end:].lstrip())
            parts += [text[done:start], token.id] if start > done else [token.id]
            done = end
        return [*parts, text[done:]] if done < len(text) else parts


def _inside_word(text: str, start: int, end: int) -> bool:
    return any(re.match(r"\w", each) is not None for each in (text[start - 1 : start], text[end : end + 1]))


def _pattern(contents: list[str]) -> re.Pattern | None:
    """A regular expression that matches the longest of the texts; as a tree, for there are more than a thousand."""
    tree: dict[str, Any] = {}
    for content in contents:
        node = tree
        for character in content:
            node = node.setdefault(character, {})
        node[""] = {}
    return re.compile(_branches(tree)) if tree else None


def _branches(node: Mapping[str, Any]) -> str:
    """What may follow at a node of the tree."""
    ways = []
    for character, below in node.items():
        text = character
        while len(below) == 1 and "" not in below:
            ((character, below),) = below.items()
            text += character
        if text:
            ways.append(re.escape(text) + _branches(below))
    if not ways:
        return ""
    joined = ways[0] if len(ways) == 1 and "" not in node else f"(?:{'|'.join(ways)})"
    return f"{joined}?" if "" in node else joined
