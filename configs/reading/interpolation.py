"""`${key}`, `${oc.env:NAME}` and other interpolations in values: how they are written.

What comes from outside, the environment first of all, may be a password. The run uses the value; everything that is
written or said about the run has the interpolation as it was written (`output.py`).
"""

from __future__ import annotations

import re
from typing import Any

SHORTEST_SECRET = 4
"""Values of fewer characters are not looked for in texts: they would be found everywhere."""
_BEGIN = re.compile(r"(\\*)\$\{")


class Unresolvable(ValueError):
    """An interpolation that has no value; the message says why without any value of others."""


def is_interpolated(value: object) -> bool:
    """Whether `${` is somewhere in the value, escaped or not."""
    if isinstance(value, dict):
        return any(is_interpolated(inner) for inner in value.values())
    if isinstance(value, (list, tuple)):
        return any(is_interpolated(inner) for inner in value)
    return isinstance(value, str) and "${" in value


def escape(text: str) -> str:
    """The text written so that reading it gives the text, without interpolation."""
    return _BEGIN.sub(lambda match: f"{match[1] * 2}\\${{", text)


def parts(text: str) -> list[str]:
    """The outermost interpolations in a text that ask a resolver, `${oc.env:…}`, as they were written."""
    found, at = [], 0
    while (at := text.find("${", at)) >= 0:
        depth, end = 0, at
        while end < len(text):
            depth += (text[end] == "{") - (text[end] == "}")
            end += 1
            if text[end - 1] == "}" and depth == 0:
                break
        escaped = (at - len(text[:at].rstrip("\\"))) % 2
        if ":" in text[at:end] and not escaped:
            found.append(text[at:end])
        at = end
    return found


def texts(value: Any) -> list[str]:
    """All strings in a value."""
    if isinstance(value, dict):
        return [text for inner in value.values() for text in texts(inner)]
    if isinstance(value, (list, tuple)):
        return [text for inner in value for text in texts(inner)]
    return [value] if isinstance(value, str) else []
