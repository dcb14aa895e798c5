"""The dispatcher that a config asks for."""

from __future__ import annotations

from ...configs.schema_model import MoeConfig
from ..comm.mesh import Axis
from .deepep import DeepEp, opener
from .dispatch import AllToAll, Dispatcher
from .gather import AllGather


def local_dispatcher(moe: MoeConfig) -> Dispatcher:
    """The dispatcher of one device, which has all experts."""
    alone = Axis.single("ep")
    return AllToAll(moe.experts, alone, alone, weigh_before=moe.weigh == "before")


def make_dispatcher(moe: MoeConfig, ep: Axis, etp: Axis) -> Dispatcher:
    """One dispatcher for all layers; with overlap_chunks=auto it starts with one chunk.

    Where a rank has all experts, deepep has nothing to carry and all_to_all does the rest.

    Args:
        moe: what to make.
        ep: the ranks that share the experts.
        etp: the ranks that share each expert's inner width.

    Raises:
        UserError: deepep cannot be used here.
        ValueError: there is no such dispatcher.
    """
    before = moe.weigh == "before"
    match moe.dispatcher:
        case "all_gather":
            return AllGather(moe.experts, ep, etp, weigh_before=before)
        case "deepep" if ep.size > 1:
            return DeepEp(moe.experts, ep, opener(ep, etp), weigh_before=before)
        case "all_to_all" | "deepep":
            dispatcher = AllToAll(moe.experts, ep, etp, weigh_before=before)
            if moe.overlap_chunks != "auto":
                dispatcher.chunks = moe.overlap_chunks
            return dispatcher
        case unknown:
            raise ValueError(f"no dispatcher is called {unknown!r}")
