"""What every kind of operation needs and brings about: one row a kind, and all that the room knows of it.

The check, the search for deadlocks, the simulator, the memory, the pictures and lowering read these rows and name kinds
only where they make operations. To add a kind: a row here, and a handler for `execute`.

Where a backward pass may be fused (BW) or split (B and W), needs name the halves; a fused pass stands for both.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from .kind import Acts, Hold, Kind, Need, Place, Role, Until


def _activation(sign: int, *, what: str = "activation", at_end: bool = True, counts: bool = True) -> Hold:
    return Hold(what, sign, at_end, counts)


def _send(token: str, toward: int, pair: str, awaited: str, *, trains: bool = False) -> Kind:
    return Kind(
        token=token,
        acts=Acts.STAGE,
        role=Role.SEND,
        started=True,
        trains=trains,
        toward=toward,
        pair=pair,
        awaited=awaited,
    )


def _receive(token: str, toward: int, pair: str, *, until: Until, trains: bool = False) -> Kind:
    return Kind(
        token=token,
        acts=Acts.STAGE,
        role=Role.RECEIVE,
        started=True,
        trains=trains,
        toward=toward,
        pair=pair,
        slot_until=until,
        awaited="rank {rank} to post {place}, with {sends} sends outstanding",
    )


def _collective(token: str, lane: str, *, trains: bool = False) -> Kind:
    return Kind(
        token=token,
        acts=Acts.RANK,
        balanced=True,
        role=Role.COLLECTIVE,
        started=True,
        trains=trains,
        lane=lane,
        awaited="rank {rank} to join {place}",
    )


def _memory(token: str, waits: str = "", *, before: str, after: str = "", holds: tuple[Hold, ...] = ()) -> Kind:
    need = Need(waits or after, Place.SAME, by=waits)
    return Kind(
        token=token,
        acts=Acts.STAGE,
        role=Role.MEMORY,
        needs=(need,),
        trains=True,
        optional=True,
        before=before,
        holds=holds,
    )


def _copy(
    token: str,
    words: str,
    need: str,
    *,
    duration: str,
    engine: str,
    before: str,
    hue: str,
    pool: str = "",
    until: tuple[str, ...] = (),
    takes: str = "",
) -> Kind:
    """A copy, which `takes` memory of one sort in a slot of its pool from its start on."""
    return Kind(
        token=token,
        acts=Acts.STAGE,
        role=Role.COPY,
        words=words,
        needs=(Need(need, Place.SAME),),
        duration=(duration,),
        started=True,
        trains=True,
        optional=True,
        engine=engine,
        before=before,
        slot_until=(until, ()),
        pool=pool,
        holds=(Hold(takes, +1, at_end=False),) if takes else (),
        hue=hue,
    )


def _collect(token: str, before: str, hue: str) -> Kind:
    """A gather of a stage's parameters, which takes their memory from its start on."""
    return Kind(
        token=token,
        acts=Acts.STAGE,
        role=Role.COPY,
        words="parameters",
        duration=("collect",),
        started=True,
        optional=True,
        engine="collect",
        before=before,
        holds=(Hold("parameters", +1, at_end=False),),
        hue=hue,
    )


_BACKWARD_NEEDS = (
    Need("F", Place.SAME),
    Need("B", Place.NEXT, by="SB"),
    Need("S", Place.EVERYWHERE, by="CS", only=Place.LAST, barriers=(1,)),
    Need("T", Place.EVERYWHERE, by="CD", only=Place.LAST, barriers=(2,)),
)


class Kinds:
    """All kinds of operations."""

    FORWARD = Kind(
        token="F",
        acts=Acts.STAGE,
        role=Role.COMPUTE,
        words="forward",
        needs=(
            Need("F", Place.PREVIOUS, by="SF"),
            Need("IF", Place.EVERYWHERE, by="CE", only=Place.FIRST, barriers=(1, 2)),
        ),
        duration=("forward",),
        holds=(_activation(+1, at_end=False),),
        # Hues after Okabe and Ito's palette, which stays distinct under the common kinds of colour blindness.
        hue="#2f72b4",
    )
    """Forward pass of a stage."""
    INPUT_GRAD = Kind(
        token="B",
        acts=Acts.STAGE,
        role=Role.COMPUTE,
        words="backward, inputs",
        needs=_BACKWARD_NEEDS,
        duration=("backward",),
        trains=True,
        holds=(_activation(-1, counts=False), _activation(+1, what="deferred", counts=False)),
        hue="#eb9c2d",
    )
    """The part of a backward pass that other stages wait for: the gradient of the stage's input."""
    BACKWARD = Kind(
        token="BW",
        acts=Acts.STAGE,
        role=Role.COMPUTE,
        words="backward",
        needs=_BACKWARD_NEEDS,
        duration=("backward", "weight"),
        trains=True,
        fuses=("B", "W"),
        holds=(_activation(-1),),
        hue="#d65f33",
        letter="B",
    )
    """Backward pass of a stage: input and weight gradients."""
    WEIGHT_GRAD = Kind(
        token="W",
        acts=Acts.STAGE,
        role=Role.COMPUTE,
        words="backward, weights",
        needs=(Need("B", Place.SAME),),
        duration=("weight",),
        trains=True,
        holds=(_activation(-1, what="deferred"),),
        hue="#1f9a78",
    )
    """The rest of a backward pass: the gradients of the stage's weights."""

    HEAD = Kind(
        token="S",
        acts=Acts.RANK,
        balanced=True,
        role=Role.COMPUTE,
        words="head",
        needs=(Need("F", Place.LAST, by="CX", barriers=(1, 2)),),
        duration=("head",),
        holds=(Hold("head", +1, at_end=False),),
        hue="#8552ad",
    )
    """Balanced vocabulary: this rank's logits, softmax statistics and, with one barrier, its part of the gradient."""
    HEAD_GRAD = Kind(
        token="T",
        acts=Acts.RANK,
        balanced=True,
        role=Role.COMPUTE,
        words="head, weights",
        needs=(Need("S", Place.EVERYWHERE, by="CS", barriers=(1, 2)),),
        duration=("head_grad",),
        trains=True,
        holds=(Hold("head", -1, at_end=True),),
        hue="#d985b6",
    )
    """Balanced vocabulary: the head's weight gradient and, with two barriers, this rank's part of the gradient."""
    EMBED = Kind(
        token="IF",
        acts=Acts.RANK,
        balanced=True,
        role=Role.COMPUTE,
        words="embedding",
        duration=("embed",),
        hue="#e6d44c",
        letter="E",
    )
    """Balanced vocabulary: look up the rows that this rank holds."""
    EMBED_GRAD = Kind(
        token="IB",
        acts=Acts.RANK,
        balanced=True,
        role=Role.COMPUTE,
        words="embedding, weights",
        needs=(Need("B", Place.FIRST, by="CG", barriers=(1, 2)),),
        duration=("embed_grad",),
        trains=True,
        hue="#8f7f2a",
        letter="G",
    )
    """Balanced vocabulary: add to the gradient of the rows that this rank holds."""

    OFFLOAD = _copy(
        "OFF",
        "to the host",
        "F",
        duration="offload",
        engine="out",
        before="REL",
        hue="#5c6bc0",
        pool="slab",
        until=("DRP", "RES"),
        takes="host",
    )
    """Start copying what the backward pass of a stage needs into a slab of the host."""
    RELEASE = _memory("REL", "OFF", before="PRE", holds=(Hold("offloaded", -1, at_end=True, counts=True),))
    """Wait for the copy to the host, then give its memory on the device back."""
    STORE = _copy(
        "STO",
        "to the disk",
        "REL",
        duration="store",
        engine="store",
        before="DRP",
        hue="#8d6e63",
        pool="file",
        until=("GOT",),
        takes="disk",
    )
    """Start writing the slab to a slot of the disk: what the host's memory cannot hold."""
    DROP = _memory("DRP", "STO", before="GET", holds=(Hold("host", -1, at_end=True),))
    """The slab is free once it is written. Simulated as a wait for that; it is put off to who fills the slab next."""
    FETCH = _copy(
        "GET",
        "from the disk",
        "DRP",
        duration="fetch",
        engine="get",
        before="GOT",
        hue="#c0a16b",
        pool="slab",
        until=("RES",),
        takes="host",
    )
    """Start reading it back into a slab; what is still on its way to the disk is taken from there, and not read."""
    FETCHED = _memory("GOT", "GET", before="PRE", holds=(Hold("disk", -1, at_end=True),))
    """Wait for that; the slot of the disk is free, and the host has the activation again."""
    PREPARE = _memory("PRE", before="RLD", after="REL", holds=(Hold("offloaded", +1, at_end=False, counts=True),))
    """Take memory on the device again."""
    RELOAD = _copy("RLD", "to the device", "PRE", duration="reload", engine="in", before="RES", hue="#26a69a")
    """Start copying it back; it waits for its own way there by the release before."""
    RESUME = _memory("RES", "RLD", before="B", holds=(Hold("host", -1, at_end=True),))
    """Wait for the copy to the device, which the backward pass now finds in place; the slab is free."""

    COLLECT_FORWARD = _collect("PF", "HF", "#7a9e3f")
    """Start gathering the parameters of a stage over the replicas that have parts of them, for a forward pass."""
    HAVE_FORWARD = _memory("HF", "PF", before="F")
    """Wait for them."""
    DROP_FORWARD = _memory("DF", before="", after="F", holds=(Hold("parameters", -1, at_end=True),))
    """Give their memory back."""
    COLLECT_BACKWARD = _collect("PB", "HB", "#4f7328")
    """As `COLLECT_FORWARD`, for a backward pass."""
    HAVE_BACKWARD = _memory("HB", "PB", before="B")
    """Wait for them."""
    DROP_BACKWARD = _memory("DB", before="", after="B", holds=(Hold("parameters", -1, at_end=True),))
    """Give their memory back; weight gradients do not need it."""

    SEND_FORWARD = _send("SF", +1, "RF", "the activations that rank {rank} sends in {place}")
    """Start sending the output of a stage to the next one."""
    # Autograd and deferred weight gradients read a received tensor to the end of its backward pass.
    RECV_FORWARD = _receive("RF", -1, "SF", until=(("W",), ("F",)))
    """Start receiving the input of a stage into a slot; the stage's forward waits for it."""
    SEND_BACKWARD = _send("SB", -1, "RB", "the gradient that rank {rank} sends in {place}", trains=True)
    """Start sending the gradient of a stage's input to the stage before it."""
    RECV_BACKWARD = _receive("RB", +1, "SB", until=(("W",), ()), trains=True)
    """Start receiving the gradient of a stage's output into a slot; the stage's backward waits for it."""

    HIDDEN = _collective("CX", "head")
    """Start the broadcast of the last stage's output; S waits for it."""
    STATISTICS = _collective("CS", "head")
    """Start agreeing on the softmax and, with one barrier, summing the gradient to the last stage; T waits for it."""
    HIDDEN_GRAD = _collective("CD", "head", trains=True)
    """Two barriers: start summing the gradient to the last stage, whose backward waits for it."""
    EMBEDDED = _collective("CE", "embed")
    """Start summing the looked-up rows to the first stage, whose forward waits for it."""
    EMBEDDED_GRAD = _collective("CG", "embed", trains=True)
    """Start the broadcast of the gradient of the first stage's input; IB waits for it."""

    REDUCE = Kind(token="RG", acts=Acts.BUCKET, role=Role.UPDATE, words="update", duration=("reduce",), phase=0)
    """The gradients of a bucket are final: sum them over the replicas. Waits for the sum, which may run since."""
    NORM = Kind(token="NORM", acts=Acts.STEP, role=Role.UPDATE, duration=("norm",), started=True, phase=1)
    """Global gradient norm, loss, and whether the step is skipped."""
    OPTIMIZE = Kind(token="OPT", acts=Acts.BUCKET, role=Role.UPDATE, words="update", duration=("optimize",), phase=2)
    """Update this rank's share of a bucket."""
    GATHER = Kind(token="AG", acts=Acts.BUCKET, role=Role.UPDATE, duration=("gather",), started=True, phase=2)
    """Start handing the updated shares of a bucket to all replicas."""


KINDS: dict[str, Kind] = {kind.token: kind for kind in vars(Kinds).values() if isinstance(kind, Kind)}
"""By token, in the order of the rows."""


@dataclass(frozen=True, slots=True)
class Flow:
    """What a transfer or collective brings from one kind to another: a need, seen from its way."""

    source: Kind
    target: Kind
    need: Need


@cache
def flows(carrier: str) -> tuple[Flow, ...]:
    """All that a send or a collective brings, by its token, without the fused kinds: their halves stand for them."""
    return tuple(
        Flow(KINDS[need.kind], kind, need)
        for kind in KINDS.values()
        for need in kind.needs
        if need.by == carrier and not kind.fuses
    )


@cache
def stands_for(kind: Kind) -> Kind:
    """The kind that needs name it by: the first of those that it fuses, else itself."""
    return KINDS[kind.fuses[0]] if kind.fuses else kind


def register(kind: Kind) -> Kind:
    """Adds a row from outside: from then on it is checked, simulated and drawn like the others.

    Raises:
        ValueError: the token is taken.
    """
    if KINDS.setdefault(kind.token, kind) is not kind:
        raise ValueError(f"there is a kind {kind.token} already")
    flows.cache_clear()
    return kind


def kind_of(token: str) -> Kind:
    """The kind with a token.

    Raises:
        ValueError: there is none.
    """
    try:
        return KINDS[token]
    except KeyError:
        raise ValueError(f"{token!r} is no kind of operation") from None


def _by_token(kind: Kind) -> tuple[Callable[[str], Kind], tuple[str]]:
    return kind_of, (kind.token,)


copyreg.pickle(Kind, _by_token)  # identity survives the way to another process
