"""Signs of life of a rank, in the header of its ring: what another process needs to know without asking the rank.

Each is one aligned 8-byte word, written by the rank and read by the watcher of its node, except the abort word, which
goes the other way, as does the one that asks for a change of meshes. The interpreter lock may be held, the process may
be stopped: the words then simply stop changing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

EPOCH_WORD = 66
"""Epoch of the mesh, as entries of the record have it."""
BEAT_WORD, ABORT_WORD, PHASE_WORD, SINCE_WORD, WAITS_WORD = 68, 69, 70, 71, 72
FAILED_WORD, OUT_WORD, LEFT_WORD = 73, 74, 75
DATA_SINCE_WORD, DATA_THREAD_WORD, MAIN_THREAD_WORD, PROGRESS_WORD = 76, 77, 78, 79
WRITER_SINCE_WORD, WRITER_STAGE_WORD, WRITER_WAITS_WORD, STACKS_WORD = 80, 81, 82, 83
WATCHED_WORD, TOLD_WORD = 84, 85
AT_STEP_WORD, AT_WORD = 86, 87
CHANGE_WORD, READY_WORD = 88, 89

PHASES = ("start", "load", "first step", "step", "data", "evaluation", "save", "end")
"""What a rank's main thread is at; a phase's code is its place here."""

BEAT_S = 0.02
"""Seconds between two signs of life, and between two looks at the abort word."""

_now = time.monotonic_ns


@dataclass
class _Heard:
    """Who is told of the abort word."""

    epoch: int
    trigger: Callable[[], object]
    cut: Callable[[], object]
    at: int = 0


_CUT_NS = 50_000_000
"""After which a thread that torch holds is let go by force: the other waits have long ended by then."""


class Vitals:
    """The writer's side.

    Args:
        words: the header of a ring.
    """

    def __init__(self, words: memoryview) -> None:
        self._words = words
        self._longest = -1
        """Between two signs of life, in ns; -1: none has been given yet."""
        self._heard: _Heard | None = None
        now = _now()
        words[BEAT_WORD] = words[SINCE_WORD] = now
        words[MAIN_THREAD_WORD] = threading.get_native_id()

    # Liveness and abort -----------------------------------------------------------------------------------------

    def listen(self, epoch: int, trigger: Callable[[], object], cut: Callable[[], object]) -> None:
        """When the abort word of an epoch is set, `beat` calls `trigger`, and `cut` a little later."""
        self._heard = _Heard(epoch, trigger, cut)

    def deafen(self) -> None:
        """Ends `listen`."""
        self._heard = None

    @property
    def aborted(self) -> bool:
        """Whether the watcher has told the epoch to end. The word says so of all epochs below it, and is never taken
        back."""
        return self._words[ABORT_WORD] > self._words[EPOCH_WORD]

    @property
    def to_leave(self) -> bool:
        """Whether the watcher wants the ranks to leave this epoch's mesh after a step, for one that others join."""
        return self._words[CHANGE_WORD] > self._words[EPOCH_WORD]

    @property
    def watched(self) -> bool:
        """Whether a watcher looks at this rank."""
        return self._words[WATCHED_WORD] > 0

    def beat(self) -> None:
        """A sign of life; looks at the abort word. For a thread of its own."""
        now = _now()
        self._longest = max(self._longest, now - self._words[BEAT_WORD])
        self._words[BEAT_WORD] = now
        heard, told = self._heard, self._words[ABORT_WORD]
        if heard is None or told <= heard.epoch:
            return
        if not heard.at:
            heard.at = now
            heard.trigger()
        elif now - heard.at > _CUT_NS:
            self._heard = None
            heard.cut()

    def longest_silence_s(self) -> float:
        """The longest time between two signs of life since this was asked last, the one that goes on included; 0: none
        is given."""
        if self._longest < 0:
            return 0.0
        longest, self._longest = self._longest, 0
        return max(longest, _now() - self._words[BEAT_WORD]) / 1e9

    def failed(self) -> None:
        """This rank ends of an error, which it has written down."""
        self._words[FAILED_WORD] = self._words[FAILED_WORD] or _now()

    def out(self) -> None:
        """The step loop has been reached again after an error."""
        self._words[OUT_WORD] = self._words[OUT_WORD] or _now()

    def ready(self) -> None:
        """This process waits for a mesh to be in, and no fault has brought it there."""
        self._words[READY_WORD] = _now()

    def goes_on(self) -> None:
        """This rank goes on in another mesh."""
        self._words[OUT_WORD] = self._words[READY_WORD] = self._words[WAITS_WORD] = 0

    def left(self) -> None:
        """Nothing that matters is left to do in this process."""
        self._words[LEFT_WORD] = _now()

    def shows_stacks(self, number: int) -> None:
        """A signal of this number makes the process write down its stacks; 0: no more."""
        self._words[STACKS_WORD] = number

    # What the main thread is at ---------------------------------------------------------------------------------

    def enter(self, phase: str) -> None:
        """From now on the main thread is at `phase`."""
        self._words[SINCE_WORD] = _now()
        self._words[PHASE_WORD] = PHASES.index(phase)
        self._words[PROGRESS_WORD] += 1

    @contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        """The main thread is at `phase` inside the block."""
        before = PHASES[self._words[PHASE_WORD]]
        self.enter(phase)
        yield  # without `finally`: where an error broke it off is worth knowing
        self.enter(before)

    def waits(self, ticket: int) -> None:
        """The main thread waits for what an entry of the record is about; `Recorder.exit` takes it back."""
        self._words[WAITS_WORD] = ticket + 1

    # Threads beside it ------------------------------------------------------------------------------------------

    def makes_data(self, busy: bool) -> None:
        """The thread that prepares data begins a microbatch, or has one ready."""
        self._words[DATA_THREAD_WORD] = threading.get_native_id()
        self._words[DATA_SINCE_WORD] = _now() if busy else 0

    def writes(self, busy: bool) -> None:
        """A save begins, or has ended, in the thread that writes it."""
        self._words[WRITER_STAGE_WORD] = self._words[WRITER_WAITS_WORD] = 0
        self._words[WRITER_SINCE_WORD] = _now() if busy else 0

    def meets(self, waiting: bool) -> None:
        """The thread that writes has its part of a stage ready and waits for the other ranks, or goes on."""
        self._words[WRITER_STAGE_WORD] += waiting
        self._words[PROGRESS_WORD] += 1
        self._words[WRITER_WAITS_WORD] = int(waiting)


class Heart:
    """A thread that gives a rank's signs of life, every 20 ms.

    Args:
        vitals: of the rank.
        beside: called every other time.
    """

    def __init__(self, vitals: Vitals, beside: Callable[[], object] | None = None) -> None:
        self._vitals, self._beside, self._stop = vitals, beside, threading.Event()
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends it."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        beats = 0
        while not self._stop.wait(BEAT_S):
            self._vitals.beat()
            beats += 1
            if self._beside is not None and beats % 2 == 0:
                self._beside()
