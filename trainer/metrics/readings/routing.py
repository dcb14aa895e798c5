"""What the mixture-of-experts layers did in a step: the `moe` object of metrics.jsonl, tracker values, the heat map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ....configs.schema import Config, ModelConfig
from ....models.costs.flops import s_mfu_flops_per_step, step_flops
from ....models.costs.parameters import active_experts
from ....models.routing.tally_fields import FIELDS
from ..formats import fixed
from ..metric import Column, Metric, Picture
from .protocol import Reading, RunFacts, StepDone
from .utilization import per_peak

_COLUMN = {name: i for i, name in enumerate(FIELDS)}
_LOWEST_IS_WORST = ("load_min", "entropy")
_OF_EVERY_LAYER = ("dropped", "entropy")
"""What trackers get for every layer, beside `max_vio`; of the rest the mean and the worst layer."""
_DIGITS = 6
"""Significant digits of the reported values: a model with 60 layers has several hundred of them a step."""


@dataclass(frozen=True)
class HeatMap:
    """The load of every expert in one step, over the mean of its layer.

    Args:
        step: of the training.
        layers: each row's layer; modules of multi-token prediction count on from the last one.
        load: (layers, experts), 1 where the load is even.
    """

    step: int
    layers: tuple[int, ...]
    load: np.ndarray


def _busiest(moe: Mapping[str, Any]) -> str:
    """The load of the busiest expert, over the mean one, of the worst layer."""
    value = moe["worst"]["load_max"][0]
    return "-" if math.isnan(value) else fixed(value, 4, 2)


class RoutingReading(Reading):
    """The routers' counts: the object of metrics.jsonl, and the same for trackers, with a heat map at some steps."""

    metrics = (
        Metric(
            "moe",
            "object, below; `null` for a model without experts",
            column=Column("load", 4, _busiest, colour="33", order=100),
        ),
        Metric("moe_tracked", "of the routers, below", in_file=False, tracker="moe"),
    )

    def __init__(self, run: RunFacts) -> None:
        super().__init__(run)
        if not run.cfg.model.moe.experts:
            moe, *others = self.metrics
            self.metrics = (replace(moe, column=None), *others)

    def step(self, done: StepDone) -> Mapping[str, Any]:
        if done.routed is None:
            return {}
        cfg, share = self.run.cfg, per_peak(self.run, done.seconds)
        sparse = sparse_flops(cfg.model, done.tokens, done.pairs, done.routed)
        moe = {**summarize_routing(done.routed, cfg), "s_mfu": None if share is None else sparse * share}
        tracked = tracker_values(moe)
        if is_pictured(cfg, done.step):
            tracked["load"] = Picture(image(heat_map(done.routed, cfg, done.step)))
        return {"moe": moe, "moe_tracked": tracked}


def summarize_routing(totals: np.ndarray, cfg: Config) -> dict[str, Any]:
    """The `moe` object of metrics.jsonl: a list over the layers per metric, then `mean` and `worst` over the layers.

    Loads are assignments of tokens to experts before any is dropped. What has no value (an entropy without tokens) is
    NaN. docs/metrics.md explains every key.

    Args:
        totals: (layers, columns), sums of a step over all ranks, as `routing.balance` counts them.
        cfg: the job.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        metrics = _per_layer(totals, cfg)
    layers = cfg.model.routed_layers
    return {
        "layers": list(layers),
        **{name: _rounded(values) for name, values in metrics.items()},
        "mean": {name: _rounded(values.mean()) for name, values in metrics.items()},
        "worst": {name: _worst(name, values, layers) for name, values in metrics.items()},
    }


def _per_layer(totals: np.ndarray, cfg: Config) -> dict[str, np.ndarray]:
    """(layers,) of each metric."""
    field = {name: totals[:, i] for name, i in _COLUMN.items()}
    load = _load(totals, cfg.model)
    mean = load.mean(1)
    metrics = {
        "load_max": load.max(1) / mean,
        "load_min": load.min(1) / mean,
        "load_std": load.std(1) / mean,
        "dropped": field["dropped"] / field["assignments"],
        "null": field["null"] / (field["null"] + field["assignments"]),
        "entropy": field["entropy"] / field["tokens"],
        "top1": field["top1"] / field["tokens"],
    }
    if cfg.model.moe.router.aux_loss:
        metrics["aux"] = field["aux"]
    metrics["z"] = field["z"]
    if cfg.parallel.ep > 1:
        ranks = load.reshape(len(load), cfg.parallel.ep, -1).sum(2)  # a rank's experts stand side by side
        metrics["ep_load_max"] = ranks.max(1) / ranks.mean(1)
    return metrics


def _load(totals: np.ndarray, model: ModelConfig) -> np.ndarray:
    """(layers, experts) assignments, without the null experts."""
    return totals[:, len(FIELDS) : len(FIELDS) + model.moe.experts]


def _worst(name: str, values: np.ndarray, layers: Sequence[int]) -> list[Any]:
    """The value of the worst layer, and which one it is; NaN and none where no layer has a value."""
    if np.isnan(values).all():
        return [math.nan, None]
    at = int(np.nanargmin(values) if name in _LOWEST_IS_WORST else np.nanargmax(values))
    return [_rounded(values[at]), layers[at]]


def _rounded(value: Any) -> Any:
    """A float, or a list of them, with the digits that are reported."""
    if isinstance(value, np.ndarray):
        return [_rounded(v) for v in value]
    return float(f"{float(value):.{_DIGITS}g}")


def heat_map(totals: np.ndarray, cfg: Config, step: int) -> HeatMap:
    """The picture's numbers; a layer without assignments counts as even.

    Args:
        totals: as of `summarize`.
        step: optimizer steps done.
    """
    load = _load(totals, cfg.model)
    mean = load.mean(1, keepdims=True)
    return HeatMap(step, cfg.model.routed_layers, np.divide(load, mean, out=np.ones_like(load), where=mean > 0))


def is_pictured(cfg: Config, step: int) -> bool:
    """Whether trackers get the heat map of a step: at every evaluation and the last step, else every 100 steps."""
    if not (cfg.log.wandb or cfg.log.tensorboard):
        return False
    return step == cfg.train.steps or step % (cfg.eval.every or 100) == 0


def sparse_flops(model: ModelConfig, tokens: int, pairs: float, totals: np.ndarray) -> float:
    """FLOPs of a step as S-MFU counts them (`costs.flops.s_mfu_flops_per_step`), with the experts that really ran.

    The closed form assumes `top_k` experts per token (with null experts their even share); here these FLOPs are scaled
    by the counted assignments that were neither null nor dropped.

    Args:
        tokens, pairs: as of `models.costs.flops.step_flops`.
        totals: as of `summarize`.
    """
    counted = totals[:, _COLUMN["assignments"]].sum() - totals[:, _COLUMN["dropped"]].sum()
    expected = float(totals[:, _COLUMN["tokens"]].sum()) * active_experts(model)
    ratio = float(counted) / expected if expected else 1.0
    return s_mfu_flops_per_step(model, tokens, pairs) + step_flops(model, tokens, pairs).experts * (ratio - 1)


def tracker_values(moe: Mapping[str, Any]) -> dict[str, Any]:
    """Scalars of a step's `moe` object for W&B and TensorBoard, by key without the `moe/` in front.

    `max_vio`, which the field plots (arXiv 2408.15664, section 4.1), is load_max − 1.
    """
    layers = moe["layers"]
    values: dict[str, Any] = {f"max_vio/{layer}": load - 1 for layer, load in zip(layers, moe["load_max"], strict=True)}
    for name in _OF_EVERY_LAYER:
        values.update({f"{name}/{layer}": value for layer, value in zip(layers, moe[name], strict=True)})
    values.update({f"mean/{name}": value for name, value in moe["mean"].items()})
    values.update({f"worst/{name}": value for name, (value, _) in moe["worst"].items()})
    values["s_mfu"] = moe["s_mfu"]
    return values


def image(heat: HeatMap) -> np.ndarray:
    """The heat map as a picture (height, width, 3) of bytes: blue below the mean, red above it, white at it.

    Loads of twice the mean and more look the same, so that pictures of different steps can be compared.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, experts = heat.load.shape
    height = min(1.4 + 0.22 * rows, 12.0)
    figure = Figure(figsize=(min(3.5 + 0.12 * experts, 14.0), height), dpi=100, layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(heat.load, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", interpolation="nearest")
    shown = range(0, rows, max(1, rows // 32))
    axes.set_yticks(list(shown), [str(heat.layers[row]) for row in shown], fontsize=7)
    axes.set(xlabel="expert", ylabel="layer")
    axes.set_title(f"load of each expert over the mean, step {heat.step}", fontsize=9, loc="left")
    figure.colorbar(drawn, ax=axes, extend="max")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
