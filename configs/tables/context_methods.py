"""The methods of context parallelism: what each one is and needs. No torch.

A new method is a class in `parallel/context`, with an `of` that makes it, and a row here. A module outside the package
adds both with `parallel.context.make.register`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class ContextMethod:
    """A method.

    Args:
        name: what users write.
        text: one line on who sends what.
        core: of its attention: MODULE.CLASS in `parallel/context`, or a class that `register` there was given; empty:
            `resolve` replaces it.
        latent_core: the same for latent attention, of methods that have one of its own.
        exchanges: the ranks over which heads are exchanged, which must divide them: all of cp, or groups of
            parallel.context.inner.
        duplex: key-value heads may travel both ways (parallel.context.duplex).
        relays: keys or queries go from rank to rank, and pass those by that have no use for them.
    """

    name: str
    text: str
    core: str | Callable[..., Any] = ""
    latent_core: str | Callable[..., Any] = ""
    exchanges: Literal["cp", "inner"] | None = None
    duplex: bool = False
    relays: bool = False


_LIST = (
    ContextMethod(name="auto", text="the one that sends least for the model's heads"),
    ContextMethod(
        name="allgather",
        text="every rank gathers all keys and values",
        core="gather.GatherKeysValues",
        latent_core="gather.GatherLatent",
    ),
    ContextMethod(
        name="ulysses",
        text="tokens are exchanged for heads: a rank has some heads of the whole sequence",
        core="ulysses.Ulysses",
        exchanges="cp",
    ),
    ContextMethod(
        name="ring",
        text="keys and values go round a ring, while those of the rank before are worked on",
        core="ring.Ring",
        duplex=True,
        relays=True,
    ),
    ContextMethod(
        name="usp",
        text="ulysses inside groups of neighbours, a ring between them",
        core="usp.Usp",
        exchanges="inner",
        relays=True,
    ),
    ContextMethod(
        name="tokenring",
        text="queries and outputs go round, both ways, and keys stay",
        core="tokenring.TokenRing",
        relays=True,
    ),
)

CONTEXT_METHODS: dict[str, ContextMethod] = {method.name: method for method in _LIST}
"""By name, in the order in which they are listed to users."""
