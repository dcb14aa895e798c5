"""What goes to and fro between two ranks of a host over one axis (`local.py`): posts, and what was read of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .processes import PeerGone, Process
from .segment import Words, is_closed

_SLOTS = 64
"""Posts of one line that are shown at a time."""
_COUNT, _POSTS, _READ = 0, 1, 1 + 4 * _SLOTS
_NUMBER, _PLACE, _BYTES, _SINCE = 0, 1, 2, 3
_TURNED = _SLOTS
LINE_WORDS = 1 + 6 * _SLOTS
"""Words of a line in a segment: how many posts there were; per slot number + 1, address and bytes of a post and when
it came; per slot number + 1 of what was read last of the other's posts; per slot when that was begun. Times are of
`time.monotonic_ns`, one clock for all processes of a host."""


class Mismatch(RuntimeError):
    """Ranks do not make the same calls in the same order; which one is wrong cannot be told from here."""


class LineReader(Protocol):
    """An exchange that expects a post."""

    what: str

    def one_read(self, posted: int, begun: int, rank: int, nbytes: int) -> None: ...


@dataclass(frozen=True)
class Peer:
    """Another rank: its process, and what it shares."""

    rank: int
    process: Process
    words: Words

    def check(self) -> None:
        """Raises `PeerGone` where the process has ended, or has closed its mesh."""
        if not self.process.alive():
            raise PeerGone(f"rank {self.rank} (process {self.process.who.pid}) cannot be reached: it has ended")
        if is_closed(self.words):
            raise self.left()

    def left(self) -> PeerGone:
        return PeerGone(f"rank {self.rank} (process {self.process.who.pid}) has left")


class Line:
    """What goes to and fro between this rank and one peer, each direction numbered from 0.

    Args:
        mine, theirs: the line's words in the two segments.
        peer: the process on the other side, and its segment.
        between: called during long copies.
    """

    def __init__(self, mine: Words, theirs: Words, peer: Peer, between: Callable[[], object]) -> None:
        self.peer = peer
        self._mine, self._theirs, self._between = mine, theirs, between
        self._posts = self._reads = 0
        self._later: list[tuple[int, Tensor]] = []
        """Posts that have no slot yet."""
        self._since: dict[int, int] = {}
        """When such a post came."""
        self._unread: dict[int, Tensor] = {}
        """What must stay in memory."""
        self._coming: dict[int, tuple[Tensor, LineReader]] = {}
        self._seen = -1
        """The peer's number of posts at the last look for what is expected; -1: there is more to look for since."""

    def next_post(self) -> int:
        """The number of this rank's next post."""
        self._posts += 1
        return self._posts - 1

    def expect(self, into: Tensor, exchange: LineReader) -> int:
        """The number of the peer's next post, which goes into a tensor."""
        number, self._reads = self._reads, self._reads + 1
        self._coming[number] = into, exchange
        self._seen = -1  # it may have been posted long ago
        return number

    def post(self, number: int, x: Tensor, since: int) -> bool:
        """Offers x, which must not change until `was_read`; whether it has a slot.

        Args:
            since: when this rank came to what it gives x for.
        """
        self._unread[number], self._since[number] = x, since
        shown = self._show(number, x)
        if not shown:
            self._later.append((number, x))
        return shown

    def _show(self, number: int, x: Tensor) -> bool:
        if number >= _SLOTS and not self.was_read(number - _SLOTS):
            return False
        words, at = self._mine, _POSTS + 4 * (number % _SLOTS)
        words[at + _PLACE], words[at + _BYTES] = x.data_ptr(), x.nbytes
        words[at + _SINCE] = self._since.pop(number)
        words[at + _NUMBER] = number + 1
        words[_COUNT] += 1
        return True

    def was_read(self, number: int) -> bool:
        """Whether the peer has copied this rank's post."""
        if self._theirs[_READ + number % _SLOTS] <= number:
            return False
        self._unread.pop(number, None)
        return True

    def turned(self, number: int) -> int:
        """When the peer began to read this rank's post, which it has read."""
        return self._theirs[_READ + _TURNED + number % _SLOTS]

    def is_coming(self, number: int) -> bool:
        """Whether an expected post has not been read."""
        return number in self._coming

    def read(self, number: int) -> None:
        """Copies an expected post of the peer's, if it is there.

        Raises:
            PeerGone: the peer cannot be reached, or has closed its mesh.
            Mismatch: it is of another size.
        """
        words, slot = self._theirs, number % _SLOTS
        at = _POSTS + 4 * slot
        if words[at + _NUMBER] != number + 1:
            return
        into, exchange = self._coming[number]
        if words[at + _BYTES] != into.nbytes:
            raise Mismatch(
                f"{exchange.what}: rank {self.peer.rank} gives {words[at + _BYTES]} bytes where {into.nbytes} are "
                "expected; all ranks must make the same calls in the same order"
            )
        begun, since = time.monotonic_ns(), words[at + _SINCE]
        self.peer.process.read(words[at + _PLACE], into.data_ptr(), into.nbytes, self._between)
        # What a peer has given up may not have been there any more.
        if is_closed(self.peer.words):
            raise self.peer.left()
        del self._coming[number]
        self._mine[_READ + _TURNED + slot] = begun
        self._mine[_READ + slot] = number + 1
        exchange.one_read(since, begun, self.peer.rank, into.nbytes)

    def progress(self) -> bool:
        """Reads and shows what it can; whether there is more to come."""
        if self._later:
            self._later = [(number, x) for number, x in self._later if not self._show(number, x)]
        if self._coming:
            count = self._theirs[_COUNT]
            if count != self._seen:
                try:
                    for number in list(self._coming):
                        self.read(number)
                except PeerGone:
                    return True  # for whoever waits for it to learn
                self._seen = count
        return bool(self._later or self._coming)
