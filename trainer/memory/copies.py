"""What copies of a job's activations to the host carry and take, before anything runs. No torch."""

from __future__ import annotations

from collections.abc import Collection

from ...configs import Config
from ...configs.tables.layer_parts import TOKEN_WISE
from ...models.costs.activations import angle_rows, begin_rows, end_rows, layer_rows, prediction_rows
from ...models.costs.flops import layer_flops
from ...models.costs.kept import INPUT, kept_bytes, kept_rows
from ...models.costs.times import Rates
from ...models.costs.token_share import LayerParts, TokenShare, token_share
from ..pipeline.programs import Copies, Pipeline
from .stages import bench_of, ways_of

_DEAR = {"input": (INPUT,), "attention": ("attention output", "log-sum-exp")}
"""What of a layer is dear to make again (`models.costs.token_share`), by the names of its rows."""


def copies_of(cfg: Config, pipeline: Pipeline, rates: Rates | None = None) -> Copies:
    """What the copies of each part-stage carry.

    Args:
        cfg: the job, resolved.
        pipeline: its pipeline.
        rates: of a device; none: what the job says of it, or an assumption (`Rates.of`).
    """
    stages = range(len(pipeline.split.layers))
    kept = tuple(float(_kept(cfg, pipeline, stage)) for stage in stages)
    return Copies(kept, rates or Rates.of(cfg.hardware, cfg.train.dtype))


def hidden_share(cfg: Config, rates: Rates) -> TokenShare:
    """What of a layer's activations is on the host by the time that the next layer's forward pass ends: of the layer of
    which the least is."""
    model, b, pipeline = cfg.model, bench_of(cfg, ways_of(cfg)), Pipeline.of(cfg)
    shares = []
    for layer in range(model.layers):
        rows = kept_rows(layer_rows(model, layer, b.work), pipeline.choice(layer))
        dear = {name: float(sum(row.nbytes for row in rows if row.name in names)) for name, names in _DEAR.items()}
        others = kept_bytes(rows) - sum(dear.values())
        seconds = _forward_s(cfg, layer, rates)
        parts = LayerParts(**dear, others=others)
        shares.append(token_share(parts, forward_s=seconds, host_bytes_s=rates.host_bytes, layers=model.layers))
    return min(shares, key=lambda share: (len(share.whole), share.share))


def hidden_tokens(cfg: Config, layer: int, parts: Collection[str], rates: Rates) -> float:
    """The largest share of tokens of which a layer can keep what these parts make, so that copies of all that it keeps
    then hide behind its forward pass (`token_share`; what the host has room for, the program says)."""
    work = bench_of(cfg, ways_of(cfg)).work
    rows = layer_rows(cfg.model, layer, work)
    some = sum(row.nbytes for row in rows if TOKEN_WISE.intersection(parts).intersection(row.parts))
    kept = LayerParts(input=kept_bytes(rows, parts), attention=0.0, others=some)
    seconds = _forward_s(cfg, layer, rates)
    return token_share(kept, forward_s=seconds, host_bytes_s=rates.host_bytes, layers=cfg.model.layers).share


def _forward_s(cfg: Config, layer: int, rates: Rates) -> float:
    """A microbatch's forward pass through a layer, at the device's peak."""
    p, t = cfg.parallel, cfg.train
    return layer_flops(cfg.model, t.seq_len)[layer] * t.micro_batch / (p.tp * p.cp) / rates.flops


def _kept(cfg: Config, pipeline: Pipeline, stage: int) -> int:
    """Bytes of a microbatch that a part-stage has caught, at an even load of the experts."""
    model, split = cfg.model, pipeline.split
    b = bench_of(cfg, ways_of(cfg))
    first, last, layers = stage == 0, stage == len(split.layers) - 1, list(split.layers[stage])
    layers += range(model.layers, model.layers + model.mtp) if last else []
    kept = sum(kept_bytes(layer_rows(model, layer, b.work), pipeline.choice(layer)) for layer in layers)
    if any(pipeline.choice(layer) != "full" for layer in layers):
        # Layers that are made again as a whole hold them beside the graph, where nothing is caught.
        kept += kept_bytes(angle_rows(model, b.work, each=b.ranks > 1))
    where = pipeline.placement
    if layers and not first and where[stage - 1] != where[stage]:
        # What was received stays in its buffer.
        kept -= sum(row.nbytes for row in layer_rows(model, layers[0], b.work) if row.name == INPUT)
    if first and not split.balanced:
        kept += kept_bytes(begin_rows(model, b.work))
    if last:
        kept += kept_bytes(end_rows(model, b.work, head=not split.balanced))
        kept += model.mtp * kept_bytes(prediction_rows(model, b.work))
    return kept
