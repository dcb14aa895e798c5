"""A node's fork server: `python -m pentad.launch.supervise.fork_server FOLDER PARENT [PORT]`, with the id of the
process that starts it, and the port of a store that it has to start.

It imports torch and all of Pentad once, and forks ranks from what it is then: a rank is there in 10 ms instead of
seconds of a core's time each. Until it forks it starts no thread, touches no device and runs no parallel loop, none of
which would survive a fork; what depends on the environment when a library is loaded (OMP_NUM_THREADS, GLIBC_TUNABLES)
must be in its own. It is the parent of the ranks, and tells each rank's guardian how the rank has ended.
"""

from __future__ import annotations

import gc
import importlib
import os
import runpy
import select
import shutil
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from ...configs.strict_json import JsonError, expect_int, expect_list, expect_object, expect_text, parse_json
from ...trainer.processes.leaving import leave
from ...trainer.recovery.plan import end_plans
from .fork_protocol import Wire, listen

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)
_WARM = ("pentad.trainer.__main__", "pentad.trainer.preflight", "pentad.trainer.job.run")
"""What every rank imports."""
_STORE = "pentad.launch.supervise.nodes.store_process"
_KEPT_S = 1.0
"""For which a process that has ended is not reaped: its node's watcher reads there how it ended."""
_LOOK_S = 1.0


@dataclass(eq=False)
class Child:
    """A process that was forked.

    Args:
        pid: its id.
        stopped: whether it was asked to stop.
        ended: when it was seen to have ended.
        code: then its exit code, negative for a signal.
    """

    pid: int
    stopped: bool = False
    ended: float = 0.0
    code: int = 0
    reaped: bool = False

    def send(self, number: int) -> None:
        """Sends it a signal."""
        self.stopped = self.stopped or number in (signal.SIGTERM, signal.SIGQUIT)
        if not self.ended:
            os.kill(self.pid, number)  # ours and not reaped: nobody else has this id


@dataclass(eq=False)
class GuardedSlot:
    """What a guardian waits for: a process, or those that follow each other in its place.

    Args:
        request: of the guardian.
        number: of the process that has the place now.
        rank: of the place, in the job; -1: of no job.
        told: whether the guardian knows the end.
        used: whether the mesh has the place; of one that it has not, the end is that of the first place.
    """

    request: _Request
    number: int
    rank: int
    told: bool = False
    used: bool = True


class _Forked(Exception):
    """Raised in the new process, which leaves all of the server behind."""

    def __init__(self, request: _Request, streams: list[int]) -> None:
        super().__init__()
        self.request, self.streams = request, streams


class ForkServer:
    """Forks for whoever asks in a folder, until the one that has started this process is gone and all have ended.

    Args:
        folder: of the job on this node.
        parent: id of the process that has started this one.
    """

    def __init__(self, folder: Path, parent: int) -> None:
        self._folder, self._parent = folder, parent
        self._listener = listen(folder)
        self._wires: list[Wire] = []
        self._slots: dict[Wire, GuardedSlot] = {}
        self._children: dict[int, Child] = {}
        self._watcher: Wire | None = None
        self._stores: list[int] = []
        """Processes in which a store is, for whoever comes there; they end by themselves."""
        self._woken, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(write)

    def run(self, port: int | None = None) -> None:
        """Serves.

        Args:
            port: of a store for the job; none: it has one.

        Raises:
            _Forked: in each new process.
        """
        if port is not None:
            self._fork_store(port)
        while any(not child.reaped for child in self._children.values()) or os.getppid() == self._parent:
            kept = any(child.ended and not child.reaped for child in self._children.values())
            sources = [self._listener, self._woken, *self._wires]
            ready, _, _ = select.select(sources, [], [], _KEPT_S / 4 if kept else _LOOK_S)
            if self._woken in ready:
                os.read(self._woken, 4096)
            if self._listener in ready:
                self._wires.append(Wire(self._listener.accept()[0]))
            for wire in [wire for wire in self._wires if wire in ready]:
                try:
                    for message in wire.read():
                        self._hear(wire, expect_object(parse_json(message), "a message"))
                except (ConnectionError, JsonError):
                    self._lost(wire)
            self._look()
        shutil.rmtree(self._folder, ignore_errors=True)  # nobody else is left to do it; copies of states may lie there

    # Guardians --------------------------------------------------------------------------------------------------

    def _hear(self, wire: Wire, message: dict[str, Any]) -> None:
        if "run" in message:
            request = _Request.load(message)
            rank = request.rank
            number = rank if rank >= 0 else -1 - len(self._children)
            self._slots[wire] = GuardedSlot(request, number, rank)
            self._fork(number, request, wire)
        elif "watch" in message:
            self._watcher = wire
        elif wire is self._watcher:
            self._obey(message)
        else:
            number = expect_int(expect_object(message, "a message", ("signal",))["signal"], "signal", 1, 64)
            if wire in self._slots and self._slots[wire].used:
                self._children[self._slots[wire].number].send(number)

    def _lost(self, wire: Wire) -> None:
        """A guardian is gone: its rank saves and ends, or ends at once if it was asked to already."""
        self._wires.remove(wire)
        wire.close()
        slot = self._slots.pop(wire, None)
        if slot is not None and slot.used and slot.number in self._children:
            child = self._children[slot.number]
            child.send(signal.SIGKILL if child.stopped else signal.SIGTERM)
        if wire is self._watcher:
            self._end()
            end_plans(self._folder)  # nobody is left who could make another one

    def _look(self) -> None:
        """Tells who waits for it that a process has ended, and reaps it a little later."""
        now = time.monotonic()
        for number, child in self._children.items():
            if child.reaped:
                continue
            if not child.ended:
                found = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if found is None:
                    continue
                child.ended = now
                child.code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
                if self._watcher is not None:
                    self._watcher.send(ended=number, code=child.code)
            elif now - child.ended > _KEPT_S:
                os.waitpid(child.pid, 0)
                child.reaped = True
        self._stores = [pid for pid in self._stores if not os.waitpid(pid, os.WNOHANG)[0]]
        for wire, slot in self._slots.items():
            child = self._children[slot.number]
            if child.ended and not slot.told and (not child.code or self._watcher is None):
                slot.told = True
                wire.send(code=child.code)

    # The watcher ------------------------------------------------------------------------------------------------

    def _obey(self, message: dict[str, Any]) -> None:
        """What the node's watcher wants: other processes in the places of the ranks."""
        if "fork" in message:
            number = expect_int(message["fork"], "fork", 0)
            known = next(((wire, slot) for wire, slot in self._slots.items() if slot.rank >= 0), None)
            if known is not None and number not in self._children:
                wire, slot = known
                self._fork(number, slot.request.as_newcomer(number), wire)
            elif self._watcher is not None:
                self._watcher.send(ended=number, code=1)
        elif "plan" in message:
            members = [expect_int(each, "a member", 0) for each in expect_list(message["plan"], "plan")]
            for slot in (each for each in self._slots.values() if each.rank >= 0):
                slot.used = slot.rank < len(members)
                number = members[slot.rank if slot.used else 0]
                if number in self._children:
                    slot.number = number
                else:  # on another node, from where its guardian here hears nothing
                    self._miss(slot.number)
        elif "missed" in message:
            self._miss(expect_int(message["missed"], "missed"))
        elif "store" in message:
            self._fork_store(0)
        elif "end" in message:
            self._end()

    def _miss(self, number: int) -> None:
        """The end of a process is that of its slot, in good order."""
        self._look()
        child = self._children.get(number)
        if child is not None and child.ended:
            child.code = 0

    def _end(self) -> None:
        """From now on a process that ends is the end of its slot."""
        self._watcher = None

    def _fork(self, number: int, request: _Request, wire: Wire) -> None:
        self._children[number] = Child(_forked(request, wire.fds))

    def _fork_store(self, port: int) -> None:
        command = [_STORE, str(self._folder), str(port)]
        cpus = sorted(os.sched_getaffinity(0))
        self._stores.append(_forked(_Request(command, dict(os.environ), os.getcwd(), cpus), []))


def _forked(request: _Request, streams: list[int]) -> int:
    """The id of a new process.

    Raises:
        _Forked: in that one.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)  # none of its signals is to meet our handlers
    pid = os.fork()
    if not pid:
        raise _Forked(request, streams)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    return pid


@dataclass(frozen=True)
class _Request:
    """What is to run.

    Args:
        command: module and arguments.
        env, cwd, cpus: of the process.
    """

    command: list[str]
    env: dict[str, str]
    cwd: str
    cpus: list[int]

    @property
    def rank(self) -> int:
        """Of the job's ranks, as the environment says; -1: none."""
        rank = self.env.get("RANK", "")
        return int(rank) if rank.isascii() and rank.isdecimal() else -1

    def as_newcomer(self, number: int) -> _Request:
        """The same for a process with another number, which has no place in the job yet."""
        beyond = number - int(self.env["WORLD_SIZE"])
        local = str(int(self.env["LOCAL_WORLD_SIZE"]) + beyond)
        return replace(self, env={**self.env, "RANK": str(number), "LOCAL_RANK": local})

    @staticmethod
    def load(message: dict[str, Any]) -> _Request:
        known = expect_object(message, "a request", ("run", "env", "cwd", "cpus"))
        return _Request(
            [expect_text(each, "an argument") for each in expect_list(known["run"], "run")],
            {name: expect_text(value, name) for name, value in expect_object(known["env"], "env").items()},
            expect_text(known["cwd"], "cwd"),
            [expect_int(each, "a CPU", 0) for each in expect_list(known["cpus"], "cpus")],
        )


def _run(forked: _Forked) -> NoReturn:
    """Makes this process, just forked, `python -m` of the request."""
    code: object = 1
    try:
        _settle(forked)
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
    leave(code if isinstance(code, int) else int(code is not None))


def _settle(forked: _Forked) -> None:
    """Gives this process what is its own, and lets go of what is the server's."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, *_STOPS):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for place, stream in enumerate(forked.streams):
        os.dup2(stream, place)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=stream is sys.stderr or os.isatty(1))  # pyright: ignore
    request = forked.request
    os.environ.clear()
    os.environ.update(request.env)
    with suppress(OSError):  # CPUs that were taken away meanwhile
        os.sched_setaffinity(0, request.cpus)
    os.chdir(request.cwd)
    sys.argv = request.command
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)


def main(folder: Path, parent: int, port: int | None = None) -> int:
    """Imports, and serves the folder."""
    for number in _STOPS:  # it ends with its ranks, and not before
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for module in _WARM:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a rank's collections need not walk what was imported, nor copy its pages
    try:
        ForkServer(folder, parent).run(port)
    except _Forked as forked:
        new = forked
    else:
        return 0
    _run(new)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *(int(argument) for argument in sys.argv[2:])))
