"""How the CPU ranks of one host come to read each other's memory (`local.py`), or why they do not."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .processes import Identity, PeerGone, Process, allow_descendants, ancestors, common_ancestor, ptrace_scope
from .segment import FIRST, Segment, open_segment
from .shared_memory import LocalAxis
from .shared_memory_line import Peer

_MAGIC = 0x70656E746164
_FIRST_PROCESS = 1


@dataclass(frozen=True)
class Card:
    """What a rank tells the others of itself.

    Args:
        host: name, kernel's start and kind of the machine: equal where processes can see each other.
        problem: why its memory cannot be shared; empty: it can.
        chain: the process, its parent, and so on.
        scope: Yama's setting.
        fd, size: of its segment.
        starts: axis → the first word of its part of the segment.
        magic: the address of a word that reads `_MAGIC`.
    """

    host: str
    problem: str
    chain: tuple[Identity, ...]
    scope: int
    fd: int
    size: int
    starts: dict[str, int]
    magic: int

    @property
    def who(self) -> Identity:
        return self.chain[0]

    def dump(self) -> str:
        return json.dumps({**vars(self), "chain": [(each.pid, each.start) for each in self.chain]})

    @staticmethod
    def load(text: bytes) -> Card:
        values: dict[str, Any] = json.loads(text)
        return Card(**{**values, "chain": tuple(Identity(*each) for each in values["chain"])})


def connect(axes: dict[str, LocalAxis], rank: int, world: int, store: dist.Store) -> str:
    """Connects the axes of all ranks, if all ranks can read each other's memory.

    Args:
        axes: this rank's, by name.
        rank, world: of the mesh.
        store: keys for this purpose only.

    Returns:
        Why they are not connected, the same on all ranks; empty: they are.
    """
    magic = ctypes.c_int64(_MAGIC)
    starts, words = {}, 0
    for name, axis in axes.items():
        starts[name] = FIRST + words
        words += axis.words
    segment = None
    try:
        segment, problem = _segment(words)
        fd, size = (-1, 0) if segment is None or segment.fd is None else (segment.fd, segment.size)
        chain, scope = ((), 0) if problem else (tuple(ancestors(os.getpid())), ptrace_scope())
        mine = Card(_host(), problem, chain, scope, fd, size, starts, ctypes.addressof(magic))
        store.set(f"rank-{rank}", mine.dump())
        cards = [Card.load(store.get(f"rank-{other}")) for other in range(world)]
        problem = _common_problem(cards) or _allow(cards, rank, store)
        if problem or segment is None:
            return problem
        problem = _attach(axes, segment, cards, rank)
        store.set(f"reaches-{rank}", problem)
        # Nobody's segment or magic word goes away before everybody has seen it.
        found = [store.get(f"reaches-{other}").decode() for other in range(world)]
        return next((reason for reason in found if reason), "")
    finally:
        if segment is not None:
            segment.shared()


def _segment(words: int) -> tuple[Segment | None, str]:
    """A segment, or why there is none."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return None, f"it needs Linux on x86_64, this is {platform.system()} on {platform.machine()}"
    try:
        return Segment(words), ""
    except OSError as error:
        return None, f"no shared memory: {error.strerror}"


def _host() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def _common_problem(cards: list[Card]) -> str:
    """What every rank sees from the cards alone."""
    problem = next((card.problem for card in cards if card.problem), "")
    hosts = len({card.host for card in cards})
    return problem or (f"they stand on {hosts} hosts" if hosts > 1 else "")


def _allow(cards: list[Card], rank: int, store: dist.Store) -> str:
    """Lets the other ranks, and as few other processes as possible, read this one's memory; why that cannot be."""
    if max(card.scope for card in cards) != 1:
        return ""  # all may, or none
    above = common_ancestor([card.chain for card in cards])
    if above is None or (above.pid == _FIRST_PROCESS and not _is_ours(above)):
        # Everything descends from the host's first process; in a container it is the launcher.
        return "no process but the host's first is above all ranks, and kernel.yama.ptrace_scope is 1"
    allow_descendants(above.pid)
    store.set(f"allows-{rank}", "")
    for other in range(len(cards)):
        store.get(f"allows-{other}")
    return ""


def _is_ours(process: Identity) -> bool:
    return Path(f"/proc/{process.pid}").stat().st_uid == os.getuid()


def _attach(axes: dict[str, LocalAxis], segment: Segment, cards: list[Card], rank: int) -> str:
    """Opens what the others share and makes the lines; why that cannot be."""
    peers: dict[int, Peer] = {}
    word = ctypes.c_int64()
    try:
        for other, card in enumerate(cards):
            if other == rank:
                continue
            process = Process(other, card.who)
            peers[other] = Peer(other, process, open_segment(card.who, card.fd, card.size))
            process.read(card.magic, ctypes.addressof(word), ctypes.sizeof(word))
            if word.value != _MAGIC:
                raise PeerGone(f"rank {other} (process {card.who.pid}) is not in this namespace of processes")
    except PeerGone as error:
        for peer in peers.values():
            peer.process.close()
        scope = f"; kernel.yama.ptrace_scope is {cards[rank].scope}" if cards[rank].scope > 1 else ""
        return f"{error}{scope}"
    for name, axis in axes.items():
        ends = [(peers[other], cards[other].starts[name]) if other in peers else None for other in axis.ranks]
        axis.connect(segment, cards[rank].starts[name], ends)
    return ""
