"""The lanes of one rank's copies between device and host."""

from __future__ import annotations

from ...parallel.comm.lane import Lane
from ...parallel.comm.mesh import Mesh
from ...parallel.pipeline.needs import Kinds
from ...parallel.pipeline.program import Program
from ...parallel.pipeline.saved import Offloads
from ..setup import Parts


class HostCopies:
    """The lanes of one rank's copies between device and host, and what they carry.

    Args:
        program: of all ranks.
        parts: of this rank.
        mesh: the mesh.
    """

    def __init__(self, program: Program, parts: Parts, mesh: Mesh) -> None:
        self._out, self._back = (
            Lane(f"copies {way}", parts.device, abort=mesh.abort, recorder=mesh.recorder)
            for way in ("to the host", "to the device")
        )
        held = [*parts.model.parameters(), *parts.model.buffers()]
        self.offloads = Offloads(
            program,
            mesh.axis("pp").rank,
            out=self._out,
            back=self._back,
            device=parts.device,
            elsewhere={tensor.untyped_storage().data_ptr() for tensor in held},
        )

    @staticmethod
    def of(program: Program, parts: Parts, mesh: Mesh) -> HostCopies | None:
        """None where this rank's program offloads nothing."""
        ops = program.ranks[mesh.axis("pp").rank]
        return HostCopies(program, parts, mesh) if any(op.kind is Kinds.OFFLOAD for op in ops) else None

    def close(self) -> None:
        """Ends the lanes and gives the host's memory back."""
        self._out.close()
        self._back.close()
        self.offloads.close()
