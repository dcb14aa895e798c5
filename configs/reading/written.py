"""What was written, before anybody knows what it means: scalars with their text, and the flow syntax of overrides.

A value becomes a number, a text or a list only when its key's type is known (`convert.py`). YAML's own guesses are
never asked for: they read `010` as 8, `1:30` as 90 and `no` as false.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import yaml

_OPENING, _CLOSING, _QUOTES = "[{(", "]})", "'\""
_DEEPEST = 50


@dataclass(frozen=True)
class Scalar:
    """A single value as it was written."""

    text: str
    quoted: bool = False
    """It had quotes, so that `null` and `~` are texts."""

    def __str__(self) -> str:
        return repr(self.text) if self.quoted else self.text


@dataclass(frozen=True)
class Argument:
    """Everything behind the `=` of an override: the key's type says whether it is a text, a number or a list."""

    text: str

    def __str__(self) -> str:
        return self.text


Node: TypeAlias = "Scalar | Argument | list[Node] | dict[str, Node]"


class Unreadable(ValueError):
    """The text does not have the form that it starts like; the message says what is in the way."""


def unquote(text: str) -> Scalar:
    """The text without the quotes around the whole of it, if there are any; otherwise as it is."""
    if len(text) >= 2 and text[0] == text[-1] and text[0] in _QUOTES:
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError:
            return Scalar(text)
        if isinstance(node, yaml.ScalarNode) and node.style in tuple(_QUOTES):
            return Scalar(node.value, quoted=True)
    return Scalar(text)


def is_list(text: str) -> bool:
    """Whether the text is written like a list, `[a, b]`."""
    return text.startswith("[") and text.endswith("]")


def is_mapping_text(text: str) -> bool:
    """Whether the text is written like a mapping, `{a: 1, b: 2}`; `${…}` is none."""
    return text.startswith("{") and text.endswith("}")


def flow(text: str) -> Node:
    """A list, a mapping or a single value in the flow syntax of YAML, its scalars as they were written.

    Unlike YAML it takes everything between two commas as it is: `[*.jsonl, a#b, <|eos|>]` has three elements.

    Raises:
        Unreadable: brackets or quotes that do not match, empty elements, a mapping without `key: value`.
    """
    text = text.strip()
    if is_list(text):
        return [flow(part) for part in _parts(text)]
    if is_mapping_text(text):
        return dict(_pair(part) for part in _parts(text))
    return unquote(text)


def _pair(text: str) -> tuple[str, Node]:
    key, colon, value = _cut(text)
    if not colon or not key.strip() or not value.strip():
        raise Unreadable(f"{text!r} is not `key: value`")
    return unquote(key.strip()).text, flow(value)


def _cut(text: str) -> tuple[str, str, str]:
    """The key and the value of `key: value`; without a space behind it, the colon must be the only one."""
    if text[:1] in tuple(_QUOTES):
        end = next((at for at, depth in _outside(text) if depth == 0 and text[at] == ":"), -1)
        return (text[:end], ":", text[end + 1 :]) if end > 0 else (text, "", "")
    spaced = text.partition(": ")
    return spaced if spaced[1] or text.count(":") != 1 else text.partition(":")


def _parts(text: str) -> list[str]:
    """What stands between the commas inside the brackets around the whole text."""
    inner = text[1:-1]
    commas = [at for at, depth in _outside(inner) if depth == 0 and inner[at] == ","]
    parts = [inner[a + 1 : b].strip() for a, b in zip([-1, *commas], [*commas, len(inner)], strict=True)]
    if not parts[-1]:
        parts.pop()  # an empty list, or a comma at the end
    if not all(parts):
        raise Unreadable("there is nothing between two commas")
    return parts


def _outside(text: str) -> Iterator[tuple[int, int]]:
    """(position, depth of brackets) of every character outside quotes. Quotes count at the start of an element only."""
    depth, quote, fresh = 0, "", True
    for at, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote and text[at - 1] != "\\" else quote
            continue
        if letter in _QUOTES and fresh:
            quote = letter
            continue
        depth += (letter in _OPENING) - (letter in _CLOSING)
        if depth < 0:
            break
        if depth > _DEEPEST:
            raise Unreadable("the brackets are nested too deeply")
        yield at, depth
        fresh = letter in ",[{:" or (fresh and letter == " ")
    if depth or quote:
        what = "quotes" if quote else "brackets"
        raise Unreadable(f"the {what} do not match; put quotes around a text that contains them")
