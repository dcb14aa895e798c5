"""Collectives between CPU processes of one host: every rank reads what it needs out of the other's memory.

gloo moves bytes through sockets and threads of its own, which take the cores from the compute: a 1 MiB exchange between
two processes takes 1.5 ms. Linux can copy out of the memory of another process of the same user in one call
(process_vm_readv), which takes 0.1 ms and no thread. So a rank *posts* where its tensor lies, every reader copies its
part out and says so, and the owner may then change the tensor.

    rank 0   post(n) ──── read rank 1's ── read by 1 ─▶ done
    rank 1   post(n) ──── read rank 0's ── read by 0 ─▶ done

Each rank has one shared segment (`segment.py`) into which only itself writes: its posts, and which of the others' it
has read. The others map it read-only, and nobody ever writes into another's memory. So whoever is stopped and wakes up
late, after the others have given up, can harm none of them.

Any number of exchanges may be in flight, and they may be finished in any order: whoever waits, for whatever, also reads
what has been posted to it in the meantime. An axis has two lines between each two ranks, one for collectives, whose
order is the same on all ranks, and one for transfers. A line shows a limited number of posts at a time; further ones
follow as soon as those before them have been read.

x86 processors keep the order of the stores (tensor, place, number); on others, and across hosts, gloo does the work.
`local_collectives.py` has the collectives, `local_connect.py` the start.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .processes import PeerGone
from .segment import Segment
from .shared_memory_line import LINE_WORDS, Line, Peer
from .slow_copies import SLOW_NS, SlowCopy
from .waiting import Abort

_COLLECTIVES, _TRANSFERS = 0, 1
_SPIN_S = 40e-6
"""Waiting starts by yielding the core, for about as long as a process takes to be woken up."""
_SHORTEST_SLEEP_S, _LONGEST_SLEEP_S = 20e-6, 2e-3
_SLEEP_SHARE = 0.1
"""After that it sleeps for this share of the time that it has waited: late by little, and cheap when it is long."""
_ALIVE_EVERY_S = 0.2


@dataclass(frozen=True)
class PeerTensor:
    """What goes to one peer (index on the axis), or comes from it: contiguous."""

    peer: int
    tensor: Tensor


class LocalAxis:
    """One axis, seen from one rank. Peers are indices on the axis.

    Args:
        name: for errors.
        rank, ranks: this rank's index, and the mesh's ranks.
        abort: of the mesh.
    """

    def __init__(self, name: str, rank: int, ranks: tuple[int, ...], abort: Abort) -> None:
        self.name, self.rank, self.ranks = name, rank, ranks
        self._abort = abort
        self._lines: list[tuple[Line, Line] | None] = []
        self._busy: dict[Line, None] = {}
        """Where something is expected, or waits for a slot."""
        self._lock = threading.Lock()
        """A thread that waits reads for all others as well."""
        self._segment: Segment | None = None

    @property
    def words(self) -> int:
        """Size of this axis's part of a segment."""
        return 2 * len(self.ranks) * LINE_WORDS

    def connect(self, segment: Segment, start: int, peers: Sequence[tuple[Peer, int] | None]) -> None:
        """Makes the lines.

        Args:
            segment: this rank's, with this axis's part from the word `start` on.
            peers: for each rank of the axis where its own part starts in its segment; none for this one.
        """
        self._segment = segment

        def line(index: int, peer: Peer, theirs: int, channel: int) -> Line:
            mine, other = (
                start + (2 * index + channel) * LINE_WORDS,
                theirs + (2 * self.rank + channel) * LINE_WORDS,
            )
            words = segment.words[mine : mine + LINE_WORDS], peer.words[other : other + LINE_WORDS]
            return Line(*words, peer, lambda: self._abort.check(f"copying over {self.name}", 0.0))

        self._lines = [
            None if peer is None else (line(i, *peer, _COLLECTIVES), line(i, *peer, _TRANSFERS))
            for i, peer in enumerate(peers)
        ]

    def close(self) -> None:
        """Tells the peers that nothing of this rank may be read any more, and lets it go."""
        if self._segment is not None:
            self._segment.close()
            self._segment = None
        self._abort.leave(id(self))
        # Another thread may be copying, into memory that a later mesh works with; an abort ends that within 10 ms.
        with self._lock:
            for line in (line for pair in self._lines if pair is not None for line in pair):
                line.peer.process.close()
            self._lines, self._busy = [], {}

    def exchange(
        self,
        what: str,
        posts: Sequence[PeerTensor],
        reads: Sequence[PeerTensor],
        *,
        then: Callable[[int], None] | None = None,
        held: bool = False,
    ) -> Exchange:
        """Starts the axis's next collective.

        Args:
            what: its name, for errors.
            posts: what this rank offers; unchanged until the exchange is finished.
            reads: what it copies from others; may be written from now on.
            then: called once all is read, by whichever thread reads the last part, with when it began to.
            held: the posts are made by `Exchange.release`, only their place in the order is taken now.
        """
        return self._start(_COLLECTIVES, what, posts, reads, then, held)

    def send(self, x: Tensor, to: int) -> Exchange:
        """Gives x (contiguous, unchanged until it is done) to one peer."""
        return self._start(_TRANSFERS, "send", (PeerTensor(to, x),), ())

    def receive(self, out: Tensor, source: int) -> Exchange:
        """What a peer sends, into `out`."""
        return self._start(_TRANSFERS, "receive", (), (PeerTensor(source, out),))

    def _start(
        self,
        channel: int,
        what: str,
        posts: Sequence[PeerTensor],
        reads: Sequence[PeerTensor],
        then: Callable[[int], None] | None = None,
        held: bool = False,
    ) -> Exchange:
        exchange = Exchange(self, f"{what} over {self.name}", then)
        with self._lock:
            for part in posts:
                line = self._line(part.peer, channel)
                exchange.give(line, line.next_post(), part.tensor)
            for part in reads:
                line = self._line(part.peer, channel)
                exchange.take(line, line.expect(part.tensor, exchange))
                self._busy[line] = None
            if not held:
                exchange.release(time.monotonic_ns())
        if self._busy:
            self._abort.tend(id(self), self.progress)
        # What is already there is read at once: the peer need not wait until this rank waits.
        self._abort.poll()
        return exchange

    def _line(self, peer: int, channel: int) -> Line:
        pair = self._lines[peer]
        if pair is None:
            raise ValueError(f"rank {self.ranks[peer]} exchanges nothing with itself")
        return pair[channel]

    def occupied(self, line: Line) -> None:
        """A post waits for a slot."""
        self._busy[line] = None

    def progress(self) -> None:
        """Reads and shows whatever can be read and shown, unless another thread is at it."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            for line in list(self._busy):
                if not line.progress():
                    del self._busy[line]
            if not self._busy:
                self._abort.leave(id(self))
        finally:
            self._lock.release()

    def complete(self, exchange: Exchange) -> bool:
        """Whether an exchange is complete; reads what has been posted of it."""
        with self._lock:
            return bool(self._lines) and exchange.complete()  # nothing is read any more once the axis is closed

    def wait(self, exchange: Exchange) -> None:
        """Returns when the exchange is complete.

        Raises:
            Aborted, Overdue: see `Abort.wait`.
            PeerGone: a rank on which it depends has ended or left.
        """
        if self.complete(exchange):
            return
        begin = checked = time.monotonic()
        while not self.complete(exchange):
            now = time.monotonic()
            if now - begin < _SPIN_S:
                os.sched_yield()
                continue
            self._abort.check(exchange.what, now - begin, lambda: _named(exchange.awaited()))
            self._abort.poll()
            if now - checked > _ALIVE_EVERY_S:
                checked = now
                self._check(exchange)
            time.sleep(min(max(_SLEEP_SHARE * (now - begin), _SHORTEST_SLEEP_S), _LONGEST_SLEEP_S))

    def _check(self, exchange: Exchange) -> None:
        for peer in exchange.awaited():
            try:
                peer.check()
            except PeerGone:
                # It may have done its part and left since.
                if not self.complete(exchange):
                    raise


def _named(peers: list[Peer]) -> str:
    ranks = ", ".join(str(peer.rank) for peer in sorted(peers, key=lambda peer: peer.rank))
    return f"rank{'s' if len(peers) > 1 else ''} {ranks}" if ranks else ""


class Exchange:
    """One collective or transfer in flight. Its axis's lock is held in all methods but `finish`, `done`, `awaited`."""

    def __init__(self, axis: LocalAxis, what: str, then: Callable[[int], None] | None) -> None:
        self.what = what
        self.arrived = 0
        """When the last peer had come to it and turned to it, once it is complete (monotonic ns)."""
        self._axis, self._then = axis, then
        self._given: list[tuple[Line, int, Tensor]] = []
        self._posts: list[tuple[Line, int]] = []
        self._reads: list[tuple[Line, int]] = []
        self._missing = 0
        self._slow: list[SlowCopy] = []

    def finish(self) -> None:
        """Returns when this rank has read what it needs, and the others have read this rank's."""
        self._axis.wait(self)

    def done(self) -> bool:
        """Whether `finish` would return at once."""
        return self._axis.complete(self)

    def give(self, line: Line, number: int, x: Tensor) -> None:
        """Adds a post, made by `release`."""
        self._given.append((line, number, x))
        self._posts.append((line, number))

    def take(self, line: Line, number: int) -> None:
        """Adds a read."""
        self._reads.append((line, number))
        self._missing += 1

    def release(self, since: int) -> None:
        """Makes the posts.

        Args:
            since: when this rank came to what it gives: where that has to be computed first, not when it is done.
        """
        for line, number, x in self._given:
            if not line.post(number, x, since):
                self._axis.occupied(line)
        self._given = []

    def one_read(self, posted: int, begun: int, rank: int, nbytes: int) -> None:
        """A part was copied, which its owner `rank` had come to at `posted`; this rank began to copy at `begun`."""
        self._missing -= 1
        self.arrived = max(self.arrived, posted)
        ended = time.monotonic_ns()
        if ended - begun >= SLOW_NS:
            self._slow.append(SlowCopy(rank, nbytes, begun, ended, threading.get_ident()))
        if not self._missing and self._then is not None:
            then, self._then = self._then, None
            with torch.no_grad():
                then(begun)

    def take_slow(self) -> list[SlowCopy]:
        """The copies that took long, once it is complete; each is handed out once."""
        slow, self._slow = self._slow, []
        return slow

    def complete(self) -> bool:
        """Whether all is read on both sides; reads what is there."""
        if self._missing:
            for line, number in self._reads:
                if line.is_coming(number):
                    line.read(number)
            if self._missing:
                return False
        left = []
        for line, number in self._posts:
            if line.was_read(number):
                self.arrived = max(self.arrived, line.turned(number))
            else:
                left.append((line, number))
        self._posts = left
        return not left

    def awaited(self) -> list[Peer]:
        """The peers on which it still depends."""
        reads = [line.peer for line, number in self._reads if line.is_coming(number)]
        return list({peer.rank: peer for peer in (*reads, *(line.peer for line, _ in self._posts))}.values())
