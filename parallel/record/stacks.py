"""Python's stacks of a rank, on demand of its watcher: written by a signal handler in C, whoever holds the interpreter.

The signal is a real-time one, which batch systems do not send and nothing else of a job's uses.
"""

from __future__ import annotations

import contextlib
import faulthandler
import re
import signal
from collections.abc import Callable
from pathlib import Path

from .vitals import Vitals

_FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')
_THREAD = re.compile(r"(Current thread|Thread) 0x[0-9a-f]+.*")
_SHOWN_PARTS = 3
"""Of a file's path, from its end."""
_MOST_BYTES = 1 << 18


def stacks_file(folder: Path, rank: int) -> Path:
    """Where a rank's stacks are, in the run's record folder."""
    return folder / f"rank-{rank:05d}.stacks.txt"


def stack_signal() -> int:
    """The number of the signal; 0 where the system has no such ones."""
    return int(signal.SIGRTMIN) + 6 if hasattr(signal, "SIGRTMIN") else 0


def show_stacks(file: Path, vitals: Vitals) -> Callable[[], None]:
    """From now on the signal appends the stacks to a file; the function ends that, and removes an empty file."""
    number = stack_signal()
    if not number:
        return lambda: None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        out = open(file, "wb", buffering=0)  # noqa: SIM115 (open as long as the handler)
    except OSError:
        return lambda: None
    faulthandler.register(number, out, all_threads=True)
    vitals.shows_stacks(number)

    def close() -> None:
        vitals.shows_stacks(0)
        faulthandler.unregister(number)
        signal.signal(number, signal.SIG_IGN)  # one that is on its way must not end the process
        out.close()
        with contextlib.suppress(OSError):
            if not file.stat().st_size:
                file.unlink()

    return close


def read_stacks(file: Path) -> list[tuple[str, ...]]:
    """The stacks of each thread that were written last, innermost frame first; the main thread's is the last."""
    try:
        with open(file, "rb") as opened:
            opened.seek(max(0, file.stat().st_size - _MOST_BYTES))
            lines = opened.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    found: list[list[str]] = []
    for line in lines:
        frame = _FRAME.fullmatch(line)
        if _THREAD.fullmatch(line):
            found.append([])
        elif frame is not None and found:
            place = "/".join(Path(frame[1]).parts[-_SHOWN_PARTS:])
            found[-1].append(f"{place}:{frame[2]} {frame[3]}")
    return [tuple(stack) for stack in found if stack]


def telling(stacks: list[tuple[str, ...]], phase: str, saving: bool) -> tuple[str, ...]:
    """The stack that says most of a rank in a phase: of the thread that prepares data, or writes, or the main one."""
    inside = "_produce" if phase == "data" else "write_together" if saving else ""
    for stack in stacks:
        if inside and any(frame.endswith(f" {inside}") for frame in stack):
            return stack
    return stacks[-1] if stacks else ()
