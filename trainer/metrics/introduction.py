"""What a run is, in the few lines that its console shows before the first step."""

from __future__ import annotations

from ...configs.reading.spread import point
from ...configs.schema import Config
from ...models.costs.flops import parameter_count
from ..data.dataset import Dataset
from ..data.plan import describe_data, plan_data
from ..pipeline.programs import Pipeline
from ..setup import degrees_of
from .peak import Peak


def introduction(cfg: Config, data: Dataset, peak: Peak, *, device: str, apart: str) -> list[str]:
    """Model, layout, pipeline, experts, links and data, a line for each that there is.

    Args:
        cfg: resolved.
        data: opened for the job.
        peak: of one device.
        device: the type of the devices.
        apart: why the ranks' links are slow; empty where they are not.
    """
    asked = cfg.eval.steps if cfg.eval.every else 0
    plan = plan_data(data, steps=cfg.train.steps, global_batch=cfg.train.global_batch, eval_steps=asked)
    rate = "unknown" if peak.tflops is None else f"{peak.tflops:.3g} TFLOP/s"
    parameters = _millions(parameter_count(cfg.model).total)
    lines = [
        f"{cfg.name}: {cfg.model.family}, {parameters} parameters, {cfg.train.dtype} on {device}",
        _layout(cfg),
        _pipeline(cfg) if cfg.parallel.pp > 1 else "",
        _experts(cfg) if cfg.model.moe.experts else "",
        f"links: gloo, slower than out of each other's memory: {apart}" if apart else "",
        f"data: {cfg.data.name}, {data.tokens / 1e6:.1f} M tokens",
        *describe_data(plan),
        f"peak of a device: {rate} ({peak.source})",
    ]
    return [line for line in lines if line]


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 100_000 else f"{count:,}"


def _layout(cfg: Config) -> str:
    p, d, t = cfg.parallel, degrees_of(cfg), cfg.train
    context = f" × cp {d.cp} ({p.context.method})" if d.cp > 1 else ""
    microbatches = t.global_batch // (t.micro_batch * d.dp)
    batch = f"{microbatches} microbatches of {t.micro_batch} × {t.seq_len} tokens each"
    return f"layout: tp {d.tp} × pp {d.pp}{context} × dp {d.dp} ({point(cfg)}) = {d.world} ranks, {batch}"


def _pipeline(cfg: Config) -> str:
    p, counts = cfg.parallel.pipeline, Pipeline.of(cfg).counts
    stages = ", ".join(map(str, counts))
    return f"pipeline: {p.schedule}, {len(counts)} stages of {stages} layers, vocabulary {p.vocab}"


def _experts(cfg: Config) -> str:
    moe, (_, edp, ep, etp) = cfg.model.moe, degrees_of(cfg).expert
    layers = f"in {len(cfg.model.moe_layers)} of {cfg.model.layers} layers"
    mesh = f"; etp {etp} × ep {ep} × edp {edp}, {moe.dispatcher}" if ep * etp * edp > 1 else ""
    return f"experts: {moe.experts}, {moe.top_k} per token, {layers}{mesh}"
