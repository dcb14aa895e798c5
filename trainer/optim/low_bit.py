"""Moments in 4 or 8 bits (`quantiser.py`), the same in every layout.

A unit's moments are decoded, updated with its parameters, and encoded again with scales of what they are now. Rows,
columns and blocks are those of the global tensors, of which a rank may hold a part only: so largest values are taken
over all ranks that have some of the same (`coded.py`).

    decode │ update │ largest of each row, column, block │ max over ranks │ encode

A largest value does not depend on the order in which it is found. So every layout has the same codes, and a checkpoint
takes them from one into another as they are.

The update itself needs no other rank. A step that has committed ends it alone and keeps moments that it could not
encode; the next session begins with agreeing on their scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...configs.errors import Problem, UserError
from ...parallel.checksum import ParameterMemory
from ...parallel.comm.collectives import all_reduce
from ...parallel.comm.mesh import Mesh
from ...parallel.global_tensor import GlobalTensor, Placement
from ...parallel.replicas.protocol import OptimizerShard, ShardSlice, SharedBucket
from .coded import CodedBucket, CodedRun, coded_bucket
from .optimizer import Rule, UpdatePiece, UpdateScalars
from .plain import resting_masters
from .quantiser import Blocks, Code

CODES, SCALES = "codes", "scales"
_LATE, _SKIPPED = "late", "skipped"


class LowBitStates:
    """An `Optimizer` with coded moments of large matrices.

    Args:
        rule: what it computes.
        codes: of its states, in their order.
        above: matrices of more elements are coded; moments of all else are kept as they are.
        mesh: of this rank.
    """

    def __init__(self, rule: Rule, codes: Sequence[Code], above: int, mesh: Mesh) -> None:
        self._rule, self._above, self._mesh = rule, above, mesh
        self._codes = dict(zip(rule.names, codes, strict=True))
        self.states: dict[str, dict[str, Tensor]] = {}
        """Unit key → STATE (what is kept as it is), STATE.codes, STATE.scales; STATE.late: not encoded yet."""
        self._plans: dict[str, CodedBucket] = {}
        self._done: set[str] = set()

    # States ---------------------------------------------------------------------------------------------------

    def prepare(self, unit: OptimizerShard, bucket: SharedBucket | None) -> None:
        assert bucket is not None  # fsdp is refused before
        like = unit.value
        plan = self._plans[unit.key] = coded_bucket(self._codes, self._above, bucket, self._mesh, like.device)
        if unit.key in self.states:
            return
        mine = self.states.setdefault(unit.key, {})
        for state, code in self._codes.items():
            runs = plan.coded[state]
            mine[state] = like.new_zeros(plan.plain[-1].place.stop if plan.plain else 0)
            mine[f"{state}.{SCALES}"] = like.new_zeros(runs[-1].scale.stop if runs else 0)
            codes = like.new_zeros(runs[-1].codes.stop if runs else 0, dtype=torch.uint8)
            for run in runs:
                zeros = like.new_zeros(run.scales.run.count)
                codes[run.codes] = code.pack(code.encode(zeros, zeros))
            mine[f"{state}.{CODES}"] = codes

    def agree(self) -> None:
        """Encodes what a step that was ended alone left; all ranks call it, before the first step of a session."""
        for key in self._plans:
            self._encode(key)

    def settle(self) -> None:
        self._done.clear()

    def close(self) -> None:
        """Nothing to do."""

    # A step ---------------------------------------------------------------------------------------------------

    def step(self, units: Sequence[OptimizerShard], now: UpdateScalars, *, alone: bool = False) -> None:
        for unit in units:
            if unit.key not in self._done:
                self._update(unit, now)
                self._done.add(unit.key)
            if not alone or self._plans[unit.key].alone:
                self._encode(unit.key)

    def _update(self, unit: OptimizerShard, now: UpdateScalars) -> None:
        moments = {state: self._decoded(unit, state) for state in self._codes}
        self._rule.update([UpdatePiece(unit.value, unit.grad, moments, unit.decay)], now)
        if unit.rounded is not None:
            unit.rounded.copy_(unit.value)
        mine = self.states[unit.key]
        mine |= {f"{state}.{_LATE}": moment for state, moment in moments.items()} | {_SKIPPED: now.skip}

    def _decoded(self, unit: OptimizerShard, state: str) -> Tensor:
        """A unit's moment, in full."""
        plan, mine = self._plans[unit.key], self.states[unit.key]
        moment = torch.zeros_like(unit.value)
        for run in plan.plain:
            moment[run.part] = mine[state][run.place]
        for run in plan.coded[state]:
            codes = run.code.unpack(mine[f"{state}.{CODES}"][run.codes], run.scales.run.count)
            moment[run.part] = run.code.decode(codes, run.scales.spread(mine[f"{state}.{SCALES}"][run.scale]))
        return moment

    def _encode(self, key: str) -> None:
        """Takes part in agreeing on a unit's scales, and encodes its moments if they are late."""
        plan, mine = self._plans[key], self.states[key]
        late = {state: mine.get(f"{state}.{_LATE}") for state in self._codes}
        scales = {state: self._largest(plan.coded[state], mine[f"{state}.{SCALES}"], late[state]) for state in late}
        for exchange in plan.exchanges:
            sample = next(iter(scales.values()))
            together = sample.new_zeros(exchange.size)
            for state, there, here in exchange.parts:
                together[there] = scales[state][here]
            all_reduce(together, exchange.axis, "max").wait()
            for state, there, here in exchange.parts:
                scales[state][here] = together[there]
        for state, moment in late.items():
            if moment is not None:
                self._keep(key, state, moment, scales[state], mine[_SKIPPED].bool())
                del mine[f"{state}.{_LATE}"]
        mine.pop(_SKIPPED, None)

    def _largest(self, runs: Sequence[CodedRun], kept: Tensor, moment: Tensor | None) -> Tensor:
        """The scales of a moment; those that it has, if it is encoded."""
        if moment is None:
            return kept.clone()
        scales = torch.zeros_like(kept)
        for run in runs:
            run.scales.raise_to(scales[run.scale], moment[run.part])
        return scales

    def _keep(self, key: str, state: str, moment: Tensor, scales: Tensor, skipped: Tensor) -> None:
        """Encodes a moment. A skipped step leaves the codes: those of what they stand for may be others."""
        plan, mine = self._plans[key], self.states[key]
        for run in plan.plain:
            mine[state][run.place] = moment[run.part]
        codes = mine[f"{state}.{CODES}"]
        for run in plan.coded[state]:
            found = run.code.pack(run.code.encode(moment[run.part], run.scales.spread(scales[run.scale])))
            codes[run.codes] = torch.where(skipped, codes[run.codes], found)
        kept = mine[f"{state}.{SCALES}"]
        kept.copy_(torch.where(skipped, kept, scales))

    def resting(self, units: Mapping[str, OptimizerShard], slices: Sequence[ShardSlice]) -> list[ParameterMemory]:
        places = resting_masters(units, slices)
        for key, plan in self._plans.items():
            mine = self.states[key]
            for state in self._codes:
                places += [ParameterMemory(state, run.name, mine[state][run.place]) for run in plan.plain]
                for run in plan.coded[state]:
                    places.append(ParameterMemory(f"{state}.{CODES}", run.name, mine[f"{state}.{CODES}"][run.codes]))
                    places.append(ParameterMemory(f"{state}.{SCALES}", run.name, mine[f"{state}.{SCALES}"][run.scale]))
        return places

    # Checkpoints ----------------------------------------------------------------------------------------------

    def stored(self, slices: Sequence[ShardSlice]) -> dict[str, GlobalTensor]:
        """For a checkpoint: codes with a byte for each, under the state's name; blocks, rows and columns, which are
        global like the parameter's elements."""
        found: dict[str, GlobalTensor] = {}
        for key, plan in self._plans.items():
            mine = self.states[key]
            for state in self._codes:
                for run in plan.plain:
                    part = mine[state][run.place]
                    found[f"optim/{state}/{run.name}"] = GlobalTensor(run.sharding.placement, run.start, run.stop, part)
                for run in plan.coded[state]:
                    codes = run.code.unpack(mine[f"{state}.{CODES}"][run.codes], run.scales.run.count)
                    scales = mine[f"{state}.{SCALES}"][run.scale]
                    found |= _stored_run(state, run, codes.contiguous(), scales)
        return found

    def loaded(self, tensors: Mapping[str, GlobalTensor]) -> None:
        """Takes over the codes of what `stored` gave, filled from a checkpoint; all else is in place.

        Raises:
            UserError: some are no codes.
        """
        for key, plan in self._plans.items():
            for state, code in self._codes.items():
                for run in plan.coded[state]:
                    name = f"optim/{state}/{run.name}"
                    codes = tensors[name].local
                    if bool((codes.int() >= len(code.levels)).any()):
                        raise UserError(Problem("checkpoint.resume", f"{name} holds numbers that are no codes"))
                    self.states[key][f"{state}.{CODES}"][run.codes] = code.pack(codes)


def _stored_run(state: str, run: CodedRun, codes: Tensor, scales: Tensor) -> dict[str, GlobalTensor]:
    place, parts = run.sharding.placement, run.scales.run
    found = {f"optim/{state}/{run.name}": GlobalTensor(place, parts.start, parts.stop, codes)}
    lead = slice(0, len(place.global_shape) - 2)
    (_, a, b), (_, first_row, first_column) = parts.shape, parts.offsets
    outer = [each[lead] for each in (place.global_shape, place.offsets, place.local_shape)]

    def placed(whole: tuple[int, ...], offsets: tuple[int, ...], shape: tuple[int, ...]) -> Placement:
        return Placement(*(before + after for before, after in zip(outer, (whole, offsets, shape), strict=True)))

    if isinstance(run.scales, Blocks):
        size, ids = run.scales.size, run.scales.ids
        where = placed(
            (parts.whole[1], -(-parts.whole[2] // size)), (first_row, first_column // size), (a, run.scales.row)
        )
        return found | {f"optim/{state}.blocks/{run.name}": GlobalTensor(where, ids.start, ids.stop, scales)}
    held = run.scales
    rows, columns = scales[: len(held.rows)], scales[len(held.rows) :]
    of_rows, of_columns = (
        placed((parts.whole[1],), (first_row,), (a,)),
        placed((parts.whole[2],), (first_column,), (b,)),
    )
    return found | {
        f"optim/{state}.rows/{run.name}": GlobalTensor(of_rows, held.rows.start, held.rows.stop, rows),
        f"optim/{state}.columns/{run.name}": GlobalTensor(
            of_columns, held.matrices.start * b, held.matrices.stop * b, columns
        ),
    }
