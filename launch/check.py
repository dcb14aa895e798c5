"""`pentad check`: what a job is and needs, without any device. `pentad flops` as a table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ..configs import Config, load
from ..models.flops import CONVENTION, flops_per_token, flops_per_token_full_attention, parameter_count
from ..trainer.pipeline import Pipeline
from ..trainer.preflight import preflight
from .memory import GIB, Memory, estimate, expert_replicas
from .train import world_size


def check(config: str, overrides: Sequence[str]) -> None:
    """Validates a job and prints its layout, parameters, FLOPs per token and memory per rank.

    Raises:
        UserError: every problem found.
    """
    cfg = load(config, overrides)
    preflight(cfg)
    memory = estimate(cfg)
    console = Console(highlight=False)
    for table in (_layout(cfg), _model(cfg, memory), _memory(cfg, memory)):
        console.print(table)
    console.print(f"FLOPs: {CONVENTION}", style="dim", soft_wrap=True)
    available = cfg.hardware.memory_gib
    if available is not None and memory.total > available * GIB:
        message = (
            f"warning: about {memory.total / GIB:.3g} GiB per rank are needed and hardware.memory_gib={available:g}; "
            f"raise {_what_to_raise(cfg)}, lower train.micro_batch, or set memory.recompute=full"
        )
        print(message, file=sys.stderr)


def _what_to_raise(cfg: Config) -> str:
    if cfg.model.moe.experts:
        return "parallel.ep, parallel.tp or parallel.pp"
    return "parallel.tp, parallel.pp or parallel.dp (with parallel.data.sharding=fsdp)"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=bool(columns))
    for column in columns or ("", ""):
        table.add_column(column, justify="left" if column in ("", "part", "axis", "how") else "right")
    return table


def _layout(cfg: Config) -> Table:
    p, t = cfg.parallel, cfg.train
    dp = p.dp or 1
    ranks = world_size(cfg)
    microbatches = t.global_batch // (t.micro_batch * dp)
    tokens = t.global_batch * t.seq_len
    table = _table("layout")
    degrees = " × ".join(f"{axis} {size}" for axis, size in (("tp", p.tp), ("cp", p.cp), ("dp", dp), ("pp", p.pp)))
    table.add_row("ranks", f"{degrees} = {ranks}")
    for row in _experts(cfg) if cfg.model.moe.experts else ():
        table.add_row(*row)
    table.add_row("data parallelism", p.data.sharding)
    for row in _pipeline(cfg) if p.pp > 1 else ():
        table.add_row(*row)
    table.add_row("precision", t.dtype)
    batch = f"{dp} dp × {microbatches} micro-batches × {t.micro_batch} sequences"
    table.add_row("global batch", f"{t.global_batch} sequences = {batch}")
    table.add_row("tokens", f"{tokens:,} a step, {tokens * t.steps:,} in {t.steps:,} steps")
    return table


def _experts(cfg: Config) -> list[tuple[str, str]]:
    """The expert mesh and the layers that it serves, one row each."""
    p, model, edp = cfg.parallel, cfg.model, expert_replicas(cfg)
    moe = model.moe
    mesh = f"etp {p.etp} × ep {p.ep} × edp {edp} = {p.etp * p.ep * edp}" + " of each stage" * (p.pp > 1)
    share = f", {moe.experts // p.ep} on a rank" if p.ep > 1 else ""
    layers = f"in {len(model.moe_layers)} of {model.layers} layers"
    return [("ranks, for experts", mesh), ("experts", f"{moe.experts}, {moe.top_k} per token, {layers}{share}")]


def _pipeline(cfg: Config) -> list[tuple[str, str]]:
    """Schedule, stages and vocabulary, one row each."""
    p, pipeline = cfg.parallel.pipeline, Pipeline.of(cfg)
    chunks = f", {p.chunks} chunks per rank" if p.chunks != 1 else ""
    vocab = (
        f"balanced, {p.vocab_barriers} barrier{'s' * (p.vocab_barriers > 1)}" if pipeline.split.balanced else p.vocab
    )
    counts = " ".join(str(len(layers)) for layers in pipeline.split.layers)
    return [
        ("pipeline", f"{p.schedule}{chunks}"),
        ("layers of the stages", counts),
        ("vocabulary", vocab),
    ]


def _model(cfg: Config, memory: Memory) -> Table:
    counts = parameter_count(cfg.model)
    local = memory.local
    seq_len = cfg.train.seq_len
    table = _table("model")
    table.add_row("parameters", f"{counts.total:,} ({counts.active:,} active per token)")
    where = f"pipeline rank {memory.rank}" if cfg.parallel.pp > 1 else "a rank"
    experts = f" ({local.experts:,} in experts)" if local.experts else ""
    table.add_row(f"parameters of {where}", f"{local.total:,}{experts}, before data parallel sharding")
    unmasked = flops_per_token(cfg.model, seq_len)
    table.add_row("FLOPs per token", f"{_engineering(unmasked)}, unmasked attention (mfu)")
    full = flops_per_token_full_attention(cfg.model, seq_len)
    table.add_row("", f"{_engineering(full)}, full attention (mfu_full)")
    table.add_row("FLOPs per step", _engineering(unmasked * cfg.train.global_batch * seq_len))
    return table


def _memory(cfg: Config, memory: Memory) -> Table:
    where = f"pipeline rank {memory.rank}, which needs most" if cfg.parallel.pp > 1 else "a rank"
    table = _table(f"memory of {where} (estimate)", "part", "GiB", "how")
    precise = "fp64" if cfg.train.dtype == "fp64" else "fp32"
    sharded = cfg.parallel.data.sharding
    over = _sharded_over(cfg) if sharded != "ddp" else ""
    parameters = f"{precise} masters{over}" if sharded == "fsdp" else cfg.train.dtype
    rows = [
        ("parameters", memory.parameters, parameters),
        ("gradients", memory.gradients, precise + (over if sharded == "fsdp" and _is_sharded(memory) else "")),
        ("masters", memory.masters, precise + over),
        ("optimizer states", memory.states, f"{cfg.optim.name}, {precise}{over}"),
        ("gathered layers", memory.gathered, cfg.train.dtype),
        ("activations", memory.activations, _in_flight(cfg)),
        ("working memory", memory.working, "head, or one layer's backward"),
    ]
    for part, size, how in rows:
        if size:
            table.add_row(part, f"{size / GIB:.3f}", how)
    table.add_section()
    available = cfg.hardware.memory_gib
    table.add_row("total", f"{memory.total / GIB:.3f}", "" if available is None else f"of {available:g} GiB")
    return table


def _sharded_over(cfg: Config) -> str:
    share = (cfg.parallel.dp or 1) * cfg.parallel.cp
    replicas = expert_replicas(cfg) if cfg.model.moe.experts else share
    if replicas != share:
        return f", sharded over {share}, experts over {replicas}"
    return f", sharded over {share}" if share > 1 else ""


def _in_flight(cfg: Config) -> str:
    tokens = f"{cfg.train.micro_batch} × {cfg.train.seq_len} tokens"
    kept = ", inputs of the layers only" if cfg.memory.recompute == "full" else ""
    return f"{tokens} per micro-batch in flight{kept}" if cfg.parallel.pp > 1 else tokens + kept


def _is_sharded(memory: Memory) -> bool:
    return memory.gradients == memory.parameters


def _engineering(value: float) -> str:
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.4g} {prefix}FLOP"
    return f"{value:.0f} FLOP"


def print_flops(result: dict[str, Any]) -> None:
    """The report of `pentad.models.flops.report` as a table."""
    console = Console(highlight=False)
    table = _table(f"{result['model']}, sequences of {result['seq_len']:,} tokens")
    table.add_row("parameters", f"{result['params_total']:,}")
    table.add_row("active per token", f"{result['params_active']:,}")
    table.add_row("FLOPs per token", f"{_engineering(result['flops_per_token'])}, unmasked attention (mfu)")
    table.add_row("", f"{_engineering(result['flops_per_token_full_attention'])}, full attention (mfu_full)")
    for kind, flops in result["breakdown"].items():
        if flops:
            table.add_row(f"  {kind}", _engineering(flops))
    if result["params_active"] < result["params_total"]:
        table.add_row("for S-MFU (MoE-CAP)", _engineering(result["s_mfu_flops_per_token"]))
    console.print(table)
    console.print(result["convention"], style="dim", soft_wrap=True)
