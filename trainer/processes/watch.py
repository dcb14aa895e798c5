"""What the watcher of a node is told by its first rank, and how that rank starts one where no `pentad train` did."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...configs.strict_json import expect_int, expect_number, expect_object, expect_text, parse_json, read_bytes
from ..recovery.ways import Ladder

if TYPE_CHECKING:
    import torch.distributed as dist

_KEY = "watchers"
LISTENS = "listens"
"""The file in a launcher's folder that says where the node's watcher listens."""
_WATCHER_S = 30.0
WATCHER = "pentad.launch.supervise.watcher"
"""The module that is a watcher; a string, for this room knows nothing of the one above it."""


@dataclass(frozen=True)
class WatchRequest:
    """What a node's watcher is asked to watch.

    Args:
        stem: of the names of the rings: `pentad-STEM-RANK.ring`.
        run_dir: the run's folder.
        world: ranks of the job.
        local: ranks of this node.
        alive_s, hang_s, pause_s: see `faults.*`.
        token, home, listener: how the watchers of several nodes find each other.
    """

    stem: str
    run_dir: str
    world: int
    local: int
    alive_s: float
    hang_s: float
    pause_s: float
    rank: int = 0
    """The first of the node's ranks, which asks."""
    token: str = ""
    """That the watchers of several nodes share; empty: there is one node."""
    home: str = ""
    """HOST:PORT of the first node's watcher, elsewhere."""
    listener: int = -1
    """A descriptor that listens there, for that watcher."""
    ladder: Ladder = field(default_factory=Ladder)
    """How faults are mended, where they are."""
    host: str = ""
    """By what the other nodes reach the first one, for that watcher."""

    def dump(self) -> str:
        return json.dumps({**asdict(self), "ladder": self.ladder.dump()})

    @staticmethod
    def load(text: bytes) -> WatchRequest:
        """What `dump` wrote.

        Raises:
            JsonError: something else.
        """
        known = expect_object(parse_json(text), "a request to watch", WatchRequest.__dataclass_fields__)
        return WatchRequest(
            expect_text(known["stem"], "stem"),
            expect_text(known["run_dir"], "run_dir"),
            expect_int(known["world"], "world", 1),
            expect_int(known["local"], "local", 1),
            expect_number(known["alive_s"], "alive_s"),
            expect_number(known["hang_s"], "hang_s"),
            expect_number(known["pause_s"], "pause_s"),
            expect_int(known["rank"], "rank"),
            expect_text(known["token"], "token"),
            expect_text(known["home"], "home"),
            expect_int(known["listener"], "listener", -1),
            Ladder.load(known["ladder"]),
            expect_text(known["host"], "host"),
        )


def start_watcher(request: WatchRequest) -> None:
    """Starts a watcher that outlives this rank and ends with the last rank of the node. A job runs without one too."""
    with contextlib.suppress(OSError):
        process = subprocess.Popen(
            [sys.executable, "-m", WATCHER, "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=[request.listener] if request.listener >= 0 else [],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert process.stdin is not None
        with process.stdin as way:  # not an argument: those of a process are everybody's to read, and there is a token
            way.write(request.dump().encode())


def between_nodes(
    request: WatchRequest, rank: int, store: dist.Store, address: tuple[str, int], folder: Path | None = None
) -> WatchRequest:
    """The request of a node among several, for its watcher to find the others. Called on each node's first rank, on
    that of rank 0 before the ranks come together, elsewhere after it.

    Args:
        request: of this node alone.
        rank: that asks.
        store: of the job.
        address: at which the store is reached.
        folder: of a launcher that has started a watcher, which says there where it listens.
    """
    if rank:
        known = expect_object(parse_json(store.get(_KEY)), "the watchers' meeting point", ("host", "port", "token"))
        home = f"{expect_text(known['host'], 'host')}:{expect_int(known['port'], 'port', 1, 65535)}"
        return replace(request, home=home, token=expect_text(known["token"], "token"))
    listener = None if folder is not None else socket.create_server(("", 0), backlog=1024)
    port = listener.getsockname()[1] if listener is not None else _port(folder) if folder is not None else 0
    token, host = secrets.token_hex(16), _own_host(*address)
    store.set(_KEY, json.dumps({"host": host, "port": port, "token": token}))
    return replace(request, token=token, host=host, listener=listener.detach() if listener is not None else -1)


def _port(folder: Path) -> int:
    """Where the node's watcher listens, which starts with the rank."""
    until = time.monotonic() + _WATCHER_S
    while time.monotonic() < until:
        with contextlib.suppress(OSError, ValueError):
            return int(read_bytes(folder / LISTENS))
        time.sleep(0.005)
    return 0


def _own_host(host: str, port: int) -> str:
    """What the others call this host, which has to reach the store as they do."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5) as way:
        mine, there = way.getsockname()[0], way.getpeername()[0]
        return host if mine == there else mine
    return host
