"""Errors that a user can fix. They are printed as lines without a traceback, and the command exits with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One mistake: the key it is about (dotted, or a file) and what is wrong, with the numbers and the way out."""

    key: str
    message: str
    follows: tuple[str, ...] = ()
    """Other keys whose values it follows from: if one of these is wrong itself, there may be no such mistake."""

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys that it concerns."""
        return (self.key, *self.follows)

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


class UserError(Exception):
    """One or several user mistakes, all that could be found at once."""

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = [p if isinstance(p, Problem) else Problem("", p) for p in problems]
        super().__init__("\n".join(str(p) for p in self.problems))


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `word`, or None when none is alike."""
    matches = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return matches[0] if matches else None
