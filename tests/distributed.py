"""`run_distributed(fn, world_size)`: a function on several ranks, from inside a test.

Starting a process and importing torch costs seconds, so a server that has imported everything (`worker_imports`) forks
the worker processes, these stay for the whole pytest session, and each call only makes and destroys a process group. A
pool that failed or hung is thrown away, never reused.
"""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pentad.parallel.comm.host_tree import HostTree

MAX_WORLD_SIZE = 16
GRACE_S = 3.0
"""Seconds that the other ranks get to report after one has failed: the first error may be a consequence."""
START_S = 120.0
"""Seconds that a worker process may take to start; they do not count as a job's."""


_TREES: list[int] = []
"""Of the running job."""


def host_tree() -> HostTree:
    """What `run_distributed`'s ranks speak through, which call this alike."""
    _TREES.append(len(_TREES))
    store = dist.PrefixStore(f"tree-{_TREES[-1]}", job_store())
    return HostTree.connect(dist.get_rank(), dist.get_world_size(), store, timedelta(seconds=60))


@dataclass(frozen=True)
class _Job:
    fn: Callable[..., Any]
    rank: int
    world_size: int
    args: tuple[Any, ...]
    store: str
    timeout_s: float
    group: bool


@dataclass(frozen=True)
class _Failure:
    rank: int
    at: float
    error: BaseException | None
    trace: str

    def raised(self) -> BaseException:
        """The rank's own exception with its rank and traceback as a note, so that `pytest.raises` sees its type."""
        error = self.error or RuntimeError(self.trace.strip().splitlines()[-1])
        error.add_note(f"on rank {self.rank}:\n{self.trace}")
        return error


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0, group: bool = True
) -> list[Any]:
    """Calls ``fn(rank, world_size, *args)`` on `world_size` ranks and returns what they returned, by rank.

    The default process group is initialised: gloo, and NCCL for CUDA tensors where there is a device for every rank
    (then the rank's device is current). Every rank has one thread and the same torch seed.

    Args:
        fn: a function at a module's top level, so that another process can import it.
        world_size: at most 16.
        args: picklable; tensors are copied.
        timeout_s: seconds until the ranks are killed and the call fails with `TimeoutError`.
        group: false where `fn` makes its own process group, from `job_store()`.

    Raises:
        Exception: the first error of any rank, of its own type, with rank and traceback as a note.
        TimeoutError: names the ranks that had not finished.
    """
    if not 1 <= world_size <= MAX_WORLD_SIZE:
        raise ValueError(f"world_size is {world_size}; the pool has 1 to {MAX_WORLD_SIZE} processes")
    pool = _POOL
    finished = False
    try:
        with tempfile.TemporaryDirectory() as folder:
            jobs = [
                _Job(fn, rank, world_size, args, str(Path(folder) / "store"), timeout_s, group)
                for rank in range(world_size)
            ]
            results = pool.run(jobs, timeout_s)
        finished = True
    finally:
        if not finished:
            pool.close()
    return results


def close_pool() -> None:
    """Ends the worker processes; the next call starts new ones."""
    _POOL.close()


class _Pool:
    """Worker processes, as many as the largest job so far needed."""

    def __init__(self) -> None:
        self._workers: list[tuple[BaseProcess, Connection]] = []

    def run(self, jobs: list[_Job], timeout_s: float) -> list[Any]:
        payloads = [pickle.dumps((list(sys.path), job.rank, pickle.dumps(job))) for job in jobs]
        self._grow(len(jobs))
        for (_, pipe), payload in zip(self._workers, payloads, strict=False):
            pipe.send_bytes(payload)
        answers = self._answers(len(jobs), timeout_s)
        failures = [answer for answer in answers.values() if isinstance(answer, _Failure)]
        if failures:
            raise min(failures, key=lambda failure: failure.at).raised()
        if len(answers) < len(jobs):
            missing = sorted(set(range(len(jobs))) - set(answers))
            raise TimeoutError(f"ranks {missing} of {len(jobs)} did not finish {jobs[0].fn.__name__} in {timeout_s} s")
        return [answers[rank] for rank in range(len(jobs))]

    def close(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
        for process, _ in self._workers:
            process.join()
        self._workers = []

    def _grow(self, size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.worker_imports"])
        started = len(self._workers)
        while len(self._workers) < size:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        for _, pipe in self._workers[started:]:
            if not pipe.poll(START_S):
                raise TimeoutError(f"a worker process did not start in {START_S} s")
            pipe.recv_bytes()

    def _answers(self, count: int, timeout_s: float) -> dict[int, Any]:
        """Results or failures by rank in the order of arrival; ranks that said nothing in time are left out."""
        waiting = {self._workers[rank][1]: rank for rank in range(count)}
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while waiting and (left := deadline - time.monotonic()) > 0:
            for pipe in wait(list(waiting), left):
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                answers[rank] = self._receive(pipe, rank)
                if isinstance(answers[rank], _Failure):
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        return answers

    def _receive(self, pipe: Connection, rank: int) -> Any:
        try:
            return pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            process = self._workers[rank][0]
            process.join(GRACE_S)
            return _Failure(rank, time.monotonic(), None, f"process ended with exit code {process.exitcode}")


_POOL = _Pool()


def _serve(pipe: Connection) -> None:
    """A worker's whole life: one job after another until the pipe closes."""
    torch.set_num_threads(1)
    pipe.send_bytes(b"ready")
    while True:
        try:
            path, rank, payload = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        sys.path[:] = path  # test modules imported since this process started
        try:
            answer = pickle.dumps(_run(pickle.loads(payload)))
        except BaseException as error:
            answer = pickle.dumps(_failure(rank, error))
        # A job's process groups hang in cycles, and the threads of hundreds of them would slow all later jobs down.
        gc.collect()
        pipe.send_bytes(answer)


def _run(job: _Job) -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    # Tiny models reach denormals quickly, and arithmetic with them is up to 100 times slower.
    torch.set_flush_denormal(True)
    device = None
    if torch.cuda.is_available() and torch.cuda.device_count() >= job.world_size:
        device = torch.device("cuda", job.rank)
        torch.cuda.set_device(device)
    _STORE.append(dist.FileStore(job.store, job.world_size))
    if job.group:
        _join(job, device)
    try:
        return job.fn(job.rank, job.world_size, *job.args)
    except BaseException as error:
        # Before the group is destroyed: that makes the other ranks fail too, a moment later.
        return _failure(job.rank, error)
    finally:
        _STORE.clear()
        _TREES.clear()
        if dist.is_initialized():
            dist.destroy_process_group()


_STORE: list[dist.Store] = []


def job_store() -> dist.Store:
    """Where the ranks of the running job meet; called by `fn`."""
    return _STORE[0]


def _join(job: _Job, device: torch.device | None) -> None:
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device else "gloo",
        store=dist.PrefixStore("default", job_store()),
        rank=job.rank,
        world_size=job.world_size,
        timeout=timedelta(seconds=job.timeout_s),
        device_id=device,
    )
    # A rank whose job is done at once would close connections that the others are still opening.
    dist.barrier()


def _failure(rank: int, error: BaseException) -> _Failure:
    at = time.monotonic()
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # its constructor or contents cannot cross processes
        return _Failure(rank, at, None, trace)
    return _Failure(rank, at, error.with_traceback(None), trace)
