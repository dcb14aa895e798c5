"""The method of context parallelism that the config names."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ...configs.schema_parallel import ContextConfig
from ...configs.tables.context_methods import CONTEXT_METHODS
from ..comm.mesh import Mesh
from ..kernels.interfaces import Core, LatentCore, LocalAttention


def make_latent_core(context: ContextConfig, mesh: Mesh, local: LocalAttention) -> LatentCore | None:
    """The core of latent attention where the method has one of its own; arguments as of `make_core`."""
    where = CONTEXT_METHODS[context.method].latent_core
    return _class(where).of(context, mesh, local) if where else None


def make_core(context: ContextConfig, mesh: Mesh, local: LocalAttention) -> Core:
    """The attention core of a job with several context ranks.

    Args:
        context: resolved.
        mesh: of this rank.
        local: attention of its device.

    Raises:
        ValueError: the method is still to be chosen.
    """
    where = CONTEXT_METHODS[context.method].core
    if not where:
        raise ValueError(f"parallel.context.method={context.method} has no core: the configuration is not resolved")
    return _class(where).of(context, mesh, local)


def _class(where: str) -> Any:
    """The class MODULE.CLASS of this folder."""
    module, _, name = where.partition(".")
    return getattr(import_module(f".{module}", __package__), name)
