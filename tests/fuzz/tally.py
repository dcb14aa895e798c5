"""A line of JSON for every case that was run, and what they add up to."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pentad.configs.schema import AdamWConfig
from tests.fuzz.cases import Case, Layout
from tests.fuzz.run import Outcome


@dataclass(frozen=True)
class Line:
    """One case.

    Args:
        seed: of the case.
        reason: of the failure; none: it passed.
        seconds: it took.
        rounding: as of `Outcome`.
        of: what the case was, by column.
        refused: draws that `check` refused, by key.
    """

    seed: int
    reason: str | None
    seconds: float
    rounding: float
    of: dict[str, list[str]] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)


def line_of(case: Case, outcome: Outcome) -> Line:
    """The tally's line of a case."""
    return Line(
        case.seed, outcome.reason, round(outcome.seconds, 2), outcome.rounding, _columns(case), dict(case.refused)
    )


def _columns(case: Case) -> dict[str, list[str]]:
    cfg, moe = case.alone.config, case.alone.config.model.moe
    columns: dict[str, list[str]] = {
        "family": [case.family],
        "start": [case.start],
        "goes on": ["after a checkpoint" if case.stopped_rank is None else "after a signal"],
        "dtype": [cfg.train.dtype],
        "optimizer": [cfg.optim.name],
        "moments": [cfg.optim.states] if isinstance(cfg.optim, AdamWConfig) else [],
        "data": [cfg.data.name + (" masked" if cfg.data.document_mask else "")],
        "evaluation": ["on" if cfg.eval.every else "off"],
        "router": [moe.router.name] if moe.experts else [],
        "losses": _losses(case),
    }
    for layout in (case.first, case.second):
        for column, values in _layout(layout).items():
            columns.setdefault(column, []).extend(values)
    return columns


def _losses(case: Case) -> list[str]:
    model = case.alone.config.model
    router = model.moe.router
    found = ["mtp"] if model.mtp else []
    if model.moe.experts:
        found += [f"aux {router.aux_level}"] if router.aux_loss else []
        found += ["z"] if router.z_loss else []
        found += ["selection bias"] if router.selection_bias else []
        found += ["capacity"] if model.moe.capacity_factor is not None else []
        found += ["null experts"] if router.null_experts else []
    return found


def _layout(layout: Layout) -> dict[str, list[str]]:
    p, m = layout.config.parallel, layout.config.model
    degrees = {"tp": p.tp, "pp": p.pp, "cp": p.cp, "dp": p.dp, "ep": p.ep, "etp": p.etp}
    columns = {
        "world": [str(layout.world)],
        "axis": [axis for axis, size in degrees.items() if size > 1],
        "axes together": [str(sum(size > 1 for size in degrees.values()))],
        "sharding": [p.data.sharding],
        "states over": [str(p.data.states)],
        "parameters over": [str(p.data.params)],
        "gradients over": [str(p.data.grads)],
        "bucket": [f"{p.data.bucket_mib:g}"],
        "recompute": [layout.config.memory.recompute],
        "parts": list(layout.config.memory.recompute_parts) if layout.config.memory.recompute == "selective" else [],
        "token share": [str(layout.config.memory.token_share)],
        "offload": [str(layout.config.memory.offload_activations)],
        "states on": [layout.config.memory.offload_optimizer],
        "part-stages": ["none" if layout.config.memory.group is None else str(layout.config.memory.group)],
        "disk": ["none" if layout.config.memory.host_gib is None else "some"],
    }
    if p.pp > 1:
        columns["schedule"] = [str(p.pipeline.schedule)]
        columns["vocab"] = [p.pipeline.vocab]
        split = p.pipeline.layers
        empty = not isinstance(split, str) and 0 in split
        columns["stages"] = ["auto" if isinstance(split, str) else "with empty ones" if empty else "by hand"]
    if p.cp > 1:
        columns["method"] = [p.context.method + (" duplex" if p.context.duplex else "")]
        columns["placement"] = [str(p.context.placement)]
    if m.moe.experts:
        columns["dispatcher"] = [m.moe.dispatcher]
    return columns


class Tally:
    """The file, and what it holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines = [Line(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def next_seed(self) -> int:
        """The one after the last."""
        return max((line.seed for line in self.lines), default=-1) + 1

    def add(self, line: Line) -> None:
        """In the file at once. A seed that is run again replaces its line when the file is read."""
        self.lines.append(line)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(line)) + "\n")

    def summary(self) -> str:
        """Counts by column, and the failures. Of a seed that was run again the last run counts."""
        lines = list({line.seed: line for line in self.lines}.values())
        counts: dict[str, Counter[str]] = {}
        for line in lines:
            for column, values in line.of.items():
                counts.setdefault(column, Counter()).update(values)
        failed = [line for line in lines if line.reason is not None]
        rounded = [line.rounding for line in lines if line.rounding]
        text = [f"{len(lines)} cases, {len(failed)} failures, {sum(line.seconds for line in lines):.0f} s"]
        if rounded:
            text.append(f"{len(rounded)} with differences that rounding explains, up to {max(rounded):.1e}")
        text += [f"{column:>14}: {_counted(count)}" for column, count in counts.items()]
        refused = sum((Counter(line.refused) for line in lines), Counter[str]())
        text.append(f"{'refused draws':>14}: {_counted(refused)}")
        text += [f"seed {line.seed} failed: {_first(line.reason)}" for line in failed]
        return "\n".join(text)


def _counted(count: Counter[Any]) -> str:
    return ", ".join(f"{name} {times}" for name, times in count.most_common())


def _first(reason: str | None) -> str:
    lines = [line for line in (reason or "").strip().splitlines() if line]
    return " … ".join(dict.fromkeys((lines[0], lines[-1]))) if lines else ""
