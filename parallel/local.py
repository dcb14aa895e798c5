"""Collectives between CPU processes of one host: every rank reads what it needs out of the other's memory.

gloo moves bytes through sockets and threads of its own, which take the cores from the compute: a 1 MiB exchange between
two processes takes 1.5 ms. Linux can copy between the memories of two processes of one user in one call
(process_vm_readv), which takes 0.1 ms and no thread. So a rank *posts* where its tensor lies, every reader copies its
part out when it waits, and tells the owner (process_vm_writev), which may then change the tensor.

    rank 0   post(n) ──── read rank 1's ── told by 1 ─▶ done
    rank 1   post(n) ──── read rank 0's ── told by 0 ─▶ done

A transfer between two ranks is done by whoever comes second, so that neither waits for the other's next wait: a sender
that finds the receive announced writes into it at once; a receiver that finds a post copies it at once.

Posts are numbered per board: each axis has one for its collectives, whose order is the same on all ranks, and one per
pair of ranks for what the first sends to the second. x86 processors keep the order of the stores (tensor, place,
number); on others, and across hosts, gloo does the work. `local_collectives.py` has the collectives.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from .waiting import Abort

_SLOTS = 32
"""Posts of one board that may be unread at a time."""
_POSTED, _PLACE, _OFFSETS, _READ = 0, 1, 2, 3
_ANNOUNCED, _BUFFER, _ARRIVED, _INBOX_ROW = 0, 1, 2, 3
_WORD = 8
_SPIN_S = 40e-6
"""Waiting starts by yielding the core, for about as long as a process takes to be woken up."""
_SHORTEST_SLEEP_S, _LONGEST_SLEEP_S = 20e-6, 2e-3
_SLEEP_SHARE = 0.1
"""After that it sleeps for this share of the time that it has waited: late by little, and cheap when it is long."""
_ALIVE_EVERY_S = 0.2
_PR_SET_PTRACER = 0x59616D61
_MAGIC = 0x70656E746164


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class PeerGone(RuntimeError):
    """The memory of another rank cannot be reached any more."""


class _Memory:
    """The memory of the other ranks' processes."""

    def __init__(self, pids: Sequence[int]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._read, self._write = libc.process_vm_readv, libc.process_vm_writev
        for call in (self._read, self._write):
            call.restype = ctypes.c_ssize_t
            vector = (ctypes.c_void_p, ctypes.c_ulong)
            call.argtypes = [ctypes.c_int, *vector, *vector, ctypes.c_ulong]
        self._pids = pids

    def read(self, rank: int, place: int, into: int, nbytes: int) -> None:
        self._move(self._read, rank, place, into, nbytes)

    def write(self, rank: int, place: int, source: int, nbytes: int) -> None:
        self._move(self._write, rank, place, source, nbytes)

    def _move(self, call: Callable[..., int], rank: int, theirs: int, ours: int, nbytes: int) -> None:
        while nbytes:
            local, remote = _IoVec(ours, nbytes), _IoVec(theirs, nbytes)
            moved = call(self._pids[rank], ctypes.addressof(local), 1, ctypes.addressof(remote), 1, 0)
            if moved <= 0:
                reason = os.strerror(ctypes.get_errno())
                raise PeerGone(f"rank {rank} (process {self._pids[rank]}) cannot be reached: {reason}")
            ours, theirs, nbytes = ours + moved, theirs + moved, nbytes - moved


@dataclass(frozen=True)
class Read:
    """A copy of part of a peer's posted tensor: `into` is filled from byte `offset` on; offset None: the peer says."""

    peer: int
    offset: int | None
    into: Tensor


class LocalAxis:
    """One axis, seen from one rank. Peers and readers are indices on the axis.

    A board is an int64 table with a row per slot: number + 1, address of the tensor, address of the offsets, and per
    reader the number + 1 of what it has read last. Board 0 is for collectives, board 1 + i for sends to peer i. After
    the boards comes an inbox per peer, with a row per slot: number + 1 of an announced receive, its address, and
    number + 1 of what has been written there.

    Args:
        name: for errors.
        rank, ranks: this rank's index, and the mesh's ranks.
        abort: of the mesh.
    """

    def __init__(self, name: str, rank: int, ranks: tuple[int, ...], abort: Abort) -> None:
        self.name, self.rank, self.ranks = name, rank, ranks
        self._abort = abort
        self._row = _READ + len(ranks)
        boards = 1 + len(ranks)
        self._inboxes = boards * _SLOTS * self._row
        self._words = (ctypes.c_int64 * (self._inboxes + len(ranks) * _SLOTS * _INBOX_ROW))()
        self._next = [0] * boards
        self._received = [0] * len(ranks)
        self._alive: dict[int, tuple[int, tuple[int, ...], Tensor | None, object]] = {}
        """Per row: number, readers, and what must stay in memory until they have read."""
        self._memory: _Memory | None = None
        self._places: tuple[int, ...] = ()

    @property
    def place(self) -> int:
        """Address of this rank's boards."""
        return ctypes.addressof(self._words)

    def connect(self, memory: _Memory, places: tuple[int, ...]) -> None:
        """`places`: the addresses of all ranks' boards."""
        self._memory, self._places = memory, places

    def exchange(
        self,
        what: str,
        post: Tensor | None,
        reads: Sequence[Read],
        readers: Iterable[int],
        offsets: Sequence[int] | None = None,
    ) -> Exchange:
        """Starts the axis's next collective.

        Args:
            what: its name, for errors.
            post: what this rank offers, contiguous; unchanged until the exchange is finished.
            reads: what it copies from others.
            readers: who copies from it.
            offsets: the first byte for each peer, where peers cannot know it.
        """
        return self._start(0, self._number(self._next, 0), what, post, reads, readers, offsets)

    def send(self, x: Tensor, to: int) -> Exchange:
        """Gives x (contiguous, unchanged until it is done) to one peer."""
        memory, rank, number = self._memory, self.ranks[to], self._number(self._next, 1 + to)
        assert memory is not None
        inbox = self._places[to] + self._inbox(self.rank, number) * _WORD
        row = (ctypes.c_int64 * _INBOX_ROW)()
        memory.read(rank, inbox, ctypes.addressof(row), _INBOX_ROW * _WORD)
        if row[_ANNOUNCED] != number + 1:
            return self._start(1 + to, number, "send", x, (), (to,), None)
        # This is the only place that decides: what is written here is never posted.
        memory.write(rank, row[_BUFFER], x.data_ptr(), x.numel() * x.element_size())
        row[_ARRIVED] = number + 1
        memory.write(rank, inbox + _ARRIVED * _WORD, ctypes.addressof(row) + _ARRIVED * _WORD, _WORD)
        return self._start(1 + to, number, "send", None, (), (), None)

    def receive(self, out: Tensor, source: int) -> Exchange:
        """What a peer sends, into `out`."""
        number = self._number(self._received, source)
        exchange = self._start(1 + self.rank, number, "receive", None, (Read(source, 0, out),), (), None)
        if not exchange.done():
            inbox = self._inbox(source, number)
            self._words[inbox + _BUFFER] = out.data_ptr()
            self._words[inbox + _ANNOUNCED] = number + 1
            self._abort.tend(id(exchange), exchange.done)
        return exchange

    def arrived(self, number: int, source: int) -> bool:
        """Whether the peer has written into the announced receive."""
        return self._words[self._inbox(source, number) + _ARRIVED] == number + 1

    def _inbox(self, source: int, number: int) -> int:
        return self._inboxes + (source * _SLOTS + number % _SLOTS) * _INBOX_ROW

    @staticmethod
    def _number(counts: list[int], at: int) -> int:
        counts[at] += 1
        return counts[at] - 1

    def _start(
        self,
        board: int,
        number: int,
        what: str,
        post: Tensor | None,
        reads: Sequence[Read],
        readers: Iterable[int],
        offsets: Sequence[int] | None,
    ) -> Exchange:
        row, what = board * _SLOTS + number % _SLOTS, f"{what} over {self.name}"
        readers = tuple(readers) if post is not None else ()
        if readers:
            if row in self._alive:
                before, its_readers, *_ = self._alive[row]
                self.wait_read(row, before, its_readers, f"{what} ({_SLOTS} unread)")
            table = None if offsets is None else (ctypes.c_int64 * len(offsets))(*offsets)
            self._alive[row] = (number, readers, post, table)
            first = row * self._row
            assert post is not None
            self._words[first + _PLACE] = post.data_ptr()
            self._words[first + _OFFSETS] = ctypes.addressof(table) if table is not None else 0
            self._words[first + _POSTED] = number + 1
        return Exchange(self, row, number, reads, readers, what)

    def copy(self, row: int, number: int, read: Read, what: str) -> None:
        """Copies from a peer, when it has posted, and tells it."""
        self._wait(lambda: self.try_copy(row, number, read), what, ())

    def try_copy(self, row: int, number: int, read: Read) -> bool:
        """Copies from a peer and tells it, if it has posted."""
        memory, rank = self._memory, self.ranks[read.peer]
        assert memory is not None
        first = self._places[read.peer] + row * self._row * _WORD
        word = ctypes.c_int64()

        def peek(place: int) -> int:
            memory.read(rank, place, ctypes.addressof(word), _WORD)
            return word.value

        if peek(first) != number + 1:
            return False
        place, offset = peek(first + _PLACE * _WORD), read.offset
        if offset is None:
            offset = peek(peek(first + _OFFSETS * _WORD) + self.rank * _WORD)
        memory.read(rank, place + offset, read.into.data_ptr(), read.into.numel() * read.into.element_size())
        word.value = number + 1
        memory.write(rank, first + (_READ + self.rank) * _WORD, ctypes.addressof(word), _WORD)
        return True

    def forget(self, receive: Exchange) -> None:
        """A receive is complete."""
        self._abort.leave(id(receive))

    def wait(self, holds: Callable[[], bool], what: str) -> None:
        """Returns when it holds."""
        self._wait(holds, what, ())

    def was_read(self, row: int, number: int, readers: tuple[int, ...]) -> bool:
        """Whether all readers have copied this rank's post; then it is forgotten."""
        first = row * self._row + _READ
        if any(self._words[first + reader] != number + 1 for reader in readers):
            return False
        self._alive.pop(row, None)
        return True

    def wait_read(self, row: int, number: int, readers: tuple[int, ...], what: str) -> None:
        """Returns when all readers have copied this rank's post."""
        self._wait(lambda: self.was_read(row, number, readers), what, readers)

    def _wait(self, holds: Callable[[], bool], what: str, readers: tuple[int, ...]) -> None:
        """Polls; `readers` are the peers on whom it depends and whom the condition does not touch."""
        if holds():
            return
        begin = time.monotonic()
        checked = begin
        while not holds():
            now = time.monotonic()
            if now - begin < _SPIN_S:
                os.sched_yield()
                continue
            self._abort.check(what, now - begin)
            self._abort.poll()
            if now - checked > _ALIVE_EVERY_S:
                checked = now
                self._probe(readers)
            time.sleep(min(max(_SLEEP_SHARE * (now - begin), _SHORTEST_SLEEP_S), _LONGEST_SLEEP_S))

    def _probe(self, peers: Iterable[int]) -> None:
        assert self._memory is not None
        word = ctypes.c_int64()
        for peer in peers:
            self._memory.read(self.ranks[peer], self._places[peer], ctypes.addressof(word), _WORD)


class Exchange:
    """One collective or transfer in flight."""

    def __init__(
        self, axis: LocalAxis, row: int, number: int, reads: Sequence[Read], readers: tuple[int, ...], what: str
    ) -> None:
        self._axis, self._row, self._number, self._what = axis, row, number, what
        self._reads, self._readers = reads, readers
        self._is_receive = row >= _SLOTS and bool(reads)

    def finish(self) -> None:
        """Copies what this rank reads, then returns when the others have read this rank's."""
        if self._is_receive:
            self._axis.wait(self.done, self._what)
        for read in self._reads:
            self._axis.copy(self._row, self._number, read, self._what)
        self._reads = ()
        if self._readers:
            self._axis.wait_read(self._row, self._number, self._readers, self._what)
            self._readers = ()

    def done(self) -> bool:
        """Whether `finish` would return at once. Receives what has been sent."""
        if self._reads and self._is_receive:
            read = self._reads[0]
            axis, number = self._axis, self._number
            if axis.arrived(number, read.peer) or axis.try_copy(self._row, number, read):
                self._reads = ()
                axis.forget(self)
        if self._readers and self._axis.was_read(self._row, self._number, self._readers):
            self._readers = ()
        return not self._reads and not self._readers


def connect(axes: dict[str, LocalAxis], rank: int, world: int, store: dist.Store) -> bool:
    """Connects the axes of all ranks, if all ranks can read each other's memory; on every rank the same answer.

    Args:
        axes: this rank's, by name.
        rank, world: of the mesh.
        store: keys for this purpose only.
    """
    magic = ctypes.c_int64(_MAGIC)
    if platform.machine() == "x86_64" and platform.system() == "Linux":
        # Without it, hosts with the Yama module let only ancestors of a process read its memory.
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(2**64 - 1), 0, 0, 0)
    mine = {
        "host": _host(),
        "pid": os.getpid(),
        "magic": ctypes.addressof(magic),
        "axes": {name: axis.place for name, axis in axes.items()},
    }
    store.set(f"rank-{rank}", json.dumps(mine))
    peers = [json.loads(store.get(f"rank-{other}")) for other in range(world)]
    reaches = all(peer["host"] == mine["host"] for peer in peers) and mine["host"].startswith("Linux x86_64")
    if reaches:
        memory = _Memory([peer["pid"] for peer in peers])
        reaches = all(_probe(memory, other, peer["magic"]) for other, peer in enumerate(peers))
        for name, axis in axes.items():
            axis.connect(memory, tuple(peers[other]["axes"][name] for other in axis.ranks))
    store.set(f"reaches-{rank}", "1" if reaches else "0")
    return all(store.get(f"reaches-{other}") == b"1" for other in range(world))


def _host() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return " ".join(
        (platform.system(), platform.machine(), socket.gethostname(), boot.read_text().strip() if boot.exists() else "")
    )


def _probe(memory: _Memory, rank: int, place: int) -> bool:
    word = ctypes.c_int64()
    try:
        memory.read(rank, place, ctypes.addressof(word), _WORD)
    except PeerGone:
        return False
    return word.value == _MAGIC
