"""JSON from files that may be damaged or hostile: read whole and strictly, or refused in one line.

What Python's reader lets pass and this one refuses: a key twice (the last one would win silently), NaN and Infinity,
numbers beyond a float, texts that no terminal can print, deep nesting, files of any length, links, pipes and devices.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from .fields import short

MAX_BYTES = 64 << 20
MAX_DEPTH = 32

_HALF_OF_A_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
_NO_FILE_NAME = re.compile(r"[/\\\x00-\x1f\x7f]")


class JsonError(ValueError):
    """A JSON text is not what it must be; the message says what is wrong, in one line."""


def parse_json(data: bytes, *, max_depth: int = MAX_DEPTH) -> Any:
    """The value of a JSON text in UTF-8.

    Args:
        data: the whole text.
        max_depth: lists and objects inside one another.

    Raises:
        JsonError: it is not JSON, or one of the things that the module's first lines name.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_object, parse_float=_float, parse_constant=_constant
        )
        if _HALF_OF_A_PAIR.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except JsonError:
        raise
    except RecursionError:
        raise JsonError(f"nested deeper than {max_depth} levels") from None
    except UnicodeError:
        raise JsonError("not a text in UTF-8") from None
    except ValueError as error:
        raise JsonError(f"no JSON: {error}") from None
    level = [value]
    for _ in range(max_depth + 1):
        if not level:
            return value
        level = [inner for outer in level if _holds(outer) for inner in _inner(outer) if _holds(inner)]
    raise JsonError(f"nested deeper than {max_depth} levels")


def read_json(path: Path, *, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH) -> Any:
    """The value of a JSON file.

    Raises:
        JsonError: as `parse_json`, or it is no regular file, or larger than `max_bytes`.
        OSError: it is absent or cannot be read.
    """
    return parse_json(read_bytes(path, max_bytes=max_bytes), max_depth=max_depth)


def read_bytes(path: Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """A small regular file.

    Raises:
        JsonError: it is no regular file, or larger than `max_bytes`.
        OSError: it is absent or cannot be read.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise JsonError(f"more than {max_bytes} bytes")
    return data


def open_regular(path: Path, *, write: bool = False) -> int:
    """A file descriptor for reading a regular file, never what a symbolic link points to, a pipe or a device.

    Args:
        path: of the file.
        write: for writing too.

    Raises:
        JsonError: it is no regular file.
        OSError: it is absent or cannot be read.
    """
    if path.is_symlink():
        raise JsonError("a symbolic link, not a file")
    fd = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise JsonError("not a regular file")
    return fd


def expect_object(value: Any, what: str, keys: Iterable[str] | None = None) -> dict[str, Any]:
    """`value`, if it is an object with at least `keys`; `what` names it in the error.

    Raises:
        JsonError: it is something else.
    """
    if not isinstance(value, dict):
        raise JsonError(f"{what} is {short(value)}, not an object")
    lacking = [key for key in keys or () if key not in value]
    if lacking:
        raise JsonError(f"{what} lacks {', '.join(lacking)}")
    return value


def expect_list(value: Any, what: str) -> list[Any]:
    """`value`, if it is a list.

    Raises:
        JsonError: it is something else.
    """
    if not isinstance(value, list):
        raise JsonError(f"{what} is {short(value)}, not a list")
    return value


def expect_text(value: Any, what: str) -> str:
    """`value`, if it is a text.

    Raises:
        JsonError: it is something else.
    """
    if not isinstance(value, str):
        raise JsonError(f"{what} is {short(value)}, not a text")
    return value


def expect_int(value: Any, what: str, low: int = 0, high: int = 2**63 - 1) -> int:
    """`value`, if it is an integer of [low, high].

    Raises:
        JsonError: it is something else.
    """
    if not is_int(value):
        raise JsonError(f"{what} is {short(value)}, not an integer")
    if not low <= value <= high:
        raise JsonError(f"{what} is {short(value)}, which is not between {low} and {high}")
    return value


def expect_number(value: Any, what: str) -> float:
    """`value` as a float, if it is a number.

    Raises:
        JsonError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise JsonError(f"{what} is {short(value)}, not a number")
    return float(value)


def is_int(value: Any) -> TypeGuard[int]:
    """Whether it is an integer; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def expect_file_name(value: Any, what: str) -> str:
    """`value`, if it names a file directly in a folder: no path, nothing that leads out of it.

    Raises:
        JsonError: it is something else.
    """
    name = expect_text(value, what)
    if not name or name in {".", ".."} or len(name) > 255 or _NO_FILE_NAME.search(name):
        raise JsonError(f"{what} is {short(name)}, not the name of a file")
    return name


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise JsonError(f"the key {short(twice)} is there twice")
    return found


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise JsonError(f"the number {short(text)} is too large")
    return value


def _constant(text: str) -> float:
    raise JsonError(f"{text} is no number in JSON")


def _holds(value: Any) -> bool:
    return isinstance(value, (dict, list))


def _inner(value: Mapping[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, Mapping) else value
