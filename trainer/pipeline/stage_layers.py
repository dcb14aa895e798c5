"""How many layers each stage of the pipeline has, decided before anything is built. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from ...configs import Config, Problem
from ...configs.reading.spread import part_layers
from ...models.costs.flops import layer_flops
from ...parallel.pipeline import schedules
from ...parallel.pipeline.partition import partition


@dataclass(frozen=True)
class StageLayers:
    """The stages of a job, as its schedule knows them.

    Args:
        placement: the rank on the pipeline axis that holds each stage.
        counts: layers of each stage.
        groups: layers of each stage's part-stages (`memory.group`).
        balanced: the vocabulary is split over all of them.
        costs: FLOPs of each layer; of the prediction modules together; of the head.
    """

    placement: tuple[int, ...]
    counts: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    balanced: bool
    costs: tuple[tuple[float, ...], float, float]

    @staticmethod
    def of(cfg: Config) -> StageLayers:
        """Layers split by their cost, or as the job says."""
        p, ranks = cfg.parallel.pipeline_in_use, cfg.parallel.pp
        placement = schedules.placement(p.schedule, ranks, p.chunks)
        balanced = p.vocab == "balanced" and ranks > 1
        *costs, head = layer_flops(cfg.model, cfg.train.seq_len)
        layers, ahead = costs[: cfg.model.layers], sum(costs[cfg.model.layers :])
        if p.layers == "auto":
            counts = partition(layers, len(placement), last=0.0 if balanced else ahead + head, placement=placement)
        else:
            counts = tuple(p.layers)
        groups = tuple(grouped(count, part_layers(cfg)) for count in counts)
        return StageLayers(tuple(placement), tuple(counts), groups, balanced, (tuple(layers), ahead, head))


def grouped(layers: int, group: int | None) -> tuple[int, ...]:
    """So many layers in groups, of `group` each but for the last; none: in one."""
    if group is None or layers <= group:
        return (layers,)
    whole, rest = divmod(layers, group)
    return (group,) * whole + (rest,) * (rest > 0)


def empty_stages(cfg: Config) -> list[Problem]:
    """A warning where layers were to be split by cost and are not enough for all stages."""
    p = cfg.parallel
    if p.pp == 1 or p.pipeline.layers != "auto":
        return []
    counts = StageLayers.of(cfg).counts
    empty = counts.count(0)
    if not empty:
        return []
    chunks = f" x parallel.pipeline.chunks={p.pipeline.chunks}" if p.pipeline.chunks != 1 else ""
    message = (
        f"{p.pp}{chunks} makes {len(counts)} stages of model.layers={cfg.model.layers}, and {empty} have no layer "
        f"({' '.join(map(str, counts))}): their ranks mostly wait; set a smaller parallel.pp, or "
        "parallel.pipeline.vocab=balanced where the head is what fills the last stage"
    )
    return [Problem("parallel.pp", message)]
