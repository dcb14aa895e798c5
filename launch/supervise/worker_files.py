"""The files of the folder that a launcher shares with its agent, ranks and watcher."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from ...configs.reading.program_file import parse_frame
from ...configs.strict_json import JsonError, expect_int, expect_object, read_bytes, read_json
from ...parallel.comm.process_ids import ProcessId
from ...parallel.record.verdict_words import Places
from ...trainer.run_folder import RunFile

WATCH = "watch"
"""What the watcher is asked to watch."""
VERDICT = "verdict.json"
"""Why the job ends, as the watcher says."""
STORE = "store"
"""The port of a store that this node's fork server has started."""
STOPPED = "stopped"
"""A rank was stopped before its last step: the job leaves with `faults.stop_code`."""


def publish_text(file: Path, text: str) -> None:
    """Writes a file that readers see whole or not at all."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    partial.rename(file)


def read_places(run_dir: Path, world: int) -> Places:
    """The words for the operations of a run of `world` ranks, as far as its program can be read."""
    try:
        return Places(world, parse_frame(read_bytes(run_dir / RunFile.PROGRAM)).ranks)
    except (OSError, JsonError):
        return Places(world)


def processes(folder: Path) -> dict[int, ProcessId]:
    """The ranks that have begun, by rank."""
    found = {}
    for file in folder.glob("pid.*[0-9]"):
        with suppress(OSError, JsonError):
            known = expect_object(read_json(file), "a process", ("pid", "started", "boot"))
            process = ProcessId(expect_int(known["pid"], "pid", 1), expect_int(known["started"], "started"))
            found[int(file.suffix[1:])] = process
    return found


def store_port(folder: Path) -> int:
    """Where the node's own store listens; 0: there is none, or it does not listen yet."""
    with suppress(OSError, ValueError):
        return int(read_bytes(folder / STORE))
    return 0
