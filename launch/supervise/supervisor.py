"""The ranks of one machine from their start to their end: signals are passed on, and the cause of a failure is told."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ...configs.strict_json import JsonError, expect_int, expect_object, read_bytes, read_json
from ...parallel.comm.processes import Identity, children, runs
from ...parallel.record.diagnosis import FAILED, Verdict
from ...trainer.processes.failure import Failure
from ...trainer.processes.signals import STOPS, heeded
from ...trainer.recovery.plan import Membership, end_plans
from .worker_files import VERDICT, processes

POLL_S = 0.05
GRACE_S = 10.0
"""Seconds between a rank's failure and the end of those that wait for it in a collective."""
_DYING_S = 5.0
"""For what was killed to be gone: the kernel first gives its memory back."""
_LEAVE_S = 2.0
"""For spares to leave, after the ranks."""
_CONSEQUENCES = (-signal.SIGTERM, -signal.SIGABRT)
"""How a rank ends that was asked to, or that gave up waiting for another."""


def supervise(
    folder: Path, ranks: int, worker: list[str], env: dict[str, str], *, watch: bool = False, spares: int | None = None
) -> int:
    """Starts the ranks through torchrun's agent, passes signals on, and says why they failed if they did. Where the
    system has what it needs for that, the agent's children are guardians, and one process forks all ranks.

    Args:
        folder: an empty folder, shared with agent and ranks.
        ranks: how many.
        worker: module and arguments that make a rank (`launch.supervise.worker`).
        env: its environment.
        watch: whether a watcher looks after them.
        spares: processes that the watcher keeps ready, to mend faults; None: the first fault is the end.

    Returns:
        The exit code of the whole job.
    """
    with caught_signals() as caught, _watcher(folder, watch, spares) as watcher, _fork_server(folder, env) as forks:
        guardian = ["pentad.launch.supervise.guardian", str(folder)] if forks is not None else []
        command = ["-m", "pentad.launch.supervise.agent", str(folder), str(ranks), "-m", *guardian, *worker]
        # A session of its own: Ctrl-C reaches only this process, which decides who gets it.
        agent = subprocess.Popen([sys.executable, *command], env=env, start_new_session=True)
        ended: set[int] = set()
        try:
            mends = watcher if spares is not None else None
            ended = _wait(agent, forks, folder, ranks, caught, mends)
            if spares is not None:
                _let_leave(folder)
        finally:
            if agent.poll() is None:
                if watcher is not None:
                    watcher.kill()  # it must not take what follows for a fault
                _kill(agent, forks, folder)
        verdict = _verdict(folder)
        if verdict is not None and len(caught) < 2:
            return _judged(folder, verdict)
        if agent.returncode == 0:
            return 0
        for process, what in ((forks, "the ranks' fork server"), (agent, "torchrun's agent, which starts the ranks,")):
            if process is not None and (process.poll() or 0) < 0 and len(caught) < 2:
                return _without(what, folder, -process.returncode, caught)
    exits = {rank: code for rank, code in _exits(folder).items() if rank not in ended}
    return _account(folder, exits, agent.returncode, caught)


def _wait(
    agent: subprocess.Popen[bytes],
    forks: subprocess.Popen[bytes] | None,
    folder: Path,
    ranks: int,
    caught: list[int],
    mends: subprocess.Popen[bytes] | None,
) -> set[int]:
    """Until the agent ends or has to be killed. `mends`: as long as it lives, a rank's failure need not be the end.

    Returns:
        The ranks that were killed, because they outlived another's failure.
    """
    handled, said = 0, False
    ended: set[int] = set()
    deadline = math.inf
    while agent.poll() is None:
        if len(caught) > handled:
            handled = len(caught)
            if handled > 1:
                return ended
            _stop(agent, folder, ranks)
        if forks is not None and forks.poll() is not None:
            agent.send_signal(signal.SIGQUIT)  # it starts nothing more, and ends
        if not said and (verdict := _verdict(folder)) is not None:
            said, deadline = True, time.monotonic() + GRACE_S
            _say(verdict)
        if said and _is_over(folder, _verdict(folder), ranks):
            return ended
        mended = mends is not None and mends.poll() is None
        if mends is not None and not mended:
            end_plans(folder)  # nobody is left who could make one
        if deadline == math.inf and not mended and any(folder.glob("failure.*[0-9]")):
            deadline = time.monotonic() + GRACE_S
        if time.monotonic() > deadline:
            ended |= _signal_ranks(folder, signal.SIGKILL)
        time.sleep(POLL_S)
    return ended


@contextmanager
def _watcher(folder: Path, wanted: bool, spares: int | None) -> Iterator[subprocess.Popen[bytes] | None]:
    """The watcher of this machine's ranks, inside the block."""
    if not wanted:
        yield None
        return
    command = [sys.executable, "-m", "pentad.launch.supervise.watcher", str(folder)]
    command += [str(spares)] if spares is not None else []
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def _fork_server(folder: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes] | None]:
    """The process that forks the ranks, inside the block; none that it has forked is there after it."""
    if sys.platform != "linux":
        yield None
        return
    command = [sys.executable, "-m", "pentad.launch.supervise.fork_server", str(folder), str(os.getpid())]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=env, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _verdict(folder: Path) -> Verdict | None:
    """Why the watcher has ended the job."""
    with suppress(OSError, JsonError):
        return Verdict.load(read_json(folder / VERDICT))
    return None


def _say(verdict: Verdict) -> None:
    if verdict.kind != FAILED:  # a rank's own error is told with its traceback, from what the rank has left
        print("\n".join((f"error: {verdict.line}", *verdict.details)), file=sys.stderr, flush=True)


def _is_over(folder: Path, verdict: Verdict | None, ranks: int) -> bool:
    """Whether no rank has anything left to do: it has ended, or closed what it had, or is the one that cannot."""
    slots, members = verdict.ranks if verdict is not None and verdict.kind != FAILED else (), _members(folder, ranks)
    hopeless = {members[slot] for slot in slots if slot < len(members)}
    return all(
        rank in hopeless or not process.alive or (folder / f"left.{rank}").exists()
        for rank, process in processes(folder).items()
    )


def _judged(folder: Path, verdict: Verdict) -> int:
    """The exit code of a job that the watcher has ended."""
    if verdict.kind != FAILED:
        return verdict.code
    failures = [failure for failure in _failures(folder).values() if not failure.lost]
    first = min(failures, key=lambda failure: failure.at, default=None)
    print(first.text() if first is not None else f"error: {verdict.line}", file=sys.stderr, flush=True)
    return first.exit_code if first is not None else verdict.code


def _let_leave(folder: Path) -> None:
    """Gives the processes that nobody needed the time to leave."""
    until = time.monotonic() + _LEAVE_S
    while time.monotonic() < until and any(process.alive for process in processes(folder).values()):
        time.sleep(POLL_S)


def _without(what: str, folder: Path, number: int, caught: list[int]) -> int:
    """After somebody killed the agent or the ranks' parent: the ranks notice, save and end. Waits for them; the job's
    exit code."""
    name = signal.Signals(number).name
    message = f"{what} was killed by {name}; the ranks save and end"
    print(f"error: {message}; go on with checkpoint.resume=latest", file=sys.stderr, flush=True)
    asked = len(caught)
    while any(process.alive for process in processes(folder).values()):
        if len(caught) > asked:
            _signal_ranks(folder, signal.SIGKILL)
        time.sleep(POLL_S)
    return 128 + number


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """The numbers of the signals to stop that came, in a list that grows."""
    caught: list[int] = []
    previous = {number: signal.signal(number, lambda n, _: caught.append(n)) for number in heeded(STOPS)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stop(agent: subprocess.Popen[bytes], folder: Path, ranks: int) -> None:
    """Asks all ranks to stop after the step, or ends a job whose ranks are not all there yet."""
    if len(processes(folder)) >= ranks:
        print("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)
        _signal_ranks(folder, signal.SIGTERM, _members(folder, ranks))  # whoever else is there leaves with them
    else:
        agent.send_signal(signal.SIGQUIT)


def _kill(agent: subprocess.Popen[bytes], forks: subprocess.Popen[bytes] | None, folder: Path) -> None:
    """Kills agent and ranks, also those that have only just started and have not left their process id yet."""
    parents = [process for process in (agent, forks) if process is not None]
    for process in parents:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGSTOP)  # it starts no more of them
    ranks = {Identity(process.pid, process.started) for process in processes(folder).values() if process.alive}
    ranks.update(child for process in parents for child in children(process.pid))
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.kill(rank.pid, signal.SIGKILL)
    for process in parents:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    until = time.monotonic() + _DYING_S
    while time.monotonic() < until and any(runs(rank) for rank in ranks):
        time.sleep(POLL_S)


def _members(folder: Path, ranks: int) -> tuple[int, ...]:
    """The number of the process in each slot of the job's mesh."""
    plan = Membership(folder, 0, ranks).wait(0, 0)
    return plan.members if plan is not None else tuple(range(ranks))


def _signal_ranks(folder: Path, number: signal.Signals, only: Sequence[int] | None = None) -> set[int]:
    """Sends a signal to the ranks that live, or to those of some numbers; which those were."""
    reached = set()
    for rank, process in processes(folder).items():
        if process.alive and (only is None or rank in only):
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)
                reached.add(rank)
    return reached


def _exits(folder: Path) -> dict[int, int]:
    """Exit codes of the ranks that had ended when the agent noticed the first failure; a signal's are negative."""
    with suppress(OSError, JsonError, ValueError):
        known = expect_object(read_json(folder / "exits"), "exits")
        return {int(rank): expect_int(code, "code", -255, 255) for rank, code in known.items()}
    return {}


def _failures(folder: Path) -> dict[int, Failure]:
    found = {}
    for file in folder.glob("failure.*[0-9]"):
        with suppress(OSError, JsonError):
            failure = Failure.parse(read_bytes(file))
            if failure is not None:
                found[failure.rank] = failure
    return found


def _account(folder: Path, exits: dict[int, int], agent_code: int, caught: list[int]) -> int:
    """Prints the first failure of any rank, and only that; the job's exit code."""
    failures = _failures(folder)
    killed = {rank: code for rank, code in exits.items() if code < 0 and code not in _CONSEQUENCES}
    if killed:
        # Exceptions of the other ranks are only what a lost peer looks like.
        rank, code = min(killed.items())
        name = signal.Signals(-code).name
        hint = "; the machine may be out of memory" if -code == signal.SIGKILL else ""
        print(f"error: rank {rank} was killed by {name}{hint}", file=sys.stderr, flush=True)
        return 128 - code
    silent = {rank: code for rank, code in exits.items() if code > 0 and rank not in failures}
    if failures and not (silent and all(failure.lost for failure in failures.values())):
        first = min(failures.values(), key=lambda failure: (failure.lost, failure.at))
        print(first.text(), file=sys.stderr, flush=True)
        return first.exit_code
    if caught:
        return 128 + caught[0]
    if silent or exits:
        rank, code = min((silent or exits).items())
        print(f"error: rank {rank} ended with exit code {code} and no message", file=sys.stderr, flush=True)
        return code if code > 0 else 128 - code
    print(f"error: the ranks could not be started (agent's exit code {agent_code})", file=sys.stderr, flush=True)
    return 1


def keep_record(run_dir: Path, folder: Path) -> None:
    """After a job ended, however: copies what its dead ranks have left of the record, and removes the originals."""
    from ...parallel.record import files
    from ...parallel.record.reader import RecordError

    pids = {rank: process.pid for rank, process in processes(folder).items()}
    with suppress(OSError, RecordError):
        ours = [ring for ring in files.read_index(run_dir) if pids.get(ring.rank) == ring.pid]
        files.collect(run_dir, ours, remove=True)
    files.sweep()
