"""The method of context parallelism that the config names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any, TypeVar

from ...configs.schema_parallel import ContextConfig
from ...configs.tables.context_methods import CONTEXT_METHODS, ContextMethod
from ..comm.mesh import Mesh
from ..kernels.interfaces import Core, LatentCore, LocalAttention

_Core = TypeVar("_Core", bound=type)


def register(method: ContextMethod) -> Callable[[_Core], _Core]:
    """Adds a method from outside: from then on its name is checked and trained with like the others.

        @register(ContextMethod(name="relay", text="keys and values are passed on"))
        class Relay: ...

    Args:
        method: its row, without `core`; `latent_core` may be a class.

    Returns:
        The decorator of the class of its `Core`, whose `of` makes one from the arguments of `make_core`.

    Raises:
        ValueError: the name is taken.
    """

    def add(core: _Core) -> _Core:
        if method.name in CONTEXT_METHODS:
            raise ValueError(f"there is a method {method.name} of context parallelism already")
        CONTEXT_METHODS[method.name] = replace(method, core=core)
        return core

    return add


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


def _class(where: str | Callable[..., Any]) -> Any:
    """The class itself, or MODULE.CLASS of this folder."""
    if not isinstance(where, str):
        return where
    module, _, name = where.partition(".")
    return getattr(import_module(f".{module}", __package__), name)
