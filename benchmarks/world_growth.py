"""What one rank of a large job talks and waits for: its start, one save and one load in a world that is stood in for.

    python -m benchmarks.world_growth [--worlds 8 64 1024 16384]

One process is rank 0, then another rank, of GPUs on nodes of eight (tp 4 · pp 2 · dp the rest). Everything of Pentad is
real; the store, torch's groups and what the other ranks say and write are stood in for, at once and for nothing. So the
seconds are this rank's own work, without a network; what it sends and receives is counted. NCCL is not there: of it
only the calls are counted that all ranks of the job make together.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pentad.parallel.comm.mesh import Degrees, Mesh
from pentad.parallel.record.ring import Recorder
from pentad.trainer.checkpoint.checkpointer import Checkpointer
from pentad.trainer.checkpoint.names import step_folder
from pentad.trainer.checkpoint.retention import Retention
from pentad.trainer.job.telling import index_record
from pentad.trainer.processes.meeting import Meeting

from .stood_in import Spent, StandIns
from .stood_in_state import FilesOfOthers, state_of

WORLDS = (8, 64, 1024, 16384)
NODE, TP, PP = 8, 4, 2


@dataclass(frozen=True)
class GrowthRow:
    """What one rank spent in one part of a job of `world` ranks."""

    world: int
    rank: int
    part: str
    spent: Spent

    def line(self) -> str:
        """Of the table."""
        s = self.spent
        numbers = (s.calls, s.sent, s.received, s.sockets, s.files)
        counted = " | ".join(f"{n:,}" for n in (self.world, self.rank, *numbers))
        return f"| {self.part} | {counted} | {s.seconds:.3f} |"


def growth(world: int, rank: int, folder: Path, others: FilesOfOthers) -> list[GrowthRow]:
    """One rank's start, save and load.

    Args:
        world: ranks of the job, a multiple of eight.
        rank: which.
        folder: where the job's files are.
        others: what the other ranks write.
    """
    degrees = Degrees(tp=TP, pp=PP, dp=world // (TP * PP))
    rows: list[GrowthRow] = []
    with StandIns(world, rank, NODE, others.answer) as stood_in:

        def spend(part: str, work: Callable[[], object]) -> None:
            rows.append(GrowthRow(world, rank, part, stood_in.spend(work, folder)))

        recorder, meshes = Recorder(None, rank=rank, world=world), list[Mesh]()
        meeting = Meeting(rank, world, {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"})
        meeting._store = stood_in.store  # pyright: ignore[reportPrivateUsage]

        def start() -> None:
            meeting.come("{}", 60.0)
            node = f"node-{rank // NODE}"
            made = Mesh(
                degrees,
                store=stood_in.store,
                rank=rank,
                device="cuda",
                recorder=recorder,
                channels=((0, 1), (1, 0)),
                node=node,
            )
            meshes.append(made)
            index_record(folder, made, rank, "run", stood_in.store)

        spend("start", start)
        mesh = meshes[0]
        tensors = state_of(degrees, rank)
        checkpointer = Checkpointer(
            folder / "checkpoints",
            group=mesh.checkpoint_group,
            rank=rank,
            world=world,
            keep=Retention(2),
            asynchronous=False,
            on_event=lambda _: None,
            abort=mesh.abort,
        )
        step = step_folder(checkpointer.directory, 1)
        others.begin(step)

        def save() -> None:
            checkpointer.save(1, tensors, {"step": 1})
            checkpointer.wait()

        spend("save", save)
        others.end()

        def load() -> None:
            found = checkpointer.find_resume(step)
            assert found is not None
            checkpointer.load(found, tensors)

        spend("load", load)
        checkpointer.close()
        mesh.close()
    return rows


def rows_of(worlds: Sequence[int]) -> list[GrowthRow]:
    """Rank 0, which makes what all wait for, and the last rank of the job, in each world."""
    rows: list[GrowthRow] = []
    for world in worlds:
        with tempfile.TemporaryDirectory() as name:
            others = FilesOfOthers(Degrees(tp=TP, pp=PP, dp=world // (TP * PP)), NODE)
            for rank in (0, world - 1):
                rows += growth(world, rank, Path(name), others)
    return rows


def table(rows: Sequence[GrowthRow]) -> list[str]:
    """In Markdown, a part after the other."""
    head = ("part", "ranks", "of rank", "calls", "bytes sent", "received", "sockets", "files", "seconds")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for part in dict.fromkeys(row.part for row in rows):
        lines += [row.line() for row in sorted(rows, key=lambda r: (r.rank > 0, r.world)) if row.part == part]
    return lines


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, nargs="+", default=WORLDS, help="ranks of the jobs")
    begun = time.monotonic()
    with suppress(KeyboardInterrupt):
        print("\n".join(table(rows_of(parser.parse_args().worlds))), flush=True)
    print(f"{time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
