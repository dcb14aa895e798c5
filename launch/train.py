"""`pentad train`: from a config to running ranks, and back to one exit code."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..configs import Config, Problem, UserError, load
from ..trainer.__main__ import Failure
from ..trainer.__main__ import main as run_rank
from ..trainer.devices import visible_gpus
from ..trainer.preflight import preflight

POLL_S = 0.1
GRACE_S = 10.0
"""Seconds between a rank's failure and the end of those that wait for it in a collective."""
_CONSEQUENCES = (-signal.SIGTERM, -signal.SIGABRT)
"""How a rank ends that was asked to, or that gave up waiting for another."""
_MALLOC = "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=17179869184"


def train(config: str, overrides: Sequence[str]) -> int:
    """Runs a job: as one of its ranks under a launcher, otherwise all of them, on this machine.

    Returns:
        The exit code: 0 after the last step or a clean stop, 2 for a user's mistake, the failing rank's otherwise.

    Raises:
        UserError: what is wrong with the config, before anything is started.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return run_rank([config, *overrides])
    cfg = load(config, overrides)
    preflight(cfg)
    ranks = world_size(cfg)
    cuda = uses_gpus(cfg, ranks)
    with tempfile.TemporaryDirectory(prefix="pentad-") as folder:
        worker = ["-m", "pentad.launch.worker", folder, config, *overrides]
        return supervise(Path(folder), ranks, worker, rank_environment(ranks, cuda=cuda))


def world_size(cfg: Config) -> int:
    """Ranks that the layout needs."""
    p = cfg.parallel
    return p.tp * p.pp * p.cp * (p.dp or 1)


def uses_gpus(cfg: Config, ranks: int) -> bool:
    """Whether the job runs on GPUs.

    Raises:
        UserError: it should, and there are fewer than ranks.
    """
    wanted = cfg.train.device
    if wanted == "cpu":
        return False
    gpus = visible_gpus()
    if gpus >= ranks or (wanted == "auto" and gpus == 0):
        return gpus > 0
    p = cfg.parallel
    layout = f"parallel.tp={p.tp} x parallel.pp={p.pp} x parallel.cp={p.cp} x parallel.dp={p.dp}"
    message = f"{layout} needs {ranks} GPUs and {gpus} are visible; set smaller degrees, or train.device=cpu"
    raise UserError(Problem("train.device", message))


def rank_environment(ranks: int, *, cuda: bool) -> dict[str, str]:
    """The environment of the ranks: ours, and what has to be known before a process starts. The user's own wins.

    Threads: the machine's cores are shared out, since every rank would take all of them.

    Memory, on a CPU: glibc gives blocks above 32 MiB back to the kernel as soon as they are freed, so that every step
    gets its activations as fresh pages, which must be zeroed: for a 2-layer model of hidden size 512 at 8192 tokens
    439,000 page faults and 1.8 s of kernel time a step of 8.5 s. With higher thresholds they are reused: 4,000 faults
    and no kernel time, for a quarter more memory.
    """
    env = dict(os.environ)
    env.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // ranks)))
    if not cuda:
        env.setdefault("GLIBC_TUNABLES", _MALLOC)
    return env


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def supervise(folder: Path, ranks: int, worker: list[str], env: dict[str, str]) -> int:
    """Starts the ranks through torchrun's agent, passes signals on, and says why they failed if they did.

    Args:
        folder: an empty folder, shared with agent and ranks.
        ranks: how many.
        worker: arguments of the Python interpreter that make a rank (`launch.worker`).
        env: its environment.

    Returns:
        The exit code of the whole job.
    """
    with _caught_signals() as caught:
        command = [sys.executable, "-m", "pentad.launch.agent", str(folder), str(ranks), *worker]
        # A session of its own: Ctrl-C reaches only this process, which decides who gets it.
        agent = subprocess.Popen(command, env=env, start_new_session=True)
        ended_ranks = False
        try:
            ended_ranks = _wait(agent, folder, ranks, caught)
        finally:
            if agent.poll() is None:
                _kill(agent, folder)
    if agent.returncode == 0:
        return 0
    exits = {} if ended_ranks else _exits(folder)
    return _account(folder, exits, agent.returncode, caught)


def _wait(agent: subprocess.Popen[bytes], folder: Path, ranks: int, caught: list[int]) -> bool:
    """Until the agent ends or has to be killed; whether ranks that outlived another's failure had to be."""
    handled = 0
    deadline = math.inf
    while agent.poll() is None:
        if len(caught) > handled:
            handled = len(caught)
            if handled > 1:
                return False
            _stop(agent, folder, ranks)
        if deadline == math.inf and any(folder.glob("failure.*")):
            deadline = time.monotonic() + GRACE_S
        if time.monotonic() > deadline:
            _signal_ranks(folder, signal.SIGKILL)
        time.sleep(POLL_S)
    return time.monotonic() > deadline


@contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """The numbers of the signals to stop that came, in a list that grows."""
    caught: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, lambda n, _: caught.append(n)) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stop(agent: subprocess.Popen[bytes], folder: Path, ranks: int) -> None:
    """Asks all ranks to stop after the step, or ends a job whose ranks are not all there yet."""
    if len(list(folder.glob("pid.*[0-9]"))) == ranks:
        print("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)
        _signal_ranks(folder, signal.SIGTERM)
    else:
        agent.terminate()


def _kill(agent: subprocess.Popen[bytes], folder: Path) -> None:
    _signal_ranks(folder, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.killpg(agent.pid, signal.SIGKILL)
    agent.wait()


def _signal_ranks(folder: Path, number: signal.Signals) -> None:
    for file in folder.glob("pid.*[0-9]"):
        with suppress(ProcessLookupError):
            os.kill(int(file.read_text()), number)


def _exits(folder: Path) -> dict[int, int]:
    """Exit codes of the ranks that had ended when the agent noticed the first failure; a signal's are negative."""
    file = folder / "exits"
    return {int(rank): code for rank, code in json.loads(file.read_text()).items()} if file.exists() else {}


def _account(folder: Path, exits: dict[int, int], agent_code: int, caught: list[int]) -> int:
    """Prints the first failure of any rank, and only that; the job's exit code."""
    failures = [Failure(**json.loads(file.read_text())) for file in folder.glob("failure.*[0-9]")]
    killed = {rank: code for rank, code in exits.items() if code < 0 and code not in _CONSEQUENCES}
    if killed:
        # Exceptions of the other ranks are only what a lost peer looks like.
        rank, code = min(killed.items())
        name = signal.Signals(-code).name
        hint = "; the machine may be out of memory" if -code == signal.SIGKILL else ""
        print(f"error: rank {rank} was killed by {name}{hint}", file=sys.stderr, flush=True)
        return 128 - code
    if failures:
        first = min(failures, key=lambda failure: failure.at)
        print(first.text(), file=sys.stderr, flush=True)
        return first.exit_code
    if caught:
        return 128 + caught[0]
    if exits:
        rank, code = min(exits.items())
        print(f"error: rank {rank} ended with exit code {code} and no message", file=sys.stderr, flush=True)
        return code if code > 0 else 128 - code
    print(f"error: the ranks could not be started (agent's exit code {agent_code})", file=sys.stderr, flush=True)
    return 1
