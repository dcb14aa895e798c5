"""From what was written to the value of a key, by the key's declared type."""

from __future__ import annotations

import re
import types
import unicodedata
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal, Union, get_args, get_origin

from ..fields import describe, optional
from ..tables.named import named
from .written import Argument, Node, Scalar, Unreadable, flow, is_list, is_mapping_text, unquote

LARGEST_INT = 2**63 - 1
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_TRUTHS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NUMBER = re.compile(r"[-+]?(\d+(_\d+)*)?(\.(\d+(_\d+)*)?)?([eE][-+]?\d{1,4})?", re.ASCII)
_NOT_FINITE = re.compile(r"[-+]?\.?(inf|nan)", re.IGNORECASE)


class WrongType(ValueError):
    """The value is not what its key takes; the message is a hint, or empty."""


def convert(annotation: Any, node: Node) -> Any:
    """The value of a key.

    A text is taken as it was written. Numbers are decimal: `1_000`, `1e3` and `4.0` are integers, `010` is ten. A list
    may be given as its single element.

    Args:
        annotation: the key's declared type.
        node: what was written.

    Raises:
        WrongType: it is something else.
    """
    inner, nullable = optional(annotation)
    if isinstance(node, Argument):
        node = _argument(inner, node.text)
    if isinstance(node, Scalar) and not node.quoted and node.text in _NULLS:
        if nullable:
            return None
        raise WrongType
    if get_origin(inner) in (Union, types.UnionType):
        return _any_of(inner, node)
    origin, args = get_origin(inner), get_args(inner)
    if origin in (tuple, list):
        elements = node if isinstance(node, list) else [node]
        return origin(convert(args[0], element) for element in elements)
    if origin is dict:
        if not isinstance(node, dict):
            raise WrongType
        return {key: convert(args[1], value) for key, value in node.items()}
    if not isinstance(node, Scalar):
        raise WrongType(_quote(inner, node))
    return _scalar(inner, node)


def display(node: Node) -> str:
    """What was written, for a message."""
    if isinstance(node, list):
        return f"[{', '.join(map(display, node))}]"
    if isinstance(node, dict):
        return f"{{{', '.join(f'{key}: {display(value)}' for key, value in node.items())}}}"
    if isinstance(node, Scalar) and not node.quoted and node.text in _NULLS:
        return "null"
    return repr(node.text)


def raw(node: Node) -> Any:
    """Plain strings, lists and dicts of what was written, `null` as None."""
    if isinstance(node, list):
        return [raw(element) for element in node]
    if isinstance(node, dict):
        return {key: raw(value) for key, value in node.items()}
    return None if isinstance(node, Scalar) and not node.quoted and node.text in _NULLS else node.text


def written(value: Any) -> Node:
    """A Python value as if it had been written."""
    if isinstance(value, (list, tuple)):
        return [written(element) for element in value]
    if isinstance(value, Mapping):
        return {str(key): written(element) for key, element in value.items()}
    if value is None or isinstance(value, bool):
        return Scalar({None: "null", True: "true", False: "false"}[value])
    return Scalar(str(value), quoted=isinstance(value, str))


def odd_character(text: str) -> str:
    """A note about the first character that is not ASCII, for words and numbers that only look right; or nothing."""
    letter = next((c for c in text if not c.isascii()), None)
    if letter is None:
        return ""
    return f"; {letter!r} in it is U+{ord(letter):04X} ({unicodedata.name(letter, 'without a name')})"


def _argument(inner: Any, text: str) -> Node:
    """What an override means for a key of this type: text stays whole, everything else may be a list or a mapping."""
    if inner is str:
        if text == "~":
            raise WrongType("; write null for none, or ~/ for the home folder")
        return unquote(text)
    text = text.strip()
    if is_list(text) or is_mapping_text(text):
        try:
            return flow(text)
        except Unreadable as error:
            raise WrongType(f"; {error}") from None
    return unquote(text)


def _any_of(union: Any, node: Node) -> Any:
    hints: list[str] = []
    for alternative in get_args(union):
        try:
            return convert(alternative, node)
        except WrongType as error:
            hints.append(str(error))
    raise WrongType(next(filter(None, hints), ""))


def _scalar(inner: Any, node: Scalar) -> Any:
    text = node.text if inner is str else node.text.strip()
    if inner is str:
        return text
    mark = named(inner)
    if mark is not None:
        if not mark.takes(text):
            raise WrongType(odd_character(text))
        return text
    if get_origin(inner) is Literal:
        found = [choice for choice in get_args(inner) if str(choice) == text]
        if not found:
            raise WrongType(odd_character(text))
        return found[0]
    if inner is bool and text.lower() in _TRUTHS:
        return _TRUTHS[text.lower()]
    if inner is int:
        return _integer(text)
    if inner is float:
        return _float(text)
    raise WrongType(odd_character(text))


def _integer(text: str) -> int:
    number = _decimal(text)
    if number.adjusted() > len(str(LARGEST_INT)) or number != number.to_integral_value():
        raise WrongType("; it is too large" if number.adjusted() > len(str(LARGEST_INT)) else "")
    if abs(number) > LARGEST_INT:
        raise WrongType(f"; the largest is {LARGEST_INT}")
    return int(number)


def _float(text: str) -> float:
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return float(_decimal(text))


def _decimal(text: str) -> Decimal:
    """The number, decimal and in ASCII.

    Raises:
        WrongType: it is none; the hint says what is near.
    """
    if _NUMBER.fullmatch(text) and any(c.isdigit() for c in text.partition("e")[0].partition("E")[0]):
        return Decimal(text.replace("_", ""))
    if "," in text:
        raise WrongType("; write decimals with a point, thousands without a comma, and lists in brackets, [1, 2]")
    if re.fullmatch(r"[-+]?0[xob][0-9a-f_]+", text, re.IGNORECASE):
        raise WrongType("; write it as a decimal number")
    if re.fullmatch(r"\d+(:\d+)+(\.\d*)?", text):
        raise WrongType("; write one number")
    raise WrongType(odd_character(text))


def _quote(inner: Any, node: Node) -> str:
    """The hint for a text that YAML takes for a list or a mapping."""
    return f"; put it in quotes if it is a text: '{display(node)}'".replace("''", "'") if inner is str else ""


def expected(annotation: Any, node: Node, hint: str) -> str:
    """The message for a value of the wrong type."""
    shown = " ".join(display(node).split())
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return f"expected {describe(annotation)}, got {shown}{hint}"
