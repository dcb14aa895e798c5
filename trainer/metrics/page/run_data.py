"""What the page says of one run, as values that JSON can hold, from the files of its folder.

Nothing in them is believed: a file may be cut short, empty, of another version or made by somebody else, and what of it
is no number or text of the expected kind is left out.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ....configs.errors import UserError
from ....configs.reading.written import Scalar
from ....configs.reading.yaml_file import read_entries
from ...run_folder import RunFile
from ..readings.waterfall import ORDER
from ..summary import objects_of
from .columns import MOST, Columns, by_step, known_number, last_of, line, mean_of, most_of, rounded, starts_of
from .verdict import alerts_of, verdict_of

LINES = (
    "loss", "grad_norm", "lr", "tokens_per_s", "step_time_s", "mfu", "memory_gib", "memory_model_gib",
)  # fmt: skip
"""Keys of metrics.jsonl that are drawn as lines."""
_OTHERS = ("tokens", "skipped")
_COLUMNS = 400
"""Of the picture of where the time went."""
_WINDOWS, _RANKS = 240, 128
"""Of the stragglers' heat map at most; of larger ones neighbours are joined, and the slowest shown."""
_LAYERS = 128
_EVENTS = 400
_TEXT = 300
"""Characters of a text that an event brings."""


def run_data(run: Path) -> dict[str, Any]:
    """Everything but the drawing of its step.

    Args:
        run: its folder.

    Raises:
        UserError: there is nothing of a run in it.
    """
    rows, windows, experts, falls = [], [], [], []
    for row in objects_of(run / RunFile.METRICS):
        rows.append({key: row.get(key) for key in ("step", *LINES, *_OTHERS)})
        for key, found in (("straggler", windows), ("moe", experts), ("waterfall", falls)):
            # Between two windows each row repeats the straggler of the last one, without its ranks.
            if isinstance(value := row.get(key), dict) and (key != "straggler" or "slower" in value):
                found.append({**value, "step": value.get("step", row.get("step"))})
    events = list(objects_of(run / RunFile.EVENTS))
    config = _config(run)
    if not rows and not events and not config:
        raise UserError(f"{run} is no folder of a run: it has no steps, no events and no configuration")
    rows = by_step(rows)
    columns = Columns.of(rows, (*LINES, *_OTHERS))
    starts = starts_of(len(columns.steps))
    seconds = np.nancumsum(columns.values["step_time_s"])
    return {
        "name": _name(run, config),
        "folder": str(run),
        "config": config,
        "facts": _facts(columns, config, events),
        "x": {
            "step": last_of(columns.steps, starts).tolist(),
            "tokens": rounded(last_of(columns.values["tokens"], starts)),
            "hours": rounded(last_of(seconds, starts) / 3600),
        },
        "lines": {key: line(columns.values[key], starts) for key in LINES if np.isfinite(columns.values[key]).any()},
        "steps": len(columns.steps),
        "points": len(starts),
        **_marks(columns, events),
        "verdict": verdict_of(run, events, int(columns.steps[-1]) if len(columns.steps) else None),
        "waterfall": _waterfall(by_step(falls)),
        "stragglers": _stragglers(by_step(windows)),
        "experts": _experts(by_step(experts)),
        "events": _events(events),
    }


def _name(run: Path, config: Mapping[str, str]) -> str:
    return config.get("name") or run.resolve().name


def _config(run: Path) -> dict[str, str]:
    """The resolved configuration: texts by dotted keys."""
    try:
        entries = read_entries(run / RunFile.RESOLVED, RunFile.RESOLVED)
    except (UserError, OSError):
        return {}
    return {entry.key: entry.node.text if isinstance(entry.node, Scalar) else str(entry.node) for entry in entries}


def _facts(columns: Columns, config: Mapping[str, str], events: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Words over the charts."""
    steps, values = columns.steps, columns.values
    settled = slice(len(steps) // 5, None)  # without warming up

    def median(key: str) -> float:
        known = values[key][settled]
        known = known[np.isfinite(known)]
        return float(np.median(known)) if len(known) else math.nan

    loss = values["loss"][np.isfinite(values["loss"])]
    seconds = float(np.nansum(values["step_time_s"]))
    tokens = values["tokens"][np.isfinite(values["tokens"])]
    total = config.get("train.steps", "")
    found = {
        "state": _state(events, total, int(steps[-1]) if len(steps) else 0),
        "model": _model(config),
        "layout": _layout(config, events),
        "steps": f"{steps[-1]:,}" + (f" of {int(total):,}" if total.isdecimal() else "") if len(steps) else "none",
        "tokens": f"{tokens[-1]:,.0f}" if len(tokens) else "",
        "time in steps": _hours(seconds) if seconds else "",
        "loss": f"{loss[0]:.4g} → {loss[-1]:.4g}" if len(loss) else "",
        "tokens/s": _number(median("tokens_per_s")),
        "step time": f"{_number(median('step_time_s'))} s" if _number(median("step_time_s")) else "",
        "MFU": f"{100 * median('mfu'):.2f} %" if math.isfinite(median("mfu")) else "",
        "memory": f"{np.nanmax(values['memory_gib']):.3g} GiB" if np.isfinite(values["memory_gib"]).any() else "",
    }
    return {key: text for key, text in found.items() if text}


def _state(events: Sequence[Mapping[str, Any]], total: str, step: int) -> str:
    last = next((e["event"] for e in reversed(events) if e.get("event") in ("start", "end", "stopped")), None)
    if last == "end":
        return "ended"
    if last == "stopped":
        return "stopped on request"
    if last and events[-1].get("event") == "verdict":
        return "ended by a fault"
    return "no end in its files: it still runs, or was killed" if last else "no start in its files"


def _model(config: Mapping[str, str]) -> str:
    preset = config.get("model.preset", "null")
    sizes = " × ".join(f"{config[key]} {name}" for key, name in _SIZES if key in config)
    experts = config.get("model.moe.experts", "0")
    words = [*([preset] if preset != "null" else []), config.get("model.family", ""), sizes]
    return ", ".join(filter(None, [*words, f"{experts} experts" if experts not in ("0", "null") else ""]))


_SIZES = (("model.layers", "layers"), ("model.hidden", "hidden"))


def _layout(config: Mapping[str, str], events: Sequence[Mapping[str, Any]]) -> str:
    degrees = [f"{axis} {n}" for axis in _AXES if (n := config.get(f"parallel.{axis}", "1")) not in ("1", "null")]
    worlds = [e["world"] for e in events if e.get("event") == "start" and isinstance(e.get("world"), int)]
    ranks = f"{worlds[-1]:,} rank{'s' * (worlds[-1] != 1)}" if worlds else ""
    return ": ".join(filter(None, [ranks, ", ".join(degrees)]))


_AXES = ("tp", "pp", "cp", "ep", "etp", "dp")


def _hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:,.4g} h"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _marks(columns: Columns, events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Held-out losses, and the steps at which something happened."""
    held, restarts = [], []
    for event in by_step(e for e in events if e.get("event") == "evaluation"):
        if math.isfinite(loss := known_number(event.get("loss"))):
            held.append([event["step"], *rounded([loss])])
    for event in events:
        if event.get("event") == "start" and isinstance(step := event.get("step"), int) and step > 0:
            restarts.append(step)
    skipped = np.nan_to_num(columns.values["skipped"])
    more = columns.steps[1:][np.diff(skipped) > 0] if len(skipped) > 1 else columns.steps[:0]
    return {
        "held_out": _spaced(held),
        "restarts": _spaced(restarts),
        "skipped": _spaced(more.tolist()),
        "alerts": _spaced(alerts_of(events)),
    }


def _spaced(values: list[Any]) -> list[Any]:
    """At most `MOST` of them, the last one with them."""
    return values if len(values) <= MOST else [values[(i + 1) * len(values) // MOST - 1] for i in range(MOST)]


def _waterfall(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not rows:
        return None
    shares = np.array([[max(known_number(row.get(key)), 0.0) for key in ORDER] for row in rows])
    shares = np.nan_to_num(shares)
    keys = [i for i in range(len(ORDER)) if shares[:, i].any()]
    if not keys:
        return None
    starts = starts_of(len(rows), _COLUMNS)
    settled = shares[len(rows) // 5 :].mean(0)  # without warming up
    free: dict[str, list[float]] = {}
    for row in rows[len(rows) // 5 :]:
        known = row.get("mfu_if_free")
        for key in ORDER:
            value = known_number(known.get(key)) if isinstance(known, dict) else math.nan
            if math.isfinite(value):
                free.setdefault(key, []).append(value)
    steps = np.array([row["step"] for row in rows])
    return {
        "step": last_of(steps, starts).tolist(),
        "shares": {ORDER[i]: rounded(mean_of(shares[:, i], starts)) for i in keys},
        "whole": {ORDER[i]: rounded([settled[i]])[0] for i in keys},
        "mfu_if_free": {key: rounded([statistics.fmean(values)])[0] for key, values in free.items()},
    }


def _stragglers(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How much slower than its peers each rank was, in percent, by windows."""
    found = [(row["step"], s) for row in rows if isinstance(s := row.get("slower"), list) and s]
    if not found:
        return None
    ranks = Counter(len(slower) for _, slower in found).most_common(1)[0][0]
    found = [(step, slower) for step, slower in found if len(slower) == ranks]
    steps = np.array([step for step, _ in found])
    percent = 100 * np.array([[known_number(value) for value in slower] for _, slower in found])
    by_time, by_rank = starts_of(len(found), _WINDOWS), starts_of(ranks, _RANKS)
    percent = most_of(most_of(percent, by_time).T, by_rank)
    return {
        "step": last_of(steps, by_time).tolist(),
        "rows": _ranges(by_rank, ranks),
        "values": [[None if math.isnan(v) else round(v, 1) for v in row] for row in percent.tolist()],
        "verdicts": [
            {key: row.get(key) for key in ("step", "rank", "reason", "score", "cost")}
            for row in rows
            if row.get("confirmed") is True and isinstance(row.get("rank"), int)
        ][-1:],
    }


def _ranges(starts: np.ndarray, count: int) -> list[str]:
    ends = [*(starts[1:] - 1).tolist(), count - 1]
    return [str(a) if a == b else f"{a}–{b}" for a, b in zip(starts.tolist(), ends, strict=True)]


def _experts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The load of each layer's busiest expert, and that of the worst layer."""
    found = [(row, load) for row in rows if isinstance(load := row.get("load_max"), list) and load]
    if not found:
        return None
    layers = Counter(len(load) for _, load in found).most_common(1)[0][0]
    found = [(row, load) for row, load in found if len(load) == layers]
    said = (names for row, _ in found if isinstance(names := row.get("layers"), list) and len(names) == layers)
    names = next(said, list(range(layers)))
    loads = np.array([[known_number(value) for value in load] for _, load in found])
    by_time, by_layer = starts_of(len(found), _WINDOWS), starts_of(layers, _LAYERS)
    steps = np.array([row["step"] for row, _ in found])
    joined = most_of(most_of(loads, by_time).T, by_layer)
    starts = starts_of(len(found))
    return {
        "step": last_of(steps, by_time).tolist(),
        "rows": [_short(names[i]) for i in by_layer.tolist()],
        "values": [[None if math.isnan(v) else round(v, 3) for v in row] for row in joined.tolist()],
        "x": last_of(steps, starts).tolist(),
        "worst": {name: line(_worst([row for row, _ in found], name), starts) for name in ("load_max", "load_min")},
    }


def _worst(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    found = []
    for row in rows:
        worst = row.get("worst")
        value = worst.get(name) if isinstance(worst, dict) else None
        found.append(known_number(value[0]) if isinstance(value, list) and value else math.nan)
    return np.array(found)


def _events(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The newest, and how many there are of each kind."""
    rows = []
    for event in events[-_EVENTS:]:
        rest = {key: value for key, value in event.items() if key not in ("time", "event", "step")}
        time, step = known_number(event.get("time")), known_number(event.get("step"))
        rows.append(
            {
                "time": round(time, 1) if math.isfinite(time) else None,
                "step": int(step) if math.isfinite(step) else None,
                "event": _short(event.get("event", "")),
                "text": _short("  ".join(f"{key} {_value(value)}" for key, value in rest.items())),
            }
        )
    return {"total": len(events), "rows": rows, "kinds": Counter(_short(e.get("event", "")) for e in events)}


def _value(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _TEXT else text[: _TEXT - 1] + "…"
