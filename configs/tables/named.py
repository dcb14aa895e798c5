"""Keys whose value is a name from a table: what they accept, and what `pentad show --keys` says about each name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, get_args, get_origin


class Row(Protocol):
    """A row of a table of names."""

    @property
    def text(self) -> str:
        """One line on what the name stands for."""
        ...


@dataclass(frozen=True, eq=False)
class Named:
    """Marks the text of a key as a name: `schedule: Annotated[str, Named(SCHEDULES)]`.

    Args:
        table: the rows by name. Looked into when a value is read, so that modules may add rows until then.
        file: the suffix of paths that are taken beside the names; empty: none are.
    """

    table: Mapping[str, Row]
    file: str = ""

    def takes(self, text: str) -> bool:
        """Whether the text is one of the names, or a path with the suffix."""
        return text in self.table or self.is_file(text)

    def is_file(self, text: str) -> bool:
        """Whether the text is a path with the suffix."""
        return bool(self.file) and text.endswith(self.file)

    def __str__(self) -> str:
        """What a key accepts, for messages."""
        return ", ".join(self.table) + (f", or a {self.file} file" if self.file else "")


def named(annotation: Any) -> Named | None:
    """The mark of a key's declared type (without None); none: its values are no names."""
    if get_origin(annotation) is not Annotated:
        return None
    return next((mark for mark in get_args(annotation)[1:] if isinstance(mark, Named)), None)
