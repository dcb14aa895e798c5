"""The memory of a job as tables and as a picture: what every rank of the pipeline needs, and of what. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from rich.table import Table

from ...configs import Config
from ...models.costs.activations import RECOMPUTABLE, layer_rows
from ...models.costs.kept import kept_bytes
from ...trainer.memory.estimate import GIB, Memory
from ...trainer.memory.stages import bench_of, ways_of
from ...trainer.pipeline.programs import Pipeline
from .tables import table

_HUES = {
    "parameters": "#2f72b4",
    "gradients": "#7fb0dd",
    "masters": "#1f9a78",
    "optimizer states": "#7cc9b1",
    "gathered layers": "#e6d44c",
    "gradients to send": "#c49a3c",
    "inputs": "#98a1b0",
    "buffers of stages": "#667085",
    "activations": "#eb9c2d",
    "working memory": "#d65f33",
    "communication": "#8552ad",
    "device context": "#cbd2dc",
}
_INK, _MUTED, _GRID = "#1f2430", "#667085", "#cbd2dc"
_FONT = "Inter, 'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
_WIDTH, _LEFT, _BAR, _GAP, _TOP = 900, 90, 26, 12, 76


def rank_table(cfg: Config, ranks: Sequence[Memory]) -> Table:
    """GiB by part, a column for each rank of the pipeline."""
    names = [f"rank {memory.rank}" for memory in ranks] if len(ranks) > 1 else ["a rank"]
    rows = table("memory (GiB)", "part", *names)
    for part in ranks[0].parts:
        if any(memory.parts[part] for memory in ranks):
            rows.add_row(part, *(f"{memory.parts[part] / GIB:.3f}" for memory in ranks))
    rows.add_section()
    rows.add_row("total", *(f"{memory.total / GIB:.3f}" for memory in ranks))
    rows.add_row("microbatches in flight", *(str(memory.in_flight) for memory in ranks))
    rows.add_row("at the peak", *(memory.most.during for memory in ranks))
    for part, where in (("on the host", "host"), ("on the disk", "disk")):
        sizes = [memory.elsewhere[where] for memory in ranks]
        if any(sizes):
            rows.add_row(part, *(f"{size / GIB:.3f}" for size in sizes))
    if cfg.hardware.memory_gib is not None:
        rows.add_row("available", *(f"{cfg.hardware.memory_gib:g}" for _ in ranks))
    return rows


def choice_table(cfg: Config) -> Table:
    """MiB that one microbatch keeps of a layer of each kind, under every choice of what is made again."""
    model, work = cfg.model, bench_of(cfg, ways_of(cfg)).work
    kinds = {
        (layer in model.linear_layers, layer in model.routed_layers): layer
        for layer in reversed(range(model.layers + model.mtp))
    }
    layers = sorted(kinds.values())
    rows = table("kept by recompute (MiB)", "part", *(f"layer {layer}" for layer in layers))
    parts = [part for part in RECOMPUTABLE if part != "head"]
    shown: list[list[float]] = []
    for name, choice in {"none": (), "full": "full", **{f"selective: {part}": {part} for part in parts}}.items():
        sizes = [kept_bytes(layer_rows(model, layer, work), choice) / 2**20 for layer in layers]
        if not shown or sizes != shown[0]:  # a part that no layer has changes nothing
            shown.append(sizes)
            rows.add_row(name, *(f"{size:.3f}" for size in sizes))
    if cfg.memory.recompute != "none":
        pipeline = Pipeline.of(cfg)
        chosen = [kept_bytes(layer_rows(model, layer, work), pipeline.choice(layer)) / 2**20 for layer in layers]
        rows.add_row("in this job", *(f"{size:.3f}" for size in chosen))
    return rows


def bars(cfg: Config, ranks: Sequence[Memory]) -> str:
    """The same as a picture, SVG: a bar for each rank, and a line at what the device has."""
    available = cfg.hardware.memory_gib
    most = max([memory.total / GIB for memory in ranks] + ([available] if available is not None else []))
    scale = (_WIDTH - _LEFT - 110) / most
    bottom = _TOP + len(ranks) * (_BAR + _GAP)
    height = bottom + 40
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="{escape(_FONT)}" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="22" font-size="14" font-weight="bold" fill="{_INK}">{escape(cfg.name)}: '
        f"memory of the ranks of the pipeline, GiB</text>",
        *_legend(ranks),
    ]
    for index, memory in enumerate(ranks):
        lines += _bar(memory, _TOP + index * (_BAR + _GAP), scale)
    if available is not None:
        x = _LEFT + available * scale
        lines.append(f'<path d="M{x:.1f} {_TOP - 6} V{bottom}" stroke="{_INK}" stroke-dasharray="4 3"/>')
        lines.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle" fill="{_INK}">{available:g} GiB</text>')
    return "\n".join([*lines, "</svg>", ""])


def _legend(ranks: Sequence[Memory]) -> Iterator[str]:
    x, y = 12.0, 34
    for part in ranks[0].parts:
        if any(memory.parts[part] for memory in ranks):
            width = 26 + 6.2 * len(part)
            if x + width > _WIDTH:
                x, y = 12.0, y + 16
            yield f'<rect x="{x:.0f}" y="{y}" width="10" height="10" fill="{_HUES[part]}"/>'
            yield f'<text x="{x + 14:.0f}" y="{y + 9}" font-size="11" fill="{_MUTED}">{part}</text>'
            x += width


def _bar(memory: Memory, y: float, scale: float) -> Iterator[str]:
    yield f'<text x="12" y="{y + 17:.0f}" fill="{_INK}">rank {memory.rank}</text>'
    x = float(_LEFT)
    for part, nbytes in memory.parts.items():
        width = nbytes / GIB * scale
        if width:
            yield (
                f'<rect x="{x:.2f}" y="{y:.0f}" width="{width:.2f}" height="{_BAR}" fill="{_HUES[part]}">'
                f"<title>{part}: {nbytes / GIB:.3f} GiB</title></rect>"
            )
        x += width
    yield f'<text x="{x + 6:.1f}" y="{y + 17:.0f}" fill="{_INK}">{memory.total / GIB:.2f}</text>'
