"""Masters and moments off the device, updated in subgroups (Maurya et al., "Deep Optimizer States", 2024).

A unit's elements are cut into subgroups of a set size. Most are updated by the host, in place; every k-th goes to the
device and back, while the host works on the next ones (k: `stride.py`):

    to the host     │ grad 0 │ grad 1 │        │ states 2 │ grad 3 …
    host            │        │ update 0 │ update 1 │          │ update 3
    device          │                   │ update 2 │
    to the device   │ states 2 │ param 0 │ param 1 │           │ param 3

Copies run on two lanes, one for each direction. On a CPU the same path copies from host to host. Updates are
elementwise and subgroups begin at multiples of whole vectors, so that it does not matter to any bit how a unit is cut.

A wait for a copy is ended by the copy, or by an error of it, and not by the mesh's abort: a step that has committed
ends its updates. One that broke off inside a unit goes on behind the last subgroup that was updated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...configs.schema import MemoryConfig
from ...parallel.checksum import ParameterMemory
from ...parallel.comm.host_memory import HostMemory
from ...parallel.comm.lane import Lane, Pending
from ...parallel.record.ring import Recorder
from ...parallel.replicas.protocol import OptimizerShard, ShardSlice, SharedBucket
from .optimizer import Rule, UpdatePiece, UpdateScalars
from .places import Fetched, StatePlace
from .plain import PlainStates
from .stride import StrideTuner, on_device

_VECTOR = 4096
"""Elements of which every subgroup begins at a multiple: pages of a file, and whole vectors of the kernels."""
_SLOTS = 2
"""Subgroups of either kind that are under way at once."""


@dataclass(frozen=True)
class Subgroup:
    """Elements [start, stop) of a unit; `number` counts over all units."""

    number: int
    key: str
    start: int
    stop: int


@dataclass
class _Slot:
    """Memory for one subgroup under way, and the copy that was the last to use it."""

    busy: Pending[None] | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, HostMemory] = field(default_factory=dict)

    def take(self, name: str, count: int, like: Tensor, device: torch.device | None = None) -> Tensor:
        """(count,) elements of `like`'s type, the same memory every time, grown where it is too small.

        Args:
            device: where; none: on the host, pinned if `like` is on a GPU.
        """
        held = self.tensors.get(name)
        if held is None or held.numel() < count or held.dtype != like.dtype:
            if device is None:
                self._give_back(name)
                memory = self.memory[name] = HostMemory(count * like.element_size(), pinned=like.is_cuda)
                held = memory.tensor.view(like.dtype)
            else:
                held = torch.empty(count, dtype=like.dtype, device=device)
            self.tensors[name] = held
        return held[:count]

    def _give_back(self, name: str) -> None:
        memory = self.memory.pop(name, None)
        if memory is not None:
            memory.close()

    def close(self) -> None:
        """Gives the memory back."""
        for name in list(self.memory):
            self._give_back(name)
        self.tensors.clear()

    def free(self) -> None:
        """Returns when the last copy has ended."""
        if self.busy is not None:
            self.busy.landed()
            self.busy = None


class OffloadedStates(PlainStates):
    """An `Optimizer` with states, and masters, in another place.

    Args:
        rule, on_host: what it computes, on the device and on the host.
        place: of the states.
        device: of gradients and parameters.
        memory: size of the subgroups and stride.
        fixed: stride `auto` is 1, so that all is computed on the device.
        recorder: of the waits.
    """

    def __init__(
        self,
        rule: Rule,
        on_host: Rule,
        place: StatePlace,
        device: torch.device,
        memory: MemoryConfig,
        *,
        fixed: bool,
        recorder: Recorder | None,
    ) -> None:
        super().__init__()
        self._rule, self._host_rule, self._place, self._device = rule, on_host, place, device
        self._out, self._back = (
            Lane(f"states {way}", device, recorder=recorder) for way in ("to the host", "to the device")
        )
        self._bytes = int(memory.optimizer_subgroup_mib * 2**20)
        wanted = memory.optimizer_stride if place.direct else 0
        self._stride = 1 if wanted == "auto" and fixed else wanted
        self._tuner: StrideTuner | None = None
        self._groups: dict[str, list[Subgroup]] = {}
        self._order: list[Subgroup] = []
        self._masters: dict[str, Tensor] = {}
        self._ahead: tuple[int, Fetched] | None = None
        """The number of a subgroup whose runs are on their way already."""
        self._count = 0
        self._device_slots = [_Slot() for _ in range(_SLOTS)]
        self._host_slots = [_Slot() for _ in range(_SLOTS)]
        self._begun = {"device": 0, "host": 0}
        self._done: set[int] = set()
        """Subgroups that this step has updated already."""
        self._host_seconds, self._started = 0.0, 0.0

    # States ---------------------------------------------------------------------------------------------------

    def prepare(self, unit: OptimizerShard, bucket: SharedBucket | None) -> None:
        size, precise = unit.value.numel(), unit.value.dtype
        dtype = self._rule.dtype or precise
        if unit.key not in self.states:
            self.states[unit.key] = {name: self._place.allocate(size, dtype) for name in self._host_rule.names}
        each = dtype.itemsize * len(self._rule.names) + precise.itemsize * (unit.rounded is not None)
        step = max(_VECTOR, self._bytes // max(each, 1) // _VECTOR * _VECTOR)
        starts = range(0, size, step)
        self._groups[unit.key] = [
            Subgroup(self._count + i, unit.key, start, min(start + step, size)) for i, start in enumerate(starts)
        ]
        self._count += len(starts)
        if unit.rounded is not None:
            self._masters[unit.key] = unit.value
        for group in self._groups[unit.key]:
            self._order.append(group)
            self._place.reserve([run.numel() * run.element_size() for run in self._runs(group).values()])

    def resting(self, units: Mapping[str, OptimizerShard], slices: Sequence[ShardSlice]) -> list[ParameterMemory]:
        return super().resting(units, slices) if self._place.direct else []

    def settle(self) -> None:
        for slot in (*self._device_slots, *self._host_slots):
            slot.free()
        for slot in self._device_slots:
            slot.tensors.clear()  # between updates the device has a better use for it
        self._place.settle()
        if self._done:
            self._measure()
        self._done.clear()
        self._ahead = None

    def close(self) -> None:
        self._out.close()
        self._back.close()
        for slot in (*self._device_slots, *self._host_slots):
            slot.close()

    # A step ---------------------------------------------------------------------------------------------------

    def step(self, units: Sequence[OptimizerShard], now: UpdateScalars, *, alone: bool = False) -> None:
        if not self._done:
            self._started, self._host_seconds = time.monotonic(), 0.0
        stride = self._chosen(units)
        jobs = [(unit, group) for unit in units for group in self._groups[unit.key] if group.number not in self._done]
        ways = [self._on_device if on_device(group.number, stride) else self._on_host for _, group in jobs]
        scalars = now.on_host() if self._on_host in ways else now
        finish = None
        for i, (unit, group) in enumerate(jobs):
            finish = finish or ways[i](unit, group)
            # The next subgroup comes while this one is updated.
            then = ways[i + 1](*jobs[i + 1]) if i + 1 < len(jobs) else None
            finish(scalars if ways[i] == self._on_host else now)
            self._done.add(group.number)
            finish = then
        if jobs and jobs[-1][1].number + 1 < len(self._order) and not self._place.direct:
            # The first one of the next bucket comes while this bucket's parameters are handed out.
            following = self._order[jobs[-1][1].number + 1]
            self._ahead = following.number, self._place.fetch(list(self._runs(following).values()))
        for slot in self._host_slots:
            if slot.busy is not None:
                slot.busy.wait()

    def _fetched(self, group: Subgroup) -> Fetched:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == group.number:
            return ahead[1]
        return self._place.fetch(list(self._runs(group).values()))

    def _chosen(self, units: Sequence[OptimizerShard]) -> int:
        if isinstance(self._stride, int):
            return self._stride
        if self._tuner is None:
            self._tuner = self._calibrated(units)
        return self._tuner.stride

    def _slot(self, kind: str) -> _Slot:
        slots = self._device_slots if kind == "device" else self._host_slots
        slot = slots[self._begun[kind] % _SLOTS]
        self._begun[kind] += 1
        slot.free()
        return slot

    def _runs(self, group: Subgroup) -> dict[str, Tensor]:
        """What of a subgroup lies in the place: its states, and the masters where there are some."""
        master = self._masters.get(group.key)
        tensors = {**self.states.get(group.key, {}), **({} if master is None else {"value": master})}
        return {name: tensor[group.start : group.stop] for name, tensor in tensors.items()}

    def _on_host(self, unit: OptimizerShard, group: Subgroup) -> Callable[[UpdateScalars], None]:
        """Starts to bring what the host needs; the function updates it there."""
        runs, slot = self._runs(group), self._slot("host")
        fetched = self._fetched(group)
        part, count = slice(group.start, group.stop), group.stop - group.start
        brought = {"grad": unit.grad[part]} | ({} if "value" in runs else {"value": unit.value[part]})
        held = {name: slot.take(name, count, tensor) for name, tensor in brought.items()}
        copied = self._out.submit(lambda: _copy(held, brought))

        def finish(now: UpdateScalars) -> None:
            there = held | dict(zip(runs, fetched.wait(), strict=True))
            copied.landed()
            begun = time.monotonic()
            states = {name: there[name] for name in self._host_rule.names}
            self._host_rule.update([UpdatePiece(there["value"], there["grad"], states, unit.decay)], now)
            source, target = there["value"], unit.value[part]
            if unit.rounded is not None:
                target = unit.rounded[part]
                source = slot.take("rounded", count, target).copy_(source)
            self._host_seconds += time.monotonic() - begun
            slot.busy = self._back.submit(lambda: _copy({"": target}, {"": source}))
            fetched.store()

        return finish

    def _on_device(self, unit: OptimizerShard, group: Subgroup) -> Callable[[UpdateScalars], None]:
        """Starts to bring what the device needs; the function updates it there and starts it back."""
        runs, slot = self._runs(group), self._slot("device")
        part, count = slice(group.start, group.stop), group.stop - group.start
        held = {name: slot.take(name, count, run, self._device) for name, run in runs.items()}
        copied = self._back.submit(lambda: _copy(held, runs))

        def finish(now: UpdateScalars) -> None:
            copied.wait()
            value = held.get("value", unit.value[part])
            states = {name: held[name] for name in self._rule.names}
            self._rule.update([UpdatePiece(value, unit.grad[part], states, unit.decay)], now)
            if unit.rounded is not None:
                unit.rounded[part].copy_(value)
            slot.busy = self._out.submit(lambda: _copy(runs, held))

        return finish

    # Times ----------------------------------------------------------------------------------------------------

    def _measure(self) -> None:
        if self._tuner is None:
            return
        groups = [group for mine in self._groups.values() for group in mine]
        there = sum(g.stop - g.start for g in groups if on_device(g.number, self._tuner.stride))
        share = there / sum(g.stop - g.start for g in groups)
        self._tuner.measured(time.monotonic() - self._started, self._host_seconds, share)

    def _calibrated(self, units: Sequence[OptimizerShard]) -> StrideTuner:
        """A tuner that knows both ways, tried on memory of their own."""
        unit = max(units, key=lambda unit: unit.value.numel())
        group = self._groups[unit.key][0]
        count, everything = group.stop - group.start, sum(g.stop - g.start for m in self._groups.values() for g in m)
        cpu, seconds = torch.device("cpu"), []
        for rule, where in ((self._host_rule, cpu), (self._rule, self._device)):
            names = ("value", "grad", *rule.names)
            there = {name: torch.zeros(count, dtype=_type(name, rule, unit), device=where) for name in names}
            here = {name: torch.zeros(count, dtype=_type(name, rule, unit), device=cpu) for name in names}
            factor = torch.ones((), dtype=unit.grad.dtype, device=where)
            # Not skipped: a kernel that skips has nothing to do, and says nothing about its time.
            skip, updates = torch.zeros((), device=where), torch.ones((), device=where)
            now = UpdateScalars(0.0, factor, skip, updates)
            best = float("inf")
            for _ in range(2):  # the first also makes what is made once
                begun = time.monotonic()
                if rule is self._rule:
                    _copy(there, here)
                states = {name: there[name] for name in rule.names}
                rule.update([UpdatePiece(there["value"], there["grad"], states, False)], now)
                if rule is self._rule:
                    _copy(here, there)
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)
                best = min(best, time.monotonic() - begun)
            seconds.append(best / max(count, 1) * everything)
        return StrideTuner(*seconds)


def _type(name: str, rule: Rule, unit: OptimizerShard) -> torch.dtype:
    return (rule.dtype if name in rule.names else None) or unit.value.dtype


def _copy(targets: dict[str, Tensor], sources: dict[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(sources[name], non_blocking=True)
