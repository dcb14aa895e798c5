"""The pipeline's layers over another number of stages, with as little of them moved as can be. No torch here.

What a process holds of its new stages it keeps, and everything else comes to it once: so what moves is what the new
stages hold, less what their processes had. It is least for the best pairing of processes with stages (an assignment
problem, solved exactly), over all splits that are as even as the best one (`parallel.pipeline.partition.as_even`).

    pp 4, 8 layers, the third rank is lost        0 1 │ 2 3 │ × × │ 6 7
    pp 3, as even as can be:   3 3 2              0 1 2 │ 3 4 5 │ 6 7      moves 2, 4, 5
                               3 2 3              0 1 2 │ 3 4 │ 5 6 7      moves 2, 4, 5
                               2 3 3              0 1 │ 2 3 4 │ 5 6 7      moves 4, 5: what nobody has any more
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from ...configs.schema import Config
from ...configs.strict_json import JsonError, expect_int, expect_list
from ...configs.tables.schedules import is_program
from ...parallel.pipeline.partition import as_even
from ..memory.fixed import rank_tensors
from ..pipeline.programs import Pipeline
from ..pipeline.stage_layers import StageLayers


@dataclass(frozen=True)
class StageHoldings:
    """What the ranks of each pipeline rank hold of the model.

    Args:
        units: the numbers of layers and of what comes beside them (`_BESIDE`), by pipeline rank.
        sizes: elements that a rank has of each unit; 0 of those that are spread.
        spread: elements of the tables that are cut over all ranks of a replica, stage by stage; 0: none are.
        tp: over how many ranks of a stage.
    """

    units: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    spread: int = 0
    tp: int = 1

    @staticmethod
    def of(cfg: Config) -> StageHoldings:
        """Of a resolved job."""
        pipeline, layers, tp = Pipeline.of(cfg), cfg.model.layers, cfg.parallel.tp
        spreads = cfg.parallel.pipeline.vocab == "balanced"  # of one stage, over its tp ranks alone
        units: list[tuple[int, ...]] = []
        sizes, spread = [0] * (layers + len(_BESIDE)), 0
        for rank in range(cfg.parallel.pp):
            mine: dict[int, int] = {}
            for tensor in rank_tensors(cfg, pipeline, pipeline.split.part(pipeline.stages_of(rank))):
                unit = _unit(tensor.name, layers)
                if spreads and unit in (layers, layers + 1):
                    spread += tensor.elements * tp
                else:
                    mine[unit] = mine.get(unit, 0) + tensor.elements
            units.append(tuple(sorted(mine)))
            for unit, size in mine.items():
                sizes[unit] = size
        return StageHoldings(tuple(units), tuple(sizes), spread, tp)

    @staticmethod
    def load(found: object) -> StageHoldings:
        """What `dataclasses.astuple` and JSON made of it.

        Raises:
            JsonError: it is something else.
        """
        values = expect_list(found, "holdings")
        if len(values) != 4:
            raise JsonError(f"holdings are 4 values, not {len(values)}")
        sizes, last = _numbers(values[1], "sizes"), len(_BESIDE)
        units = tuple(_numbers(row, "units") for row in expect_list(values[0], "stages"))
        if any(unit >= len(sizes) for row in units for unit in row) or len(sizes) <= last:
            raise JsonError(f"stages of {len(sizes)} units are {units}")
        return StageHoldings(units, sizes, expect_int(values[2], "spread", 0), expect_int(values[3], "tp", 1))

    def split(self, splits: Splits, number: int) -> StageHoldings:
        """The same with another split of the layers."""
        layers = len(self.sizes) - len(_BESIDE)
        units = [[unit for unit in mine if unit >= layers] for mine in self.units]
        taken = 0
        for rank, count in zip(splits.placement, splits.counts[number], strict=True):
            units[rank] += range(taken, taken + count)
            taken += count
        return replace(self, units=tuple(tuple(sorted(mine)) for mine in units))

    def size(self, rank: int) -> int:
        """Elements of a pipeline rank."""
        return sum(self.sizes[unit] for unit in self.units[rank]) + self.spread // (len(self.units) * self.tp)

    def kept(self, rank: int, after: StageHoldings, to: int, shard: int = 0) -> int:
        """Elements that a process of a pipeline rank keeps as that of another one.

        Args:
            rank: what it was.
            after, to: what it comes to be.
            shard: its place among the `tp` ranks of a stage, before and after.
        """
        both = {*self.units[rank]} & {*after.units[to]}
        old, new = len(self.units) * self.tp, len(after.units) * self.tp
        was, will = rank * self.tp + shard, to * self.tp + shard
        shared = min((was + 1) * new, (will + 1) * old) - max(was * new, will * old)
        return sum(after.sizes[unit] for unit in both) + after.spread * max(0, shared) // (old * new)


_BESIDE = ("embed", "head", "positions", "end")
"""Units beside the layers, in this order behind them; the last one is the norm and the prediction modules."""
_AUTO = "pipeline.layers=auto"


def _unit(name: str, layers: int) -> int:
    first, *rest = name.split(".")
    if first == "layers":
        return int(rest[0])
    return layers + _BESIDE.index(first if first in _BESIDE else "end")


def resplits(cfg: Config) -> Iterator[str]:
    """Layouts with fewer pipeline ranks, as overrides of `parallel`: those with the most ranks first, of them those
    with the most stages. Whether the job can be so is for `validate`."""
    p = cfg.parallel
    if is_program(p.pipeline_in_use.schedule):  # its ranks are those of the file
        return
    sizes = [(pp, dp) for pp in range(p.pp - 1, 0, -1) for dp in range(p.dp, 0, -1)]
    for pp, dp in sorted(sizes, key=lambda size: -size[0] * size[1]):
        yield f"pp={pp} dp={dp} {_AUTO}"


@dataclass(frozen=True)
class Splits:
    """The splits of the layers over the stages that a layout may have, all as even as can be.

    Args:
        counts: layers of each stage, of each split; the first one is what `parallel.pipeline.layers=auto` gives.
        placement: the pipeline rank that holds each stage.
    """

    counts: tuple[tuple[int, ...], ...]
    placement: tuple[int, ...]

    @staticmethod
    def of(cfg: Config) -> Splits:
        """Of a resolved job whose layers are split by their cost."""
        found = StageLayers.of(cfg)
        layers, ahead, head = found.costs
        last = 0.0 if found.balanced else ahead + head
        return Splits(tuple(as_even(layers, found.counts, last=last, placement=found.placement)), found.placement)

    @staticmethod
    def load(found: object) -> Splits:
        """What `dataclasses.astuple` and JSON made of it.

        Raises:
            JsonError: it is something else.
        """
        values = expect_list(found, "splits")
        if len(values) != 2:
            raise JsonError(f"splits are 2 values, not {len(values)}")
        counts = tuple(_numbers(each, "counts") for each in expect_list(values[0], "splits"))
        placement = _numbers(values[1], "placement")
        if not counts or any(len(each) != len(placement) or sum(each) != sum(counts[0]) for each in counts):
            raise JsonError(f"splits over {len(placement)} stages are {counts}")
        return Splits(counts, placement)

    def settled(self, layout: str, number: int) -> str:
        """A layout of `resplits` with one of the splits."""
        return layout.replace(_AUTO, f"pipeline.layers=[{','.join(map(str, self.counts[number]))}]")


def _numbers(found: object, what: str) -> tuple[int, ...]:
    return tuple(expect_int(each, what, 0) for each in expect_list(found, what))


@dataclass(frozen=True)
class Seating:
    """Who goes where.

    Args:
        seats: for each place of the new mesh who takes it; none: somebody who holds nothing of it.
        moved: elements that come to them.
    """

    seats: tuple[int | None, ...]
    moved: int


def best_seating(
    before: StageHoldings, after: StageHoldings, left: Sequence[int], *, stays: bool = False, shard: int = 0
) -> Seating:
    """The way in which one pipeline goes on and the fewest elements move; places are pipeline ranks.

    Args:
        before, after: what the pipeline ranks held and are to hold.
        left: pipeline ranks of the mesh before whose processes are there.
        stays: the first of them stays the first, whatever that costs, if it is there.
        shard: as of `StageHoldings.kept`.
    """
    places = range(len(after.units))
    worth = [[before.kept(old, after, new, shard) for old in left] + [0] * len(places) for new in places]
    if stays and left and left[0] == 0:
        worth[0][0] += 1 + sum(map(after.size, places))
    seats = [column if column < len(left) else None for column in assigned(worth)]
    found = tuple(None if column is None else left[column] for column in seats)
    kept = sum(before.kept(old, after, new, shard) for new, old in enumerate(found) if old is not None)
    return Seating(found, sum(map(after.size, places)) - kept)


def reseated(
    before: StageHoldings, after: StageHoldings, members: Sequence[int], gone: Collection[int], ready: Sequence[int]
) -> Seating:
    """The number of the process in each slot of a mesh with another number of stages, all else alike.

    Each pipeline goes on with its own processes, where the fewest elements move; where it has too few, those that are
    too many elsewhere and those that are ready help out. The process in the first slot stays there, for the run's files
    are open in it.

    Args:
        before, after: what the pipeline ranks held and are to hold.
        members: the number in each slot of the mesh before; slots count stage by stage.
        gone: slots of it whose processes are lost.
        ready: numbers of processes in no slot.

    Raises:
        ValueError: there are too few.
    """
    lines, moved = len(members) // len(before.units), 0
    seats: dict[int, int] = {}
    for line in range(lines):
        left = [rank for rank in range(len(before.units)) if rank * lines + line not in gone]
        found = best_seating(before, after, left, stays=line == 0, shard=line % before.tp)
        moved += found.moved
        seats |= {
            new * lines + line: members[old * lines + line] for new, old in enumerate(found.seats) if old is not None
        }
    left = [number for slot, number in enumerate(members) if slot not in gone and number not in seats.values()]
    rest, slots = [*left, *ready], range(len(after.units) * lines)
    if len(seats) + len(rest) < len(slots):
        raise ValueError(f"{len(slots)} slots, and {len(seats) + len(rest)} processes")
    seats |= {slot: rest.pop(0) for slot in slots if slot not in seats}
    return Seating(tuple(seats[slot] for slot in slots), moved)


def assigned(worth: Sequence[Sequence[int]]) -> list[int]:
    """The column of each row, all different, with the largest sum of worths.

    The Hungarian method with potentials, O(rows² · columns): rows are added one by one, each along the cheapest path
    of exchanges (Kuhn 1955; Jonker and Volgenant 1987).

    Args:
        worth: row by row, of at least as many columns as rows.
    """
    rows, columns = len(worth), len(worth[0]) if worth else 0
    of_row, of_column = [0] * rows, [0] * columns
    owner: list[int | None] = [None] * columns
    for row in range(rows):
        reached: dict[int, int | None] = {}
        least: list[tuple[int, int | None] | None] = [None] * columns
        at, here = row, None
        while True:
            for column in range(columns):
                if column not in reached:
                    slack = -worth[at][column] - of_row[at] - of_column[column]
                    known = least[column]
                    if known is None or slack < known[0]:
                        least[column] = slack, here
            open_ones = [(found[0], column) for column, found in enumerate(least) if found and column not in reached]
            step, nearest = min(open_ones)
            of_row[row] += step
            for column in reached:
                of_column[column] -= step
                holder = owner[column]
                assert holder is not None
                of_row[holder] += step
            least = [found and (found[0] - step, found[1]) for found in least]
            found = least[nearest]
            assert found is not None
            reached[nearest], holder = found[1], owner[nearest]
            if holder is None:
                here = nearest
                break
            at, here = holder, nearest
        while here is not None:  # along the path, each hands its column on
            before = reached[here]
            owner[here] = row if before is None else owner[before]
            here = before
    columns_of = {holder: column for column, holder in enumerate(owner) if holder is not None}
    return [columns_of[row] for row in range(rows)]
