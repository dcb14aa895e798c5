"""A lane: communication jobs that run one after another beside the compute.

A job is a function that communicates, and may compute a little between two collectives. On the CPU a thread runs the
jobs; on CUDA each runs at once, but on a stream of its own, which first waits for the compute issued so far.

    compute   S0 ──── F1 ──── S1 ──── T0 (waits for the job of S0)
    lane         └ job 0 ──┘    └ job 1 ──┘

All ranks of a communicator submit the same jobs in the same order, and each communicator belongs to one lane.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from ..record import kinds
from ..record.ring import Recorder
from .mesh import Axis
from .waiting import Abort

T = TypeVar("T")

_LOOK_EVERY_S = 0.02
"""How often a lane that is being closed looks for an abort."""


class LaneFailed(RuntimeError):
    """An earlier job of the lane failed, so this one never ran."""


class Pending(Generic[T]):
    """The result of a job, now or later."""

    def __init__(
        self,
        job: Callable[[], T],
        context: tuple[int, int, int],
        abort: Abort,
        what: str,
        recorder: Recorder | None,
        axis: int = 0,
    ) -> None:
        self._job: Callable[[], T] | None = job
        self._recorder, self._axis = recorder, axis
        self._context, self._abort, self._what = context, abort, what
        self._done = threading.Event()
        self._result: list[T] = []
        self._error: Exception | None = None
        self._event: torch.cuda.Event | None = None

    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._done.is_set()

    def wait(self) -> T:
        """What the job returned (on CUDA: complete for work enqueued after this call).

        Raises:
            Aborted, Overdue: see `Abort.wait`.
            Exception: the job's own, or `LaneFailed`.
        """
        self._wait()
        if self._error is not None:
            raise self._error
        if self._event is not None:
            self._wait_on_stream(self._event)
        return self._result[0]

    def _wait_on_stream(self, event: torch.cuda.Event) -> None:
        if self._recorder is None:
            torch.cuda.current_stream().wait_event(event)
            return
        with self._recorder.span(self._recorder.intern(kinds.WAIT), axis=self._axis, on_device=True):
            torch.cuda.current_stream().wait_event(event)

    def _wait(self) -> None:
        if self._recorder is None or self._done.is_set():
            self._abort.wait(self._done, self._what)
            return
        ticket = self._recorder.enter(self._recorder.intern(kinds.WAIT), axis=self._axis)
        self._recorder.waits(ticket)
        try:
            self._abort.wait(self._done, self._what)
        finally:
            self._recorder.exit(ticket)

    def landed(self, *, beside: bool = False) -> None:
        """Returns when the job's work has ended, on CUDA too: for a thread that goes on outside all streams.

        Args:
            beside: that thread is not the step's, so that no wait is recorded.

        Raises:
            Aborted, Overdue: see `Abort.wait`.
            Exception: the job's own, or `LaneFailed`.
        """
        if beside:
            self._abort.wait(self._done, self._what)
        else:
            self._wait()
        if self._error is not None:
            raise self._error
        if self._event is not None:
            self._abort.until(self._what, self._event.query)

    def abandon(self) -> None:
        """Nobody asks for the result any more. Waits for nothing, so it does not fail after an abort either.

        On a CPU the job holds what it works on. On CUDA it is enqueued already, and memory that it works on may be
        used again only by compute that comes after it.
        """
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    def _run(self, failed: Exception | None) -> Exception | None:
        """Runs the job, unless an earlier one has failed; the first failure."""
        job, self._job = self._job, None
        assert job is not None
        try:
            if failed is not None:
                # Nobody may ever ask for the earlier job's result, so its error is told here.
                raise LaneFailed(f"{self._what}: an earlier job failed: {failed}") from failed
            self._result.append(job())
        except Exception as error:
            self._error = error
        self._done.set()
        return failed or self._error


class Lane:
    """Runs jobs in the order of their submission.

    Args:
        name: for errors and the thread.
        device: of the tensors that the jobs handle.
        axis: over which the jobs communicate. The entries that they write into its record carry the step, microbatch
            and operation of their submission; the axis must not be used outside the lane.
        abort, recorder: of a lane whose jobs do not communicate: what ends waits for it, and where they are recorded.
    """

    def __init__(
        self,
        name: str,
        device: torch.device | str,
        axis: Axis | None = None,
        *,
        abort: Abort | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.name, self.device = name, torch.device(device)
        # A writer of its own: what a job is recorded as is when it was submitted, not what the step does meanwhile.
        own = recorder.fork() if recorder is not None else None
        self._recorder = axis.recorder if axis is not None else own
        self._code = axis.code if axis is not None else recorder.intern(kinds.COPIES) if recorder is not None else 0
        self._abort = (axis.abort if axis is not None else abort) or Abort()
        self._failed: Exception | None = None
        self._stream = torch.cuda.Stream(device, priority=-1) if self.device.type == "cuda" else None
        self._alive: deque[tuple[torch.cuda.Event, object]] = deque()
        self._queue: queue.SimpleQueue[Pending | None] = queue.SimpleQueue()
        # A thread's own setting, which the lane takes over from its maker: denormals are up to 100 times slower.
        self._flush_denormal = bool(torch.tensor(1e-39) * 0.5 == 0)
        self._thread: threading.Thread | None = None
        if self._stream is None:
            self._thread = threading.Thread(target=self._serve, name=f"lane {name}", daemon=True)
            self._thread.start()

    def submit(self, job: Callable[[], T]) -> Pending[T]:
        """Appends a job. After a job has failed, all later ones fail."""
        origin = self._recorder.origin if self._recorder is not None else None
        context = origin.context if origin is not None else (0, 0, -1)
        pending = Pending(job, context, self._abort, f"lane {self.name}", origin, self._code)
        if self._stream is None:
            self._queue.put(pending)
        else:
            self._enqueue(pending, job, self._stream)
        return pending

    def close(self) -> None:
        """Ends the lane after the jobs submitted so far; does not wait for a job that is stuck, or after an abort."""
        self._queue.put(None)
        until = time.monotonic() + self._abort.timeout_s
        while self._thread is not None and self._thread.is_alive():
            if self._abort.reason is not None or time.monotonic() > until:
                break
            self._thread.join(_LOOK_EVERY_S)

    def _serve(self) -> None:
        torch.set_flush_denormal(self._flush_denormal)
        with torch.no_grad():
            while (pending := self._queue.get()) is not None:
                self._run(pending)
                del pending  # or the last result would live until the next job

    def _enqueue(self, pending: Pending[T], job: Callable[[], T], stream: torch.cuda.Stream) -> None:
        # Memory that a job allocates belongs to the lane's stream and is reused there by later jobs only, which wait
        # for the compute that read it. What a job read belongs to the compute stream: it is kept until the job ended.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            self._run(pending)
            event = torch.cuda.Event()
            event.record(stream)
        pending._event = event
        self._alive.append((event, job))
        while self._alive and self._alive[0][0].query():
            self._alive.popleft()

    def _run(self, pending: Pending) -> None:
        if self._recorder is not None:
            self._recorder.context = pending._context
        self._failed = pending._run(self._failed)
