"""Bytes that are alive while something works, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def rows_of(name: str) -> str:
    """The name of a copy of some rows of a tensor."""
    return f"rows of {name}"


class Tape:
    """Follows what is made and freed, and remembers the most that was alive at a time.

    Args:
        given: bytes by name of what is there at the begin.
        rows: bytes by name of what is kept of tensors that go: copies of some of their rows.
    """

    def __init__(self, given: dict[str, float] | None = None, rows: Mapping[str, float] | None = None) -> None:
        self.live: dict[str, float] = dict(given or {})
        self._rows = dict(rows or {})
        self.now = self.peak = float(sum(self.live.values()))
        self.before: float | None = None

    def mark(self) -> None:
        """The most so far becomes `before`, and another one is looked for; the first time only."""
        if self.before is None:
            self.before, self.peak = self.peak, self.now

    def make(self, name: str, nbytes: float) -> None:
        """A tensor comes to be; one of this name that is there is made again and freed after that."""
        self.now += nbytes
        self._look(self.now)
        self.now -= self.live.pop(name, 0.0)
        self.live[name] = nbytes

    def copy_rows(self) -> None:
        """Of what is there, what is kept of it is copied, if it was not yet."""
        for name in [name for name in self._rows if name in self.live]:
            self.make(rows_of(name), self._rows.pop(name))

    def bump(self, nbytes: float) -> None:
        """So much more is alive for a moment."""
        self._look(self.now + nbytes)

    def free(self, *names: str) -> None:
        """Tensors go; those that are not there are gone already."""
        for name in names:
            self.now -= self.live.pop(name, 0.0)

    def keep_only(self, names: Iterable[str]) -> None:
        """All others go."""
        wanted = set(names)
        self.free(*[name for name in self.live if name not in wanted])

    def _look(self, nbytes: float) -> None:
        self.peak = max(self.peak, nbytes)
