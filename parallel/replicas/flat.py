"""Data parallelism over flat buckets, states spread as far as one likes: `ddp`, `zero1` and what is between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ...configs.reading.spread import SpreadDegrees
from ..comm.mesh import Mesh
from ..kernels.precision import precise
from ..pipeline.execute import Handler
from ..pipeline.kind import Kind
from ..pipeline.needs import Kinds
from ..pipeline.program import Op
from ..sharding_rules import ReplicaFamily, Sharding
from .bucket_guard import BucketGuard
from .buckets import Bucket, bucket_key, make_buckets
from .protocol import OptimizerShard, ShardSlice, SharedBucket, SharedCopies, adopt, partial_axes
from .spread import spread_axes


class FlatReplicas:
    """Replicas over flat buckets.

    Args:
        model: this rank's part of the model, parameters in the training precision.
        where: sharding of each parameter by name.
        mesh: the mesh.
        spreads: over how many ranks states are spread, of each family.
        bucket_mib: MiB of parameters per bucket.
        exact: gradient sums have the same bits at any size of data parallelism.
        stage_of: the (part-)stage of a layer's parameter by its name, −1 of others; for gradients that are spread.
        kept: what `keep` gave, of replicas with the same slices, whose memory these take over; none: new memory.
        masters: makes the memory of masters (elements, type), on the host; none: beside the parameters.

    Raises:
        OtherSlices: `kept` is of other ones.
    """

    def __init__(
        self,
        model: nn.Module,
        where: dict[str, Sharding],
        mesh: Mesh,
        *,
        spreads: Mapping[ReplicaFamily, SpreadDegrees],
        bucket_mib: float,
        exact: bool = False,
        stage_of: Callable[[str], int] = lambda name: -1,
        kept: Mapping[str, Tensor] | None = None,
        masters: Callable[[int, torch.dtype], Tensor] | None = None,
    ) -> None:
        self._allocate = masters
        params = [(name, param, where[name]) for name, param in model.named_parameters()]
        dtype = params[0][1].dtype if params else torch.float32  # a rank of empty stages has none
        self._precise = precise(dtype)
        self._buckets = make_buckets(
            params,
            axes={family: spread_axes(mesh, family, spread) for family, spread in spreads.items()},
            partial_axes=partial_axes(mesh),
            grad_dtype=self._precise,
            bucket_bytes=int(bucket_mib * 2**20),
            exact=exact,
            stage_of=stage_of,
            kept=kept,
        )
        self.buckets = len(self._buckets)
        self._summing: Bucket | None = None
        for bucket in self._buckets:
            bucket.before_reduction = self._take_turn
        self._masters: list[Tensor | None] = [None for _ in self._buckets]
        if dtype != self._precise:
            self._masters = [self._master(i, b, kept) for i, b in enumerate(self._buckets)]
        self._wait_before_use(model)
        self._stages: dict[int, list[Bucket]] = {}
        """Buckets whose parameters are spread, by their (part-)stage."""
        for bucket in self._buckets:
            if bucket.axes.params.size > 1:
                self._stages.setdefault(bucket.kind.stage, []).append(bucket)

    @property
    def handlers(self) -> dict[Kind, Handler]:
        """Of the operations by which the parameters of a stage come and go, for `execute`."""
        verbs: dict[Callable[[Bucket], None], tuple[Kind, Kind]] = {
            Bucket.collect: (Kinds.COLLECT_FORWARD, Kinds.COLLECT_BACKWARD),
            lambda bucket: bucket.params.have(): (Kinds.HAVE_FORWARD, Kinds.HAVE_BACKWARD),
            lambda bucket: bucket.params.drop(): (Kinds.DROP_FORWARD, Kinds.DROP_BACKWARD),
        }
        return {kind: partial(self._each, verb) for verb, kinds in verbs.items() for kind in kinds}

    def _each(self, verb: Callable[[Bucket], None], op: Op) -> None:
        for bucket in self._stages.get(op.stage, ()):
            verb(bucket)

    def _take_turn(self, bucket: Bucket) -> None:
        """Between the processes of a host a sum reads every rank's part into memory as large as the bucket, so there is
        one at a time: the one before has to be done. Its ranks have started it, or will without this one's help: they
        run the same program. That is not so for sums over the ends of a pipeline, so partial sums take no turns.

        Where gradients are spread there are no partial sums before the update, and buckets that wait to be sent would
        hold the memory that is to be saved."""
        spread, local = bucket.axes.grads.size > 1, bucket.data.local is not None and bucket.data.size > 1
        if not spread and (not local or bucket.partial_axis.size > 1):
            return
        before, self._summing = self._summing, bucket
        if before is not None:
            before.sums.settle()

    def _master(self, index: int, bucket: Bucket, kept: Mapping[str, Tensor] | None) -> Tensor:
        """A bucket's owned parameters in full precision."""
        if kept is not None:
            device = bucket.flat.device if self._allocate is None else torch.device("cpu")
            return adopt(kept, _master_key(index), bucket.owned.shape, self._precise, device)
        if self._allocate is None:
            return bucket.owned.to(self._precise)
        return self._allocate(bucket.owned.numel(), self._precise).copy_(bucket.owned)

    def _wait_before_use(self, model: nn.Module) -> None:
        """Each layer waits for the gathers of its own parameters, and only those."""
        bucket_of = {id(m.param): b for b in self._buckets for m in b.members}
        outside: dict[int, Bucket] = {}
        for part in model.children():
            if isinstance(part, nn.ModuleDict):
                for layer in part.values():
                    mine = {id(b): b for b in (bucket_of[id(p)] for p in layer.parameters())}
                    layer.register_forward_pre_hook(_waiter(list(mine.values())))
            else:
                outside |= {id(b): b for b in (bucket_of[id(p)] for p in part.parameters())}
        self._outside = list(outside.values())

    def start_step(self, microbatches: int) -> None:
        """Before the first forward of a step in which every parameter gets gradients of so many microbatches."""
        self._summing = None
        for bucket in self._buckets:
            bucket.start_step(microbatches)

    def begin_microbatch(self) -> None:
        """Call before a forward: what is read outside the layers must have been gathered."""
        for bucket in self._outside:
            bucket.wait_params()

    def reduce(self, bucket: int) -> None:
        self._buckets[bucket].reduce()

    def units(self, bucket: int) -> list[OptimizerShard]:
        b, master = self._buckets[bucket], self._masters[bucket]
        value, rounded = (b.owned, None) if master is None else (master, b.owned)
        return [OptimizerShard(bucket_key(bucket), value, b.owned_grad, rounded, b.kind.decay, b.counted)]

    def shared(self, bucket: int) -> SharedBucket:
        """How the ranks share a bucket."""
        return self._buckets[bucket].shared(bucket_key(bucket))

    def gather(self, bucket: int) -> None:
        self._buckets[bucket].gather()

    def copies(self) -> list[SharedCopies]:
        """What other ranks hold copies of: a bucket's replicas, and the ranks over which its gradients are partial."""
        return [each.copies() for each in self._buckets if each.data.size * each.partial_axis.size > 1]

    def guards(self) -> list[BucketGuard]:
        """Of all buckets, which tell them from now on what happens."""
        made = [BucketGuard(bucket) for bucket in self._buckets]
        for bucket, guard in zip(self._buckets, made, strict=True):
            bucket.events = guard
        return made

    def pieces(self) -> Iterator[ShardSlice]:
        for i, bucket in enumerate(self._buckets):
            for member, start, stop, at in bucket.owned_pieces():
                yield ShardSlice(member.name, member.sharding, start, stop, bucket_key(i), at)

    def load(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Sets parameters and masters from (name, value of this rank's slice)."""
        place = {m.name: (i, m) for i, b in enumerate(self._buckets) for m in b.members}
        for name, value in values:
            i, member = place[name]
            bucket, master = self._buckets[i], self._masters[i]
            bucket.put(member, value)
            if master is not None:
                low, high = max(member.start, bucket.start), min(member.stop, bucket.stop)
                if low < high:
                    flat = value.reshape(-1)[low - member.start : high - member.start]
                    master[low - bucket.start : high - bucket.start].copy_(flat)

    def sync_params(self) -> None:
        """Makes the parameters follow the units after these were loaded from outside."""
        for bucket, master in zip(self._buckets, self._masters, strict=True):
            if master is not None:
                bucket.owned.copy_(master)
            bucket.gather()
        self.wait_gathers()

    def wait_gathers(self) -> None:
        """Returns when no gather is in flight: a communicator must not be closed before."""
        for bucket in self._buckets:
            bucket.wait_params()

    def clear(self) -> None:
        """Drops a step's gradients and forgets what is in flight, after a step that was left half-way."""
        for bucket in self._buckets:
            bucket.clear()

    def close(self) -> None:
        """Nothing to do: what is in flight is waited for elsewhere."""

    def keep(self) -> dict[str, Tensor]:
        """The memory of parameters and masters, for replicas that take this one's place."""
        flats = {bucket_key(i): bucket.params.held for i, bucket in enumerate(self._buckets)}
        masters = {_master_key(i): master for i, master in enumerate(self._masters) if master is not None}
        return flats | masters


def _master_key(index: int) -> str:
    return f"{bucket_key(index)}.master"


def _waiter(buckets: list[Bucket]) -> Callable[..., None]:
    def wait(*_: object) -> None:
        for bucket in buckets:
            bucket.wait_params()
            bucket.params.have()

    return wait
