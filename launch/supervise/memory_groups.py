"""The control groups that limit a process's memory, and how often the kernel killed for it. Imports no torch.

The kernel counts in the group of the process that it kills (cgroup v2: memory.events; v1: memory.oom_control), whether
that group's own limit, one above it, or the machine's memory was the reason. So the count says that it was the kernel,
and the lowest limit on the way up which one is to be raised.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_ROOT, _PROCESSES = Path("/sys/fs/cgroup"), Path("/proc")
_NO_LIMIT = 1 << 60
"""Version 1 writes no limit as the largest multiple of a page."""
_GIB = 2**30


@dataclass(frozen=True)
class MemoryGroup:
    """The control group of a process, and those above it.

    Args:
        folders: the process's own first.
        events, limit: their files with the kernel's count of kills, and with the limit.
    """

    folders: tuple[Path, ...]
    events: str
    limit: str

    @staticmethod
    def of(pid: int, root: Path = _ROOT, processes: Path = _PROCESSES) -> MemoryGroup | None:
        """None: the process is gone, or the kernel limits no memory.

        Args:
            pid: of the process.
            root: where control groups are mounted.
            processes: where processes are.
        """
        try:
            lines = (processes / str(pid) / "cgroup").read_text().splitlines()
        except OSError:
            return None
        paths = {controllers: path for line in lines for _, controllers, path in [line.split(":", 2)]}
        old = next((path for names, path in paths.items() if "memory" in names.split(",")), None)
        if old is not None:
            return MemoryGroup(_upwards(root / "memory", old), "memory.oom_control", "memory.limit_in_bytes")
        return MemoryGroup(_upwards(root, paths[""]), "memory.events", "memory.max") if "" in paths else None

    def kills(self) -> int | None:
        """How many processes of the group the kernel has killed for lack of memory; None: it does not tell."""
        for folder in self.folders:  # inside a container the path may not be there, and its own group is the root
            try:
                counts = dict(line.split() for line in (folder / self.events).read_text().splitlines())
                return int(counts["oom_kill"])
            except (OSError, ValueError, KeyError):
                continue
        return None

    def lowest_limit(self) -> tuple[int, Path] | None:
        """Bytes of the lowest limit on the way up, and its file; None: nothing but the machine's memory limits it."""
        found: list[tuple[int, Path]] = []
        for folder in self.folders:
            try:
                limit = int((folder / self.limit).read_text())
            except (OSError, ValueError):  # "max"
                continue
            if limit < _NO_LIMIT:
                found.append((limit, folder / self.limit))
        return min(found, key=lambda each: each[0], default=None)

    def limit_words(self) -> str:
        """`the limit of 4 GiB in /sys/fs/cgroup/job/memory.max`."""
        lowest = self.lowest_limit()
        if lowest is None:
            return "the memory of the machine, for its control group has no limit"
        return f"the limit of {lowest[0] / _GIB:.3g} GiB in {lowest[1]}"


def _upwards(root: Path, path: str) -> tuple[Path, ...]:
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    return tuple(root.joinpath(*parts[:count]) for count in range(len(parts), -1, -1))
