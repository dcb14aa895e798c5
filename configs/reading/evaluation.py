"""The values of interpolations, by OmegaConf.

Imported when there is one: OmegaConf takes longer to import than everything else that reads a job.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import (
    GrammarParseError,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)

from .interpolation import Unresolvable, is_interpolated, texts

_NAMES_WHAT_IS_WRITTEN = re.compile(
    r"(?:Interpolation key '|Environment variable '|Unsupported interpolation type )([^']*)(?:' not found)?"
)


def lookup(values: Mapping[str, Any], key: str) -> Any:
    """The value of `key` among the values by dotted key, or None where it cannot be resolved."""
    try:
        return evaluate(values, key)
    except Unresolvable:
        return None


def evaluate(values: Mapping[str, Any], key: str) -> Any:
    """The value of `key` with all interpolations resolved.

    Args:
        values: dotted key to value; strings may be interpolations of the others.
        key: one of them.

    Raises:
        Unresolvable: the interpolation is not well formed, or what it refers to is not there.
    """
    _parse(values[key])
    tree: dict[str, Any] = {}
    for name, value in values.items():
        if name == key or not is_interpolated(value) or _is_well_formed(value):
            _put(tree, name.split("."), value)
    try:
        found = OmegaConf.select(OmegaConf.create(tree), key)
        return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
    except RecursionError:
        raise Unresolvable("it refers to itself") from None
    except (OmegaConfBaseException, ValueError, TypeError, KeyError) as error:
        raise Unresolvable(_reason(error, " ".join(texts(values[key])))) from None


def _reason(error: Exception, text: str) -> str:
    """Why the interpolations in `text` have no value, in OmegaConf's words where they name only what is written."""
    message = _first_line(error)
    if message.startswith("Recursive interpolation"):
        return "it refers to itself"
    known = _NAMES_WHAT_IS_WRITTEN.search(message)
    if known is None or known[1] not in text:
        # The rest of the messages may contain values from the environment.
        return "the value is not what the interpolation takes"
    is_type = isinstance(error, UnsupportedInterpolationType)
    return known[0] + ("; known are oc.env, oc.decode, oc.select and oc.create" if is_type else "")


def _parse(value: Any) -> None:
    try:
        OmegaConf.create({"value": value})
    except GrammarParseError as error:
        raise Unresolvable(_first_line(error)) from None
    except RecursionError:
        raise Unresolvable("it is nested too deeply") from None


def _is_well_formed(value: Any) -> bool:
    try:
        _parse(value)
    except Unresolvable:
        return False
    return True


def _put(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        child = tree.get(part)
        if not isinstance(child, dict):
            child = tree[part] = {}
        tree = child
    tree[path[-1]] = value


def _first_line(error: Exception) -> str:
    line = str(error).splitlines()[0]
    return line if len(line) <= 100 else line[:97] + "..."
