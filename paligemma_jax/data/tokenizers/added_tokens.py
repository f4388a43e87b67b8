"""Tokens added to a tokenizer after its pieces were learned; texts are split at them as in transformers.

They are listed in three files, of which releases of transformers write some or all:

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
from paligemma_jax.files.side_files import KnownKeys, account, is_off, read_json, refusal
from train_jax.core.errors import UserError, quoted

JSON, CONFIG, ADDED, SPECIAL = "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
_TOKEN = KnownKeys(read=frozenset({"content", "id", *FLAGS}), idle=frozenset({"__type"}))
_MARKS = frozenset({"bos_token", "eos_token", "pad_token", "unk_token", "mask_token", "sep_token", "cls_token"})
# Special tokens of the model families themselves.
OWN_MARKS = frozenset({"<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<s>", "</s>", "<|startoftext|>", "<|endoftext|>"})
# Keys that hold tokens by name; their ids are those of the pieces or of the files above.
_NAMES = _MARKS | {"image_token", "boi_token", "eoi_token"}
_LISTS = frozenset({"additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"})
CONFIG_KEYS = KnownKeys(
    read=_NAMES | _LISTS | {"added_tokens_decoder", "do_lower_case", "model_max_length"},
    only={"split_special_tokens": (False,), "add_prefix_space": (False,)},
    # Special tokens, padding and truncation are handled by data/prompts.py and text_tower.py, which refuse any side but
    # the right; the other keys concern chats, decoding by other classes, and the origin of the files.
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
            "tokenizer_class",  # the file with the pieces determines the kind
            "tokenizer_file",
            "truncation_side",
            "truncation_strategy",
            "use_default_system_prompt",
            "vocab_file",
        }
    ),
)
SPECIAL_KEYS = KnownKeys(read=_NAMES | _LISTS)


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token with its own text.

    Attributes:
      id, content: its id and text.
      lstrip, rstrip: whether white space before and after it is part of the match.
      single_word: whether it matches only where no letter, digit or underscore is adjacent.
      normalized: whether it is matched after the tokens that are not normalized.
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
        """Returns the token's entry in tokenizer_config.json, without its id."""
        return {"content": self.content} | {flag: getattr(self, flag) for flag in sorted(FLAGS)}


def read_added_tokens(folder: Path) -> dict[str, AddedToken]:
    """Returns the tokens that a folder's files add, by their text.

    Raises:
      UserError: a broken file, or files that contradict one another about an id.
    """
    tokens: dict[str, AddedToken] = {}
    contents: dict[int, str] = {}
    for file, token in _tokens(folder):
        same = tokens.setdefault(token.content, token)
        other = contents.setdefault(token.id, token.content)
        if same.id != token.id or other != token.content:
            raise UserError(
                f"{file} has {quoted(token.content)} = {token.id}, but another file of the tokenizer says "
                f"{quoted(other)} for that id or {same.id} for that token: give the files of one tokenizer."
            )
    return tokens


def _tokens(folder: Path) -> Iterable[tuple[Path, AddedToken]]:
    """Yields every token of every file; the file whose flags take precedence comes first."""
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
    """Returns one token of a file, after checking its values."""
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
    """Refuses an added token whose text is already a piece with another id: transformers would use the piece.

    Args:
      added: tokens of the files beside `file`.
      index: returns the id of a text that is a piece, below `pieces`; its result for other texts is ignored.
      pieces: number of pieces.
      file: of the pieces.

    Raises:
      UserError: the first such token.
    """
    for token in added:
        piece = index(token.content)
        if piece is not None and piece < pieces and piece != token.id:
            raise UserError(
                f"the tokenizer of {file} adds {quoted(token.content)} = {token.id}, but that is a piece already, "
                f"{piece}: add the token with that id, or another text."
            )


def listed_tokens(folder: Path, index: Callable[[str], int | None], known: Container[str]) -> list[AddedToken]:
    """Returns pieces that tokenizer_config.json or special_tokens_map.json list; texts are split at these too.

    Special tokens of the families are left out: their tokenizers handle them.

    Args:
      folder: of the files.
      index: returns the id of a piece, None for other texts.
      known: texts of tokens that texts are already split at.

    Raises:
      UserError: a token that is no piece and has no id in any file.
    """
    listed = {}
    for key, (at, tokens) in _named(folder).items():
        for token in tokens:
            values = token if isinstance(token, dict) else {"content": token}
            if (content := values["content"]) in OWN_MARKS or content in known:
                continue
            if (piece := index(content)) is None:
                if key == "mask_token":  # appended by transformers, and unused here
                    continue
                raise refusal(at, key, content, "a token that a piece or an added token has", "add it with its id")
            listed[content] = dataclasses.replace(_token(values, piece, at), special=True)
    return list(listed.values())


def named_tokens(folder: Path) -> dict[str, tuple[Path, list[str]]]:
    """Returns the special tokens of tokenizer_config.json and special_tokens_map.json: by key, the file and the texts.

    Raises:
      UserError: a broken file, or an unknown key.
    """
    return {
        key: (file, [value["content"] if isinstance(value, dict) else value for value in values])
        for key, (file, values) in _named(folder).items()
    }


def _named(folder: Path) -> dict[str, tuple[Path, list[str | dict[str, Any]]]]:
    """Returns, by key, the file and its tokens, each a text or an object with its content."""
    named: dict[str, tuple[Path, list[str | dict[str, Any]]]] = {}
    for name, keys in ((SPECIAL, SPECIAL_KEYS), (CONFIG, CONFIG_KEYS)):
        if not (file := folder / name).is_file():
            continue
        values = read_json(file)
        account(values, keys, file)
        for key in sorted(keys.read & (_NAMES | _LISTS)):
            if not is_off(values.get(key)):
                named[key] = file, _several(values[key], key, file)
    return named


def _several(value: Any, key: str, file: Path) -> list[str | dict[str, Any]]:
    """Returns one token or several as a list, each a text or an object with its content."""
    several = list(value.values()) if isinstance(value, dict) and "content" not in value else value
    several = several if isinstance(several, list) else [several]
    if not all(is_text(each.get("content") if isinstance(each, dict) else each) for each in several):
        raise refusal(file, key, value, "texts", "download it again")
    return several


class Splitter:
    """Splits texts at added tokens as the tokenizers library does: leftmost match first, then the longest."""

    def __init__(self, tokens: Iterable[AddedToken]):
        self._tokens = {token.content: token for token in tokens}
        self._passes = [
            _pattern([content for content, token in self._tokens.items() if token.normalized is normalized])
            for normalized in (False, True)
        ]

    def __call__(self, text: str) -> list[str | int]:
        """Returns the text between tokens and the tokens' ids, in order, without empty parts."""
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
    """Returns a regular expression for the longest of the texts; a prefix tree, as there are over a thousand."""
    tree: dict[str, Any] = {}
    for content in contents:
        node = tree
        for character in content:
            node = node.setdefault(character, {})
        node[""] = {}
    return re.compile(_branches(tree)) if tree else None


def _branches(node: Mapping[str, Any]) -> str:
    """Returns the regular expression for the continuations at a node of the tree."""
    branches = []
    for character, below in node.items():
        text = character
        while len(below) == 1 and "" not in below:
            ((character, below),) = below.items()
            text += character
        if text:
            branches.append(re.escape(text) + _branches(below))
    if not branches:
        return ""
    joined = branches[0] if len(branches) == 1 and "" not in node else f"(?:{'|'.join(branches)})"
    return f"{joined}?" if "" in node else joined
