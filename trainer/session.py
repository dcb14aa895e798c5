"""One rank's session: its mesh, its part of the model, its optimizer and its program, from `open` to `close`.

This is the only way in which they come about: when a job starts, in tests and benchmarks, and again after a failure,
when the ranks that are left, or others in their place, meet in a new epoch:

    state = session.leave()                                  nothing of the old mesh is left
    session = Session.open(cfg, ranks, epoch + 1, here=here, state=state)

What cost something stays with the process and goes from one session to the next: parameters, masters and moments (the
same memory), the open data, the measured peak, the number of chunks that was searched.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..configs.errors import Problem, UserError
from ..configs.schema import Config
from ..parallel.comm.collectives import all_reduce
from ..parallel.comm.mesh import Mesh
from ..parallel.pipeline.program import Program
from ..parallel.record.files import RingFile
from ..parallel.record.ring import Recorder
from ..parallel.replicas.protocol import OtherSlices
from .data.dataset import Dataset
from .memory.copies import copies_of
from .memory.plan import decided
from .metrics.peak import Peak
from .metrics.rows import RowExchange
from .optim.places import StatePlace, make_place
from .optim.states import Optimizer, make_optimizer
from .overlap import ChunkSearch, OverlapTuner
from .pipeline.programs import offloads, training_program
from .pipeline.rates import agreed_rates
from .setup import KeptModel, Parts, buckets_per_rank, degrees_of, make_model, mesh_of
from .step import Stepper

MakeStepper = Callable[[Config, Parts, Optimizer, Mesh, Program], Stepper]


@dataclass(frozen=True)
class Here:
    """What a process brings to every session.

    Args:
        rank: its number in the job.
        store: where the ranks of the job meet; each epoch uses keys of its own. None: it is alone.
        device: of its part of the model.
        recorder: its record.
        node: where it is, for copies of its state on other nodes; empty: there are none.
    """

    rank: int
    store: dist.Store | None
    device: torch.device
    recorder: Recorder
    node: str = ""


class Restore(Protocol):
    """Brings ranks of which some come anew to the state of one step; all call both, in this order."""

    def meet(self, mesh: Mesh, peak: Peak | None, search: ChunkSearch | None) -> tuple[Peak | None, ChunkSearch | None]:
        """What all ranks have of these, given what this one has."""
        ...

    def fill(self, stepper: Stepper) -> None:
        """Fills this rank's state, all of it but what follows from the rest."""
        ...


@dataclass(frozen=True)
class SessionState:
    """What a session leaves to the next one of the same process. Its tensors change as soon as that one trains."""

    model: KeptModel
    moments: dict[str, dict[str, Tensor]]
    place: StatePlace | None
    """Where masters and moments lie, if not on the device."""
    updates: Tensor
    search: ChunkSearch | None
    data: Dataset | None
    peak: Peak | None


class Session:
    """What a rank has while its mesh stands.

    Args:
        cfg: the job.
        ranks: the rank in each slot of the mesh.
        mesh, parts, stepper: of this rank.
        data: opened, where the job reads some.
        peak: of one device, where somebody wants it.
        search: for the number of chunks, begun in a session before.
        place: of masters and moments.
        closing: closes what is open.
    """

    def __init__(
        self,
        cfg: Config,
        ranks: tuple[int, ...],
        mesh: Mesh,
        parts: Parts,
        stepper: Stepper,
        *,
        data: Dataset | None,
        peak: Peak | None,
        search: ChunkSearch | None,
        place: _HeldPlace,
        closing: ExitStack,
    ) -> None:
        self.cfg, self.ranks, self.mesh, self.parts, self.stepper = cfg, ranks, mesh, parts, stepper
        self.optimizer, self.program, self.device = stepper.optimizer, stepper.program, parts.device
        self.data, self.peak = data, peak
        self.overlap = OverlapTuner(cfg, parts, mesh, search)
        self._place, self._closing = place, closing

    @staticmethod
    def open(
        cfg: Config,
        ranks: Sequence[int],
        epoch: int,
        *,
        here: Here,
        state: SessionState | None = None,
        trains: bool = True,
        met: Callable[[Mesh], object] | None = None,
        data: Callable[[], Dataset] | None = None,
        peak: Callable[[Mesh], Peak] | None = None,
        stepper: MakeStepper = Stepper,
        restore: Restore | None = None,
        outer: ExitStack | None = None,
    ) -> Session:
        """Meets the other ranks and makes this one ready to train. All call it with the same arguments but `here`,
        `state` and what is called.

        Args:
            cfg: the job.
            ranks: the rank in each slot of the mesh; the slots' order is that of `parallel.comm.mesh`.
            epoch: how many meshes the job had before.
            here: this process.
            state: of the session before, whose memory this one takes over. Without it parameters are drawn.
            trains: whether the optimizer gets states.
            met: called when the ranks have met, before anything is built.
            data, peak: make them, where `state` brings none.
            stepper: makes the stepper, of the job's program.
            restore: brings all ranks to the state of one step. With it some ranks may come without a `state`: nothing
                is drawn for them.
            outer: closes the session if opening it fails, in its own time; without it that is done at once.

        Raises:
            UserError: the job cannot be built, or some rank's slices of the model are not those of its `state`.
        """
        cfg, slots = decided(cfg), tuple(ranks)
        closing = ExitStack()
        if outer is not None:
            outer.push(closing)
        try:
            place = _HeldPlace(make_place(cfg, here.device, first=here.rank == 0) if state is None else state.place)
            closing.callback(place.close)
            mesh = _meet(cfg, slots, epoch, here, closing)
            if met is not None:
                met(mesh)
            opened = _data(mesh, state, data)
            measured, search = _known(mesh, state, restore)
            if measured is None and peak is not None:
                measured = peak(mesh)
            parts = _model(cfg, mesh, here.device, state, place.held, joins=restore is not None)
            made = _stepper(cfg, parts, mesh, state, place.held, stepper, trains=trains, peak=measured)
            closing.push(_Leaving(mesh, parts, made))
            _go_on(made, state, restore)
            return Session(
                cfg, slots, mesh, parts, made, data=opened, peak=measured, search=search, place=place, closing=closing
            )
        except BaseException:
            if outer is None:
                closing.close()
            raise

    def leave(self) -> SessionState:
        """Closes the session and hands on what the next one can take over.

        Raises:
            RuntimeError: a step was left half-way and not reset.
        """
        if self.stepper.half_way:
            raise RuntimeError("a step was left half-way: reset it, then leave the session")
        if not self.stepper.spent:
            self.parts.replicas.wait_gathers()
        state = SessionState(
            KeptModel.of(self.parts),
            self.optimizer.states,
            self._place.hand_on(),
            self.stepper.updates,
            self.overlap.search,
            self.data,
            self.peak,
        )
        self.close()
        return state

    def close(self) -> None:
        """Ends it; no thread, group, descriptor or shared memory of it is left. Nothing happens the second time.

        FSDP2's modules keep groups of their own: these end with the last reference to the model.
        """
        self._closing.close()
        for part in ("mesh", "parts", "stepper", "optimizer", "overlap"):
            vars(self).pop(part, None)
        gc.collect()  # torch's groups hang in cycles


class _HeldPlace:
    """The place of masters and moments, which is given back with a session that does not hand it on."""

    def __init__(self, held: StatePlace | None) -> None:
        self.held = held

    def hand_on(self) -> StatePlace | None:
        """The place, for the next session."""
        held, self.held = self.held, None
        return held

    def close(self) -> None:
        """Gives it back, if it is still here."""
        if self.held is not None:
            self.held.close()
            self.held = None


class _Leaving:
    """The way out of a session, as of a `with`: in good order, or in the middle of something."""

    def __init__(self, mesh: Mesh, parts: Parts, stepper: Stepper) -> None:
        self._mesh, self._parts, self._stepper = mesh, parts, stepper

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self._stepper.half_way and not self._stepper.spent:
            self._parts.replicas.wait_gathers()
        else:
            # The others will not do their part of what is in flight: whoever waits for it here is to give up.
            self._mesh.abort.trigger("the session was closed in the middle of a step")
        self._stepper.close()
        self._parts.replicas.close()


def _meet(cfg: Config, slots: tuple[int, ...], epoch: int, here: Here, closing: ExitStack) -> Mesh:
    if here.rank not in slots:
        raise ValueError(f"rank {here.rank} has no slot in the mesh of the ranks {slots}")
    world = degrees_of(cfg).world
    if world != len(slots):
        raise ValueError(f"the layout has {world} slots, and there are {len(slots)} ranks")
    here.recorder.epoch = epoch
    mesh = mesh_of(
        cfg,
        store=here.store if len(slots) > 1 else None,
        rank=slots.index(here.rank),
        device=here.device.type,
        recorder=here.recorder,
        epoch=epoch,
        node=here.node,
    )
    closing.callback(mesh.close)
    return mesh


def _model(
    cfg: Config, mesh: Mesh, device: torch.device, state: SessionState | None, place: StatePlace | None, *, joins: bool
) -> Parts:
    """This rank's part of the model, if the ranks' states, or that there are none, fit together."""
    parts, wrong = None, ""
    try:
        parts = make_model(cfg, mesh, device, state.model if state is not None else None, place, draws=not joins)
    except OtherSlices as error:
        wrong = str(error)
    mine = torch.tensor([state is not None, bool(wrong)], dtype=torch.float64, device=device)
    having, differing = (int(each) for each in all_reduce(mine, mesh.axis("world")).wait().tolist())
    world = mesh.degrees.world
    if parts is not None and (joins or having in (0, world)) and not differing:
        return parts
    wrong = wrong or ("" if state is not None else "it has none")
    raise UserError(
        Problem(
            "parallel",
            f"{having - differing} of {world} ranks hold the slices of the model that the layout gives them now"
            f"{f'; rank {mesh.rank} does not: {wrong}' if wrong else ''}; go through a checkpoint: set "
            "checkpoint.resume=latest",
        )
    )


def _data(mesh: Mesh, state: SessionState | None, make: Callable[[], Dataset] | None) -> Dataset | None:
    """The data of the session before, or newly opened."""
    if state is not None and state.data is not None:
        return state.data
    return None if make is None else mesh.abort.beside("opening the data", make)


def _known(mesh: Mesh, state: SessionState | None, restore: Restore | None) -> tuple[Peak | None, ChunkSearch | None]:
    """What was measured and searched in sessions before, the same on all ranks."""
    mine = (state.peak, state.search) if state is not None else (None, None)
    return mine if restore is None else restore.meet(mesh, *mine)


def _go_on(stepper: Stepper, state: SessionState | None, restore: Restore | None) -> None:
    """What the ranks do together with the states that they bring."""
    if state is None and restore is None:
        return
    stepper.optimizer.agree()
    if restore is not None:
        restore.fill(stepper)
    stepper.replicas.sync_params()


def _stepper(
    cfg: Config,
    parts: Parts,
    mesh: Mesh,
    state: SessionState | None,
    place: StatePlace | None,
    make: MakeStepper,
    *,
    trains: bool,
    peak: Peak | None,
) -> Stepper:
    fixed = cfg.train.deterministic is not False
    optimizer = make_optimizer(
        cfg.optim, parts.device, place, cfg.memory, mesh=mesh, fixed=fixed, replicas=parts.replicas
    )
    if state is not None:
        optimizer.states = state.moments
    replicas = parts.replicas
    for bucket in range(replicas.buckets) if trains else ():
        for unit in replicas.units(bucket):
            optimizer.prepare(unit, replicas.shared(bucket))
    microbatches = cfg.train.global_batch // (cfg.train.micro_batch * mesh.axis("dp").size)
    copies = None
    if offloads(cfg):
        copies = copies_of(cfg, parts.pipeline, agreed_rates(cfg, mesh, parts.device, peak))
    program = training_program(cfg, parts.pipeline, microbatches, buckets_per_rank(parts.replicas, mesh), copies)
    made = make(cfg, parts, optimizer, mesh, program)
    if state is not None:
        made.updates = state.updates
    return made


def row_exchange(session: Session, rings: Sequence[RingFile] = (), store: dist.Store | None = None) -> RowExchange:
    """What brings the session's rows of parts to its first rank, by way of the ranks' rings and the job's store."""
    mesh = session.mesh
    return RowExchange(
        mesh.recorder,
        mesh.rank,
        mesh.degrees.world,
        session.stepper.ops,
        pipelined=mesh.degrees.pp > 1,
        epoch=mesh.epoch,
        rings=rings,
        store=store,
    )
