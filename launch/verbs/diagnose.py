"""`pentad diagnose RUN`: why a job ended, or what it hangs in, from its record and program alone."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...configs import UserError
from ...configs.strict_json import JsonError, read_json
from ...parallel.record.diagnosis import Verdict, diagnose
from ...parallel.record.files import read_index, record_folder
from ...parallel.record.reader import RecordError
from ...parallel.record.stand import Stand
from ...parallel.record.verdict_words import ADVICE, Places, detail_lines, ranks_words
from ..supervise.ring_view import LOOK_S, RingView
from ..supervise.worker_files import VERDICT, read_places


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
    views = [view for ring in indexed if ring.epoch == newest and (view := RingView.open(folder, ring)) is not None]
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
    time.sleep(LOOK_S)
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
