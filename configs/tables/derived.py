"""Keys that need not be written: `resolve` fills them in, so that whoever reads a loaded job finds a value."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar, get_args, get_origin

_Value = TypeVar("_Value")


class _Mark:
    """That a key is derived where it is not written."""


_DERIVES = _Mark()
Derived = Annotated[_Value, _DERIVES]
"""The type of a derived key: `kv_heads: Derived[int] = DERIVED`. To type checkers it is that of its value."""
DERIVED: Any = None
"""The default of a derived key, which `resolve` replaces; in YAML it is null."""


def underived(annotation: Any) -> Any | None:
    """The type of a derived key's value; None: the annotation is that of another key."""
    if get_origin(annotation) is not Annotated or _DERIVES not in get_args(annotation):
        return None
    value, *marks = (each for each in get_args(annotation) if each is not _DERIVES)
    return Annotated[value, *marks] if marks else value
