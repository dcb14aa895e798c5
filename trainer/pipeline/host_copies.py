"""The lanes of one rank's copies between device, host and disk."""

from __future__ import annotations

from collections.abc import Iterator

from ...parallel.comm.disk import open_disk
from ...parallel.comm.lane import Lane
from ...parallel.comm.mesh import Mesh
from ...parallel.comm.slab import DiskLanes
from ...parallel.pipeline.needs import Kinds
from ...parallel.pipeline.program import Program
from ...parallel.pipeline.saved import Offloads, storage_id
from ..setup import Parts


class HostCopies:
    """The lanes of one rank's copies between device, host and disk, and what they carry.

    Args:
        program: of all ranks.
        parts: of this rank.
        mesh: the mesh.
        folder: on a disk, for a program that stores some activations there.
    """

    def __init__(self, program: Program, parts: Parts, mesh: Mesh, folder: str | None = None) -> None:
        abort = mesh.abort
        self._out, self._back = (
            Lane(f"copies {way}", parts.device, abort=abort, recorder=mesh.recorder)
            for way in ("to the host", "to the device")
        )
        self._disk: DiskLanes | None = None
        if folder is not None and any(op.kind is Kinds.STORE for op in program.ranks[mesh.axis("pp").rank]):
            # Threads whatever the device is: nobody else waits for a disk.
            store, get = (
                Lane(f"copies {way} the disk", "cpu", abort=abort, recorder=mesh.recorder) for way in ("to", "from")
            )
            self._disk = DiskLanes(open_disk(folder), store, get, lambda: abort.reason is not None)
        held = [*parts.model.parameters(), *parts.model.buffers()]
        self.offloads = Offloads(
            program,
            mesh.axis("pp").rank,
            out=self._out,
            back=self._back,
            device=parts.device,
            elsewhere={storage_id(tensor.untyped_storage()) for tensor in held},
            disk=self._disk,
        )

    @staticmethod
    def of(program: Program, parts: Parts, mesh: Mesh, folder: str | None = None) -> HostCopies | None:
        """None where this rank's program offloads nothing."""
        ops = program.ranks[mesh.axis("pp").rank]
        return HostCopies(program, parts, mesh, folder) if any(op.kind is Kinds.OFFLOAD for op in ops) else None

    def close(self) -> None:
        """Ends the lanes and gives the host's and the disk's memory back."""
        for lane in self._lanes():
            lane.close()
        self.offloads.close()

    def _lanes(self) -> Iterator[Lane]:
        yield from (self._out, self._back)
        if self._disk is not None:
            yield from (self._disk.store, self._disk.get)
