"""`pentad diagnose RUN`: why a job ended, or what it hangs in, from its record and program alone."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...configs import UserError
from ...configs.strict_json import JsonError, read_json
from ...parallel.comm.process_ids import ProcessId
from ...parallel.record.diagnosis import Verdict, diagnose
from ...parallel.record.files import RingFile, open_ring, read_index, record_folder
from ...parallel.record.reader import RecordError, RecordRing, read_open
from ...parallel.record.ring import CLOSED_WORD, HEADER_BYTES, NEXT_WORD
from ...parallel.record.stand import Condition, Stand, read_stand
from ...parallel.record.verdict_words import ADVICE, Places, detail_lines, ranks_words
from ...parallel.record.vitals import BEAT_WORD, FAILED_WORD, PROGRESS_WORD
from ...trainer.processes.failure import read_failure
from ..supervise.watched import NEWEST, process_state
from ..supervise.worker_files import VERDICT, read_places

_LOOK_S = 1.0
"""Between two looks at a run that is under way: who has not come on in between is waited for."""
_SILENT_S = 5.0


def show_diagnosis(run: str, *, as_json: bool = False) -> int:
    """Prints the verdict; 0 where nothing is wrong, 1 otherwise.

    Raises:
        UserError: there is no such run, or it has no record.
    """
    folder = Path(run) if Path(run).is_dir() or not Path("runs", run).is_dir() else Path("runs", run)
    looked = look(folder)
    verdict = looked.verdict
    if as_json:
        print(json.dumps({"running": looked.running, "verdict": None if verdict is None else verdict.as_dict()}))
    elif verdict is None:
        print("\n".join((looked.quiet, *detail_lines(looked.stands, set(), looked.places))))
    else:
        when = time.strftime(" (%Y-%m-%d %H:%M:%S)", time.localtime(verdict.at)) if verdict.at else ""
        advice = ADVICE.get(verdict.kind, "")
        print("\n".join((f"{verdict.line}{when}", *verdict.details, *([f"what to do: {advice}"] if advice else []))))
    return 0 if verdict is None else 1


@dataclass(frozen=True)
class Looked:
    """What was found of a run.

    Args:
        running: whether a rank of this host lives.
        verdict: none: nothing is wrong.
        quiet: what to say then.
        stands, places: of the ranks that could be read.
    """

    running: bool
    verdict: Verdict | None
    quiet: str
    stands: dict[int, Stand]
    places: Places


def look(folder: Path) -> Looked:
    """Looks at a run, of which the rings of other hosts are only there once it has ended.

    Raises:
        UserError: there is no such run, or it has no record.
    """
    try:
        indexed = read_index(folder)
    except (OSError, RecordError) as error:
        raise UserError(f"{folder}: no record of a run can be read there ({error}); give the folder of a run") from None
    newest = max((ring.epoch for ring in indexed), default=0)
    views = [view for ring in indexed if ring.epoch == newest and (view := _RingView.open(folder, ring)) is not None]
    if not views:
        raise UserError(f"{folder}: none of the {len(indexed)} rings of its index is there any more")
    running = any(view.alive for view in views)
    places = read_places(folder, views[0].ring.header.world)
    if not running:
        told = _told(folder, min(view.ring.header.wall_ns for view in views))
        stands = {view.rank: view.post_mortem(folder) for view in views}
        verdict = told or diagnose(stands, places, impatient=True)
        return Looked(False, verdict, f"{ranks_words(stands)} ended in good order", stands, places)
    marks = {view.rank: view.mark() for view in views}
    time.sleep(_LOOK_S)
    stands = {view.rank: view.now(marks[view.rank]) for view in views}
    missing = {ring.rank for ring in indexed if ring.epoch == newest} - stands.keys()
    quiet = "the job comes on" + (f"; of {ranks_words(missing)} nothing can be read here" if missing else "")
    return Looked(True, diagnose(stands, places), quiet, stands, places)


def _told(folder: Path, since_ns: int) -> Verdict | None:
    """What the watcher said of this run, and not of one before it in the folder."""
    with suppress(OSError, JsonError):
        verdict = Verdict.load(read_json(record_folder(folder) / VERDICT))
        return verdict if verdict.at * 1e9 >= since_ns else None
    return None


class _RingView:
    """A ring that is read again and again, where it is or where it was copied to."""

    def __init__(self, fd: int, path: Path, host: str, *, here: bool) -> None:
        self._fd, self._path, self._host = fd, path, host
        self.ring: RecordRing = read_open(fd, path, newest=NEWEST)
        self.alive = here and ProcessId(self.ring.header.pid).alive
        self.rank = self.ring.header.rank

    @staticmethod
    def open(folder: Path, ring: RingFile) -> _RingView | None:
        """None: it cannot be read."""
        if ring.host == socket.gethostname():
            with suppress(OSError, RecordError):
                return _RingView(open_ring(Path(ring.file), ring)[0], Path(ring.file), ring.host, here=True)
        copy = ring.collected(folder)
        with suppress(OSError, RecordError):
            return _RingView(os.open(copy, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), copy, ring.host, here=False)
        return None

    def _words(self) -> np.ndarray:
        return np.frombuffer(os.pread(self._fd, HEADER_BYTES, 0), "<i8")

    def mark(self) -> tuple[int, int]:
        """What changes with progress."""
        words = self._words()
        return int(words[NEXT_WORD]), int(words[PROGRESS_WORD])

    def now(self, before: tuple[int, int]) -> Stand:
        """Where a rank that lives stands; late, if nothing has changed since `before`."""
        ring, words, now = read_open(self._fd, self._path, newest=NEWEST), self._words(), time.monotonic_ns()
        stand = read_stand(ring, words, now, self._host)
        last = int(ring.entries["enqueued"].max()) if len(ring.entries) else ring.header.mono_ns
        idle = (now - last) / 1e9
        silent = (now - int(words[BEAT_WORD])) / 1e9
        condition = Condition.RUNS
        if not ProcessId(ring.header.pid).alive:
            condition = Condition.DONE if words[CLOSED_WORD] else Condition.DEAD
        elif silent > _SILENT_S:
            condition = Condition.STOPPED if process_state(ring.header.pid) in "Tt" else Condition.FROZEN
        late = self.mark() == before and idle > _LOOK_S
        return Stand(**{**vars(stand), "condition": condition, "idle_s": idle, "late": late})

    def post_mortem(self, folder: Path) -> Stand:
        """Where a rank that has ended stood."""
        words = self._words()
        entries = self.ring.entries
        end = max(int(words[BEAT_WORD]), int(entries["enqueued"].max()) if len(entries) else 0)
        stand = read_stand(self.ring, words, end, self._host)
        condition, line = Condition.DONE if words[CLOSED_WORD] else Condition.DEAD, ""
        if words[FAILED_WORD]:
            failure = read_failure(folder, self.rank)
            lost = failure is not None and failure.lost
            condition, line = Condition.LOST if lost else Condition.FAILED, failure.lines[0] if failure else ""
        return Stand(**{**vars(stand), "condition": condition, "line": line})
