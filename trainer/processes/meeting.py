"""Where the ranks of a job come together before there is a mesh, and tell each other why one of them ended.

They share only the launcher's store. A rank that fails while it starts (a wrong config, a folder in use, no GPU) writes
so into the store, and those who wait for it end at once instead of after `faults.timeout_s`. Of ranks that fail later,
the first one in the store is the cause, and prints it; the others add a line at most.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

from ...configs.errors import Problem, UserError
from ...configs.strict_json import JsonError, expect_object, parse_json

if TYPE_CHECKING:
    import torch.distributed as dist

HANDSHAKE_S = 30.0
"""Seconds for an answer of the store once something listens there."""
TELL_S = 15.0
"""Seconds for which a failing rank looks for the others, or waits until they know."""
STORE_PREFIX = "pentad/{}"
"""Of the keys of one start of the job."""
_POLL_S = (0.02, 0.5)
_GO = "go"
_GREETING = b"pentad "
_GREETING_S = 0.5
"""Seconds in which a rank 0 that failed says so; the price of every start without torchrun's store."""
_GREETING_BYTES = 1 << 16


class Stopped(Exception):
    """This rank was asked to stop before the others were there."""


class LostRank(RuntimeError):
    """Another rank failed before there was a mesh; `user`: by a mistake of the user's, which it has reported."""

    def __init__(self, message: str, user: bool) -> None:
        super().__init__(message)
        self.user = user


class Meeting:
    """One rank's view of the store of its job.

    Args:
        rank: this process.
        world: how many there are; alone, all methods return at once.
        env: MASTER_ADDR and MASTER_PORT, and what torchrun says of its own store.
        stopped: whether this rank was asked to stop; waiting then ends with `Stopped`.
    """

    def __init__(
        self, rank: int, world: int, env: Mapping[str, str] = os.environ, stopped: Callable[[], bool] = lambda: False
    ) -> None:
        self.rank, self.world, self._env, self._stopped = rank, world, env, stopped
        self._store: dist.Store | None = None
        self._hosts = rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._complete = self._told = False
        self._greeting: threading.Thread | None = None

    def open(self, timeout_s: float) -> dist.Store | None:
        """The store, made by rank 0 unless the launcher has one; None for a rank alone.

        Raises:
            UserError: the variables or the port cannot be used.
            TimeoutError: rank 0 has not come within `timeout_s` seconds.
            Stopped: this rank was asked to stop meanwhile.
        """
        if self.world == 1 or self._store is not None:
            return self._store
        host, port = _address(self._env)
        if not self._hosts and not self._complete:
            self._find_rank_0(host, port, timeout_s)
        import torch.distributed as dist

        store = self._connect(host, port, timeout_s)
        # Every start by torchrun has keys of its own.
        self._store = dist.PrefixStore(STORE_PREFIX.format(self._env.get("TORCHELASTIC_RESTART_COUNT", "0")), store)
        return self._store

    def move(self, address: str, timeout_s: float) -> dist.Store | None:
        """Another store, where the job's first one may be lost: the ranks had met before it was.

        Args:
            address: HOST:PORT; empty: the one that this process has.
            timeout_s: as of `open`, whose errors are raised.
        """
        host, _, port = address.rpartition(":")
        if address and (host, port) != (self._env.get("MASTER_ADDR"), self._env.get("MASTER_PORT")):
            self._env = {**self._env, "MASTER_ADDR": host, "MASTER_PORT": port}
            self._store, self._hosts, self._complete = None, False, True
        return self.open(timeout_s)

    def _find_rank_0(self, host: str, port: int, timeout_s: float) -> None:
        answers: list[bytes] = []

        def answered() -> bool:
            answer = _knock(host, port)
            if answer is not None:
                answers.append(answer)
            return answer is not None

        self._wait(answered, timeout_s, lambda: f"rank 0 has not come to {host}:{port}")
        if answers[0].startswith(_GREETING):
            raise self._lost(answers[0].removeprefix(_GREETING))

    def _lost(self, why: bytes) -> LostRank:
        """What a rank wrote that did not start."""
        try:
            told = expect_object(parse_json(why), "", ("rank", "line", "user"))
        except JsonError:
            return LostRank("rank 0 could not start", user=False)
        return LostRank(f"rank {told['rank']} could not start: {told['line']}", told["user"] is True)

    def _greet(self, why: bytes) -> None:
        """Tells all who come why the job does not start: without a store, and so without importing torch."""
        try:
            server = socket.create_server(("", _address(self._env)[1]), backlog=min(self.world, 1024))
        except (OSError, UserError):
            return
        left = self.world - 1

        def serve() -> None:
            nonlocal left
            while left:
                try:
                    caller, _ = server.accept()
                    with caller:
                        caller.sendall(_GREETING + why)
                except OSError:
                    return
                left -= 1
            server.close()

        self._greeting = threading.Thread(target=serve, name="greeting", daemon=True)
        self._greeting.start()

    def _connect(self, host: str, port: int, timeout_s: float) -> dist.Store:
        import torch.distributed as dist

        made: list[dist.Store | Exception] = []

        def connect() -> None:
            try:
                # fmt: off
                made.append(dist.TCPStore(host, port, is_master=self._hosts, wait_for_workers=False, multi_tenant=True,
                                          timeout=timedelta(seconds=timeout_s)))
                # fmt: on
            except Exception as error:
                made.append(error)

        # In a thread: the constructor never comes back where another program listens and does not answer.
        thread = threading.Thread(target=connect, name="store", daemon=True)
        thread.start()
        thread.join(HANDSHAKE_S)
        store = made[0] if made else None
        if store is None or isinstance(store, Exception):
            if self._hosts and "EADDRINUSE" not in str(store):
                why = f"rank 0 cannot listen at {host}:{port}: {_first_line(store)}; MASTER_ADDR must be its own host"
            else:
                why = f"{host}:{port} is in use by another program"
            raise UserError(Problem("MASTER_PORT", f"{why}; set another MASTER_PORT (torchrun: --master-port)"))
        return store

    def come(self, about: str, timeout_s: float) -> None:
        """Returns when all ranks are here, with the same `about`.

        Raises:
            UserError: two processes are the same rank, or ranks differ in `about`.
            LostRank: one failed on its way.
            TimeoutError: some have not come within `timeout_s` seconds; it names them.
            Stopped: this rank was asked to stop meanwhile.
        """
        store = self._store
        if store is None:
            return
        if store.add(f"here/{self.rank}", 1) > 1:
            message = f"two processes say that they are rank {self.rank} of {self.world}; is another job at this port?"
            raise UserError(Problem("MASTER_PORT", f"{message} set another MASTER_PORT, or mend the ranks"))
        agreed = store.compare_set("about", "", about).decode()
        if agreed != about:
            raise UserError(f"rank {self.rank} was started with another configuration: {_difference(agreed, about)}")
        if store.add("here", 1) == self.world:
            store.compare_set("verdict", "", _GO)
        self._wait(lambda: store.check(["verdict"]), timeout_s, self._missing)
        verdict = store.get("verdict").decode()
        if verdict != _GO:
            self._count_as_told(store)
            raise self._lost(verdict.encode())
        self._complete = True

    def _missing(self) -> str:
        assert self._store is not None
        missing = [str(r) for r in range(self.world) if not self._store.check([f"here/{r}"])]
        shown = ", ".join(missing[:8]) + (" …" if len(missing) > 8 else "")
        return f"{len(missing)} of {self.world} ranks have not come: {shown}"

    def tell(self, line: str, *, user: bool) -> bool | None:
        """Tells the others that this rank ends.

        Args:
            line: why.
            user: by a mistake of the user's.

        Returns:
            Whether it is the first one that does; None where nobody can be asked.
        """
        if self.world == 1:
            return True
        why = json.dumps({"rank": self.rank, "line": line, "user": user})
        if self._hosts and self._store is None:
            self._greet(why.encode())
            return True
        try:
            if self._complete and not self._hosts and not _listens(*_address(self._env)):
                return None  # torch would print a trace for every key that is asked for
            self.open(TELL_S)
            store = self._store
            assert store is not None
            store.set_timeout(timedelta(seconds=3))
            first = store.compare_set("failed", "", str(self.rank)).decode() == str(self.rank)
            if not self._complete:
                store.compare_set("verdict", "", why)
                self._count_as_told(store)
        except LostRank:
            return False
        except Exception:
            return None
        return first

    def _count_as_told(self, store: dist.Store) -> None:
        if not self._told:
            store.add("told", 1)
        self._told = True

    def leave(self) -> None:
        """Keeps the store up until all ranks know that the job does not start."""
        if self._greeting is not None:
            self._greeting.join(TELL_S)
            return
        store = self._store
        if store is None or not self._hosts or self._complete:
            return
        try:
            self._wait(lambda: store.add("told", 0) >= self.world, TELL_S, str)
        except Exception:
            return

    def _wait(self, done: Callable[[], bool], timeout_s: float, late: Callable[[], str]) -> None:
        deadline, pause = time.monotonic() + timeout_s, _POLL_S[0]
        while not done():
            if self._stopped():
                raise Stopped
            if time.monotonic() > deadline:
                raise TimeoutError(f"{late()} within {timeout_s:g} s (faults.timeout_s)")
            time.sleep(pause)
            pause = min(2 * pause, _POLL_S[1])


def wait_until_told(store: dist.Store, world: int) -> None:
    """Of whoever keeps the store: where the job does not start, returns when all ranks know that, or late."""
    until = time.monotonic() + TELL_S
    if not store.check(["verdict"]) or store.get("verdict").decode() == _GO:
        return
    while store.add("told", 0) < world and time.monotonic() < until:
        time.sleep(_POLL_S[0])


def _address(env: Mapping[str, str]) -> tuple[str, int]:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if missing:
        raise UserError(
            *(Problem(n, "is not set: where ranks meet; start them with torchrun, or set it") for n in missing)
        )
    port = env["MASTER_PORT"]
    if not port.isascii() or not port.isdecimal() or not 0 < int(port[:9]) < 65536 or len(port) > 9:
        raise UserError(Problem("MASTER_PORT", f"must be a port from 1 to 65535, got {port}"))
    try:
        socket.getaddrinfo(env["MASTER_ADDR"], int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        message = f"{env['MASTER_ADDR']} is not known here ({error.strerror}); set it to the host of rank 0"
        raise UserError(Problem("MASTER_ADDR", message)) from None
    return env["MASTER_ADDR"], int(port)


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=3).close()
    except OSError:
        return False
    return True


def _knock(host: str, port: int) -> bytes | None:
    """What somebody says who listens there; a store says nothing. None: nobody does."""
    try:
        with socket.create_connection((host, port), timeout=3) as connection:
            connection.settimeout(_GREETING_S)
            said = b""
            try:
                while len(said) < _GREETING_BYTES and (part := connection.recv(_GREETING_BYTES)):
                    said += part
            except TimeoutError:
                pass
            return said
    except OSError:
        return None


def _difference(theirs: str, mine: str) -> str:
    ours, others = (json.loads(text) for text in (mine, theirs))
    keys = [key for key in ours if ours[key] != others.get(key)]
    return f"{', '.join(f'{key}={ours[key]} instead of {others.get(key)}' for key in keys)}; start all ranks alike"


def _first_line(error: object) -> str:
    return str(error).partition("\n")[0] or "no answer"
