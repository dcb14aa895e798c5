"""Stand-ins for SLURM's commands, which write down how they were called."""

from __future__ import annotations

from pathlib import Path

_COMMAND = """#!/bin/bash
echo "{name} $*" >> "{folder}/calls"
n=$(cat "{folder}/{name}.count" 2>/dev/null || echo 0)
echo $((n + 1)) > "{folder}/{name}.count"
answer="{folder}/{name}.$n"
[ -e "$answer" ] || answer="{folder}/{name}"
[ -e "$answer" ] || exit 0
. "$answer"
"""


class StandInCluster:
    """Commands in a folder for PATH, and what they answer.

    Args:
        folder: an empty one.
        commands: their names.
    """

    def __init__(self, folder: Path, *commands: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for name in commands:
            file = folder / "bin" / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(_COMMAND.format(name=name, folder=folder))
            file.chmod(0o755)

    def answers(self, command: str, *shell: str) -> None:
        """What a command does at its next call, the one after it …; the last of them from then on."""
        for old in self.folder.glob(f"{command}.*"):
            old.unlink()
        for number, text in enumerate(shell[:-1]):
            (self.folder / f"{command}.{number}").write_text(text)
        (self.folder / command).write_text(shell[-1])

    @property
    def path(self) -> str:
        """For PATH."""
        return f"{self.folder / 'bin'}:/usr/bin:/bin"

    @property
    def calls(self) -> list[str]:
        """How the commands were called."""
        file = self.folder / "calls"
        return file.read_text().splitlines() if file.exists() else []
