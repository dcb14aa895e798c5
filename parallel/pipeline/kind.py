"""What a row of `needs` can say: how a kind of operation is described."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Acts(Enum):
    """What an operation acts on, and so what its index and stage mean. There is one of each per step."""

    STAGE = "stage"
    """A microbatch at a stage, on the stage's rank."""
    RANK = "rank"
    """A microbatch, on every rank of the pipeline."""
    BUCKET = "bucket"
    """A bucket of parameters, on the rank that has it."""
    STEP = "step"
    """The whole step, on every rank."""


class Role(Enum):
    """What an operation occupies while it runs."""

    COMPUTE = "compute"
    """The rank's device."""
    SEND = "send"
    """A link, with the receive that it is paired with; the token only starts it."""
    RECEIVE = "receive"
    """As `SEND`, seen from the other end."""
    COLLECTIVE = "collective"
    """A lane of all ranks of the pipeline (times tp); the token only starts it."""
    COPY = "copy"
    """An engine that copies between device, host and disk; the token only starts it."""
    MEMORY = "memory"
    """Nothing but the list: it takes or gives back memory, and may wait for a copy."""
    UPDATE = "update"
    """It belongs to the end of the step, after every microbatch."""


class Place(Enum):
    """Where a needed operation stands, seen from the one that needs it; it is always of the same microbatch."""

    SAME = "same"
    """At the same stage, or on the same rank."""
    PREVIOUS = "previous"
    """At the stage before; the first one has none."""
    NEXT = "next"
    """At the stage after; the last one has none."""
    FIRST = "first"
    """At the first stage."""
    LAST = "last"
    """At the last stage."""
    EVERYWHERE = "everywhere"
    """On every rank."""


@dataclass(frozen=True, slots=True)
class Need:
    """What must be finished before an operation can start.

    Args:
        kind: the token of what is needed.
        place: where that stands.
        by: the token of what brings it to other ranks: the send of a transfer, or a collective.
        only: FIRST or LAST where the need is of an operation at that stage alone.
        barriers: the numbers of vocabulary barriers with which it holds (0: not balanced).
    """

    kind: str
    place: Place
    by: str = ""
    only: Place | None = None
    barriers: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class Hold:
    """Memory that an operation takes or gives back.

    Args:
        what: the size, by its name in `ActivationBytes`: of the operation's stage, or of its rank.
        sign: +1 where it is taken, -1 where it is given back.
        at_end: at the operation's end, not at its start.
        counts: it is the activation that is counted where bytes are not known.
    """

    what: str
    sign: int
    at_end: bool
    counts: bool = False


Until = tuple[tuple[str, ...], tuple[str, ...]]
"""Tokens, in training and in an evaluation."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Kind:
    """One kind of operation. Kinds are compared by identity.

    Args:
        token: what operations of it are written with.
        acts: on what.
        role: what it occupies.
        words: what it is, in legends.
        needs: what must be finished before it starts.
        duration: the fields of `Times` that add up to how long it takes; by its token where it has no field.
        started: its token only starts it, and it completes beside the compute.
        trains: it belongs to a backward pass; a program without computation of that sort is an evaluation.
        optional: a program may leave it out.
        balanced: it is only in programs whose vocabulary is balanced.
        fuses: the kinds whose work it does in one, and which it is then listed instead of.
        toward: of a transfer, the stage at its other end, counted from the operation's.
        pair: of a transfer, the token at its other end.
        slot_until: of what fills a slot, the kinds after the first of which it is free: in training, and in an
            evaluation.
        pool: kinds with the same word here fill the same slots, of which a rank has some for all its stages; none: it
            fills slots of its own, of its stage.
        lane: of a collective.
        engine: of a copy: "out" to the host, "in" to the device, "store" to the disk, "get" from it, "collect" from
            other replicas.
        before: the token of what must follow in the rank's list, at the same stage and of the same microbatch.
        phase: of an update, its place in the order of phases.
        holds: the memory that it takes and gives back.
        hue: its colour in pictures; none: the update's.
        letter: its sign in a timeline of characters; the token where empty.
        awaited: what another rank waits for in it, with {rank} and {place}.
    """

    token: str
    acts: Acts
    role: Role
    words: str = ""
    needs: tuple[Need, ...] = ()
    duration: tuple[str, ...] = ()
    started: bool = False
    trains: bool = False
    optional: bool = False
    balanced: bool = False
    fuses: tuple[str, ...] = ()
    toward: int = 0
    pair: str = ""
    slot_until: Until = ((), ())
    pool: str = ""
    lane: str = ""
    engine: str = ""
    before: str = ""
    phase: int = 0
    holds: tuple[Hold, ...] = ()
    hue: str = ""
    letter: str = ""
    awaited: str = "rank {rank} to finish {place}"

    # Read for every operation of a program, thus not computed each time.
    computes: bool = field(init=False)
    of_stage: bool = field(init=False)
    transfers: bool = field(init=False)
    local: bool = field(init=False)
    communicates: bool = field(init=False)
    updates: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "computes", self.role is Role.COMPUTE)
        object.__setattr__(self, "of_stage", self.computes and self.acts is Acts.STAGE)
        object.__setattr__(self, "transfers", self.role in (Role.SEND, Role.RECEIVE))
        object.__setattr__(self, "local", self.role in (Role.COMPUTE, Role.COPY, Role.MEMORY))
        object.__setattr__(self, "communicates", self.transfers or self.role is Role.COLLECTIVE)
        object.__setattr__(self, "updates", self.role is Role.UPDATE)

    @property
    def drawn(self) -> bool:
        """Whether it stands in its rank's lane of a picture. The others run beside, from their token on."""
        return self.computes or (self.updates and not self.started)

    def __str__(self) -> str:
        return self.token

    def __repr__(self) -> str:
        return self.token
