"""The files of the folder that a launcher shares with its agent, ranks and watcher."""

from __future__ import annotations

from pathlib import Path

from ...configs.reading.program_file import parse_frame
from ...configs.strict_json import JsonError, read_bytes
from ...parallel.record.verdict_words import Places
from ...trainer.run_folder import RunFile

WATCH = "watch"
"""What the watcher is asked to watch."""
VERDICT = "verdict.json"
"""Why the job ends, as the watcher says."""
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
