"""The method of context parallelism that the config names."""

from __future__ import annotations

from ...configs.schema_parallel import ContextConfig
from ..comm.mesh import Mesh
from ..kernels.interfaces import Core, LatentCore, LocalAttention
from .gather import AllGather, GatherLatent
from .ring import Ring
from .tokenring import TokenRing
from .ulysses import Ulysses
from .usp import Usp


def make_latent_core(context: ContextConfig, mesh: Mesh, local: LocalAttention) -> LatentCore | None:
    """The core of latent attention where the method has one of its own; arguments as of `make_core`."""
    return GatherLatent(mesh.axis("cp"), local) if context.method == "allgather" else None


def make_core(context: ContextConfig, mesh: Mesh, local: LocalAttention) -> Core:
    """The attention core of a job with several context ranks.

    Args:
        context: resolved.
        mesh: of this rank.
        local: attention of its device.
    """
    axis, back = mesh.axis("cp"), mesh.axis("cp_back")
    match context.method:
        case "ulysses":
            return Ulysses(axis, local)
        case "ring":
            return Ring(axis, back, local, duplex=context.duplex)
        case "tokenring":
            return TokenRing(axis, back, local)
        case "usp":
            ring = Ring(mesh.axis("cp_outer"), mesh.axis("cp_outer_back"), local)
            return Usp(mesh.axis("cp_inner"), ring)
        case _:
            return AllGather(axis, local)
