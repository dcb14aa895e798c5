"""Nodes that are all on this machine, for rehearsals and tests: each has launchers, a fork server, a watcher and memory
for copies of its own, and shares nothing with the others but the run's folder and the network."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO

from ....parallel.comm.processes import children

_HOST = "127.0.0.1"


class PretendedNodes:
    """A job over such nodes, as somebody's own launcher starts it.

    Args:
        nodes: how many.
        each: ranks of a node.
        argv: of a rank.
        env: its environment, but for who it is.
        logs: where each rank's output goes; none: where that of this process does.
    """

    def __init__(
        self,
        nodes: int,
        each: int,
        argv: Sequence[str],
        env: Mapping[str, str],
        logs: Sequence[IO[str]] | None = None,
    ) -> None:
        with socket.socket() as listener:
            listener.bind((_HOST, 0))
            port = listener.getsockname()[1]
        job = {"WORLD_SIZE": nodes * each, "LOCAL_WORLD_SIZE": each, "MASTER_PORT": port}
        self.launchers: list[list[subprocess.Popen[str]]] = []
        """The processes that a launcher would start, by node."""
        self.lost: set[int] = set()
        """Nodes that were lost."""
        for node in range(nodes):
            self.launchers.append([])
            for local in range(each):
                rank = node * each + local
                own = {**job, "RANK": rank, "LOCAL_RANK": local, "GROUP_RANK": node}
                facts = {name: str(value) for name, value in own.items()}
                log = logs[rank] if logs is not None else None
                process = subprocess.Popen(
                    [sys.executable, "-m", "pentad.trainer", *argv],
                    env={**env, **facts, "MASTER_ADDR": _HOST},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    text=True,
                    start_new_session=True,
                )
                self.launchers[node].append(process)

    def processes(self, node: int) -> list[int]:
        """All processes of a node, launchers first."""
        found: list[int] = []
        more = [process.pid for process in self.launchers[node] if process.poll() is None]
        while more:
            found += more
            more = [child.pid for parent in more for child in children(parent)]
        return found

    def lose(self, node: int) -> None:
        """A power cut: all processes of a node, at once."""
        self.lost.add(node)
        doomed = self.processes(node)
        for number in (signal.SIGSTOP, signal.SIGKILL):  # none of them sees another one end
            for pid in doomed:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        for process in self.launchers[node]:
            process.wait()

    def send(self, number: int) -> None:
        """Sends a signal to the launchers' processes that live, which pass it on."""
        for process in (process for node in self.launchers for process in node):
            if process.poll() is None:
                process.send_signal(number)

    def codes(self) -> list[int | None]:
        """Exit codes by rank, negative for a signal; none: it runs."""
        return [code for node in self._codes() for code in node]

    def _codes(self) -> list[list[int | None]]:
        return [[process.poll() for process in node] for node in self.launchers]

    def exit_code(self) -> int:
        """Of the job, once all have ended: that of the first rank that failed on a node that was not lost."""
        ends = [code for node, codes in enumerate(self._codes()) if node not in self.lost for code in codes]
        return next((code if code > 0 else 128 - code for code in ends if code), 0)

    def close(self) -> None:
        """Ends what is left."""
        for node in range(len(self.launchers)):
            self.lose(node)
