"""The mesh: which ranks stand together along which axis.

Two factorisations of the same ranks share only the pipeline axis, which is the slowest in both:

    dense   pp · dp  · cp · tp          tp = tp_shard · tp_replica (a key-value head may need several ranks)
    expert  pp · edp · ep · etp         (parallel folding, arXiv 2504.14960)

Nobody asks torch for a rank or keeps a group: everything goes through a `Mesh`, which is made from an epoch, the
ranks in their slots and a store, and can be made again from others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import count
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ...configs.errors import UserError
from ..record import kinds
from ..record.ring import Recorder
from ..record.stand import axis_members
from .axis import Axis, Communicator
from .gloo_sockets import GlooSockets
from .host_tree import HostTree, Merge, joined, wait_blocking
from .shared_memory import LocalAxis
from .shared_memory_connect import connect as connect_memories
from .waiting import Abort

T = TypeVar("T")
TOLD = "the job ends, and the verdict says why"
"""The reason of an abort that the watcher asked for."""
DENSE_AXES = ("pp", "dp", "cp", "tp_shard", "tp_replica")
EXPERT_AXES = ("pp", "edp", "ep", "etp")


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """Sizes of the axes. `tp_replica` is the number of ranks that hold the same key-value heads."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1
    tp_replica: int = 1

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def dense(self) -> tuple[int, ...]:
        """Sizes in the order of DENSE_AXES."""
        return (self.pp, self.dp, self.cp, self.tp // self.tp_replica, self.tp_replica)

    @property
    def expert(self) -> tuple[int, ...]:
        """Sizes in the order of EXPERT_AXES.

        Raises:
            UserError: ep · etp does not divide the ranks of a pipeline stage.
        """
        stage = self.world // self.pp
        if stage % (self.ep * self.etp):
            raise UserError(f"parallel.ep·etp={self.ep * self.etp} must divide tp·cp·dp={stage}; set parallel.ep")
        return (self.pp, stage // (self.ep * self.etp), self.ep, self.etp)


class Mesh:
    """All axes of one rank in one epoch.

    Args:
        degrees: sizes of the axes.
        store: where the ranks of the job meet; each epoch uses keys under its own prefix.
        rank: this process's slot, 0 ≤ rank < degrees.world.
        device: device type, "cpu" (gloo) or "cuda" (NCCL).
        epoch: how many times the mesh has been rebuilt.
        recorder: the rank's record.
        timeout_s: seconds a collective may wait.
        channels: (source, destination) ranks of the pipeline axis between which `channel` is wanted.
        vocab: whether the axes of the balanced vocabulary are wanted.
        context: how many neighbouring ranks of cp make up each line of the axis cp_inner; cp_outer joins the lines.
        ends: the ranks of the pipeline axis with the first and the last stage, where the axis "ends" is wanted.
        lines: other axes that are wanted: their lines of ranks, disjoint and ascending, by name.
        node: where this rank is, if somebody wants to know; where there are several nodes, the axis "backup" is made.
        local_saves: whether `local_saves_group` is wanted.
    """

    def __init__(
        self,
        degrees: Degrees,
        *,
        store: dist.Store | None,
        rank: int,
        device: str,
        recorder: Recorder,
        epoch: int = 0,
        timeout_s: float = 600.0,
        channels: Sequence[tuple[int, int]] = (),
        vocab: bool = False,
        context: int = 1,
        ends: tuple[int, int] | None = None,
        lines: Mapping[str, Sequence[tuple[int, ...]]] | None = None,
        node: str = "",
        local_saves: bool = False,
    ) -> None:
        self.degrees, self.rank, self.epoch, self.device, self.recorder = degrees, rank, epoch, device, recorder
        self.abort = Abort(timeout_s)
        self._meetings = count()
        self._cuda = torch.cuda.current_device() if device == "cuda" else 0
        self._axes: dict[str, Axis] = {}
        self._device_meshes: dict[str, DeviceMesh] = {}
        self.host_group: HostTree | None = None
        self.checkpoint_group: HostTree | None = None
        """Saving runs in a thread beside the step, so it has a communicator to itself. None for one rank."""
        self.local_saves_group: HostTree | None = None
        """The same for each node's own saves, which may be under way at the same time."""
        self.nodes: tuple[str, ...] = ()
        """Where each rank is, if asked."""
        self.apart = ""
        """Why CPU ranks cannot read each other's memory and communicate over gloo; empty: they can, or need not."""
        if degrees.world == 1:
            return
        if store is None:
            raise ValueError("a mesh of several ranks needs a store")
        self._gloo = GlooSockets()
        recorder.vitals.listen(epoch, partial(self.abort.trigger, TOLD), self._let_go)
        made = partial(self._make, store, channels, vocab, context, ends, lines or {}, node, local_saves)
        # torch waits for the other ranks in there, and nobody can wake it.
        self.abort.beside("setting up the mesh", made)

    def _make(
        self,
        store: dist.Store,
        channels: Sequence[tuple[int, int]],
        vocab: bool,
        context: int,
        ends: tuple[int, int] | None,
        wanted: Mapping[str, Sequence[tuple[int, ...]]],
        node: str,
        local_saves: bool,
    ) -> None:
        """Meets the other ranks; arguments as of the mesh."""
        degrees, device = self.degrees, self.device
        if device == "cuda":
            torch.cuda.set_device(self._cuda)
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            store=dist.PrefixStore(f"mesh-{self.epoch}", store),
            rank=self.rank,
            world_size=degrees.world,
            timeout=timedelta(seconds=self.abort.timeout_s),
            device_id=torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else None,
        )
        # Host-side agreement (checkpoints, Python objects) never shares a communicator with the step.
        self.host_group = self._host_group("host", store)
        self.checkpoint_group = self._host_group("checkpoint", store)
        self._make_axes()
        if degrees.pp > 1:
            self._make_channels(channels)
        if degrees.cp > 1:
            self._make_context_axes(context)
        if vocab:
            self._make_vocab_axes()
        if ends is not None and ends[0] != ends[1]:
            lines = [(line[min(ends)], line[max(ends)]) for line in self._pipelines()]
            self._axes["ends"] = self._cut("ends", lines)
        for name, each in wanted.items():
            self._axes[name] = self._cut(name, each)
        if local_saves:
            self.local_saves_group = self._host_group("local saves", store)
        if node:
            self._find_nodes(node)
        if device == "cpu":
            self._connect_memories(dist.PrefixStore(f"memory-{self.epoch}", store))
        # Nobody starts, and nobody can leave, before everybody is connected.
        self.host_group.talk(True, all, wait_blocking)
        self.recorder.intern(axis_members("host", range(degrees.world)))
        self._gloo.made()

    def barrier(self) -> None:
        """Returns when all ranks are here.

        Raises:
            Aborted, Overdue: see `Abort.wait`.
        """
        self._talk(True, all)

    def gather_objects(self, mine: T) -> list[T]:
        """Every rank's object, by rank; small ones, for what they take grows with the world.

        Raises:
            Aborted, Overdue: see `Abort.wait`.
        """
        return self._talk([mine], joined)

    def gather_on_first(self, mine: T) -> list[T]:
        """Every rank's object, by rank, on the first one; elsewhere nothing. Errors as of `gather_objects`."""
        return self._talk([mine], joined, lambda _: [])

    def _talk(self, mine: T, merge: Merge[T], heard: Callable[[T], T] | None = None) -> T:
        group = self.host_group
        if group is None:
            return mine
        code, kind = self.recorder.intern("host"), self.recorder.intern(kinds.BARRIER)
        ticket = self.recorder.enter(kind, axis=code, seq=next(self._meetings))
        self.recorder.waits(ticket)
        found = self.abort.beside("the other ranks", lambda: group.talk(mine, merge, wait_blocking, heard))
        self.recorder.exit(ticket)
        return found

    def _let_go(self) -> None:
        """After an abort: frees the threads that wait inside torch, which nobody can wake."""
        if self.device == "cuda":
            dist.distributed_c10d._abort_process_group()
        self._gloo.cut()

    def _make_axes(self) -> None:
        """Creates the communicators of the two factorisations, in one fixed order on all ranks."""
        dense = init_device_mesh(self.device, self.degrees.dense, mesh_dim_names=DENSE_AXES)
        for name in DENSE_AXES:
            self._add(name, dense[name])
        self._add("tp", dense["tp_shard", "tp_replica"]._flatten("tp"))
        self._add("data", dense["dp", "cp"]._flatten("data"))
        self._add("tokens", dense["cp", "tp_shard", "tp_replica"]._flatten("tokens"))
        expert = init_device_mesh(self.device, self.degrees.expert, mesh_dim_names=EXPERT_AXES)
        for name in EXPERT_AXES[1:]:
            self._add(name, expert[name])
        world = tuple(range(self.degrees.world))
        self._axes["world"] = self._axis("world", world, dist.group.WORLD)

    def _pipelines(self) -> list[tuple[int, ...]]:
        """The ranks of every pipeline axis of the job."""
        stage = self.degrees.world // self.degrees.pp
        return [tuple(range(first, self.degrees.world, stage)) for first in range(stage)]

    def _make_channels(self, channels: Sequence[tuple[int, int]]) -> None:
        """One communicator per directed channel, so that no transfer ever waits behind one the other way.

        gloo matches transfers by source, destination and order, so all its channels share the pipeline's group.
        """
        for source, to in sorted(set(channels)):
            name = f"channel {source}>{to}"
            lines = [(line[source], line[to]) for line in self._pipelines()]
            if self.device == "cuda":
                axis = self._cut(name, lines)
                _connect(axis)
            else:
                mine = next((line for line in lines if self.rank in line), ())
                axis = self._axis(name, mine, self._axes["pp"].group) if mine else Axis.single(name)
            self._axes[name] = axis

    def _make_context_axes(self, inner: int) -> None:
        """cp cut in two directions, each with a communicator more for what travels against the stream."""
        cp, tp = self.degrees.cp, self.degrees.tp
        firsts = [first + shard for first in range(0, self.degrees.world, cp * tp) for shard in range(tp)]
        ring = [tuple(first + tp * i for i in range(cp)) for first in firsts]
        for name in ("cp_back", "cp_scan"):
            self._axes[name] = self._cut(name, ring)
        if inner > 1:
            self._axes["cp_inner"] = self._cut(
                "cp_inner", [line[i : i + inner] for line in ring for i in range(0, cp, inner)]
            )
        outer = [line[i::inner] for line in ring for i in range(inner)]
        for name in ("cp_outer", "cp_outer_back"):
            self._axes[name] = self._cut(name, outer)

    def _make_vocab_axes(self) -> None:
        """The ranks of tp x pp of each replica, twice: embedding and head communicate in lanes of their own."""
        degrees, stage = self.degrees, self.degrees.world // self.degrees.pp
        replicas = range(0, stage, degrees.tp)
        # Pipeline-major: index on the axis = pipeline rank · tp + tensor rank.
        lines = [
            tuple(pp * stage + first + tp for pp in range(degrees.pp) for tp in range(degrees.tp)) for first in replicas
        ]
        for name in ("vocab_embed", "vocab_head"):
            # A lane stamps the context of its own jobs, which lags behind the step's.
            self._axes[name] = self._cut(name, lines, urgent=True, recorder=self.recorder.fork())

    def _host_group(self, name: str, store: dist.Store) -> HostTree:
        keys, timeout = dist.PrefixStore(f"{name}-{self.epoch}", store), timedelta(seconds=self.abort.timeout_s)
        return HostTree.connect(self.rank, self.degrees.world, keys, timeout)

    def _find_nodes(self, node: str) -> None:
        """Tells where this rank is; between several nodes copies travel beside all else."""
        assert self.host_group is not None
        self.nodes = tuple(self.host_group.talk([node], joined, wait_blocking))
        if len(set(self.nodes)) > 1:
            everybody = tuple(range(self.degrees.world))
            self._axes["backup"] = self._cut("backup", [everybody], recorder=self.recorder.fork())

    def _connect_memories(self, store: dist.Store) -> None:
        local = {
            name: LocalAxis(name, axis.rank, axis.ranks, self.abort)
            for name, axis in self._axes.items()
            if axis.size > 1
        }
        self.apart = connect_memories(local, self.rank, self.degrees.world, store)
        if not self.apart:
            self._axes = {name: replace(axis, local=local.get(name)) for name, axis in self._axes.items()}

    def _cut(
        self,
        name: str,
        lines: Sequence[tuple[int, ...]],
        *,
        urgent: bool = False,
        recorder: Recorder | None = None,
    ) -> Axis:
        """An axis whose lines are `lines`, disjoint (ascending for collectives); of size 1 on the ranks of no line."""
        mine = next((line for line in lines if self.rank in line), None)
        group = None
        if len(lines[0]) > 1:
            if self.device == "cuda":
                options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True) if urgent else None
                # One call for all lines: calls would otherwise grow with the size of the job.
                split = [list(line) for line in lines]
                group = dist.split_group(split_ranks=split, pg_options=options, group_desc=name)
            else:
                groups = [dist.new_group(list(line), group_desc=name) for line in lines]
                group = next((own for own in groups if isinstance(own, dist.ProcessGroup)), None)
        return self._axis(name, mine, group, recorder) if mine is not None else Axis.single(name)

    def _add(self, name: str, mesh: DeviceMesh) -> None:
        ranks = tuple(int(r) for r in mesh.mesh.flatten())
        group = mesh.get_group() if len(ranks) > 1 else None
        self._axes[name] = self._axis(name, ranks, group)
        self._device_meshes[name] = mesh

    def _axis(
        self, name: str, ranks: tuple[int, ...], group: dist.ProcessGroup | None, recorder: Recorder | None = None
    ) -> Axis:
        code = self.recorder.intern(name)
        self.recorder.intern(axis_members(name, ranks))
        recorder, link = recorder or self.recorder, Communicator(group) if group is not None else None
        return Axis(name, ranks.index(self.rank), len(ranks), ranks, link, recorder, self.abort, code)

    def axis(self, name: str) -> Axis:
        """The axis called `name`.

        Of every mesh: pp, dp, cp, tp, tp_shard, tp_replica, data (dp · cp), tokens (cp · tp), edp, ep, etp, world; with
        context parallelism cp_back, cp_scan, cp_inner, cp_outer, cp_outer_back. Where asked for:
        vocab_head and vocab_embed (pp · tp, in this order), ends (the ranks of the first and the last stage, of size 1
        on all others) and backup (all ranks, if there are several nodes).
        """
        return self._axes.get(name) or Axis.single(name)

    def channel(self, source: int, to: int) -> Axis:
        """The way from one rank of the pipeline axis to another: index 0 sends, index 1 receives.

        Raises:
            KeyError: this channel was not asked for.
        """
        return self._axes[f"channel {source}>{to}"]

    def device_mesh(self, name: str) -> DeviceMesh:
        """torch's view of one axis, for the torch parts that need one (FSDP2)."""
        return self._device_meshes[name]

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def close(self) -> None:
        """Gives the communicators up. A mesh of a later epoch can be made afterwards."""
        self.recorder.vitals.deafen()
        if self.abort.reason is not None and self.degrees.world > 1:
            # What is still under way must not arrive any more, in memory that the next mesh works with.
            self._gloo.cut()
        for axis in self._axes.values():
            if axis.local is not None:
                axis.local.close()
            for waiter in axis.waiters.values():
                waiter.close()
            if axis.link is not None:
                axis.link.cut()
        self.host_group = self.checkpoint_group = self.local_saves_group = None
        if dist.is_initialized():
            dist.destroy_process_group()
        self._axes.clear()
        self._device_meshes.clear()


def _connect(channel: Axis) -> None:
    """NCCL connects two ranks in their first transfer, and both hosts wait for it: never inside a step."""
    if channel.size == 2:
        token = torch.zeros(1, device="cuda")
        transfer = dist.isend if channel.rank == 0 else dist.irecv
        work = transfer(token, channel.ranks[1 - channel.rank], group=channel.group)
        if work is not None:
            work.wait()
        torch.cuda.synchronize()
