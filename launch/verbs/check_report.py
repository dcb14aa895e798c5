"""The tables of `pentad check`: what a job is and needs."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from ...configs import Config, Problem, UserError
from ...configs.reading.deepspeed import zero_offload, zero_stage
from ...configs.reading.spread import dense_spread, expert_replicas, expert_spread, is_flat, point
from ...configs.schema import AdamWConfig
from ...configs.tables.layer_parts import LAYER_PARTS
from ...models.costs.flops import CONVENTION, flops_per_token, flops_per_token_full_attention, parameter_count
from ...models.costs.kept import Choice, SomeTokens
from ...models.costs.times import Rates
from ...trainer.memory.copies import hidden_share
from ...trainer.memory.estimate import GIB, Memory, per_rank
from ...trainer.pipeline.programs import Pipeline, offloads
from ..supervise.launcher import world_size
from .memory_table import bars, choice_table, rank_table
from .tables import engineering, table


def print_job(cfg: Config, picture: Path | None = None) -> None:
    """Prints layout, parameters, FLOPs per token and memory per rank.

    Args:
        cfg: resolved and valid.
        picture: where the ranks' memory is drawn, as SVG.

    Raises:
        UserError: the picture cannot be written.
    """
    ranks = per_rank(cfg)
    most = max(ranks, key=lambda memory: memory.total)
    console = Console(highlight=False)
    for each in (_layout(cfg), _model(cfg, most), rank_table(cfg, ranks), choice_table(cfg)):
        console.print(each)
    console.print(f"precision and sharding: {_precision(cfg)}", style="dim", soft_wrap=True)
    console.print(f"FLOPs: {CONVENTION}", style="dim", soft_wrap=True)
    if picture is not None:
        try:
            picture.write_text(bars(cfg, ranks), encoding="utf-8")
        except OSError as error:
            raise UserError(Problem("--svg", f"{picture} cannot be written: {error.strerror}")) from error


def _layout(cfg: Config) -> Table:
    p, t = cfg.parallel, cfg.train
    dp = p.dp
    ranks = world_size(cfg)
    microbatches = t.global_batch // (t.micro_batch * dp)
    tokens = t.global_batch * t.seq_len
    rows = table("layout")
    degrees = " × ".join(f"{axis} {size}" for axis, size in (("tp", p.tp), ("cp", p.cp), ("dp", dp), ("pp", p.pp)))
    rows.add_row("ranks", f"{degrees} = {ranks}")
    for row in _experts(cfg) if cfg.model.moe.experts else ():
        rows.add_row(*row)
    rows.add_row("data parallelism", point(cfg))
    for row in _pipeline(cfg) if p.pp > 1 else ():
        rows.add_row(*row)
    if cfg.memory.group is not None:
        rows.add_row("part-stages", f"{len(Pipeline.of(cfg).split.layers)} of at most {cfg.memory.group} layers")
    if cfg.memory.recompute != "none":
        rows.add_row("made again", _remade(cfg))
    for row in _copies(cfg) if offloads(cfg) else ():
        rows.add_row(*row)
    rows.add_row("precision", t.dtype)
    batch = f"{dp} dp × {microbatches} microbatches × {t.micro_batch} sequences"
    rows.add_row("global batch", f"{t.global_batch} sequences = {batch}")
    rows.add_row("tokens", f"{tokens:,} a step, {tokens * t.steps:,} in {t.steps:,} steps")
    return rows


def _remade(cfg: Config) -> str:
    """What layers make again, those together that do the same."""
    pipeline = Pipeline.of(cfg)
    said: list[tuple[str, list[int]]] = []
    for layer in range(cfg.model.layers + cfg.model.mtp):
        parts = _what(pipeline.choice(layer))
        if said and said[-1][0] == parts:
            said[-1][1].append(layer)
        else:
            said.append((parts, [layer]))
    if len(said) == 1:
        return f"{said[0][0]}, in every layer"
    spans = [(f"{mine[0]}-{mine[-1]}" if len(mine) > 1 else f"{mine[0]}", parts) for parts, mine in said]
    return "layers " + "; ".join(f"{layers}: {parts}" for layers, parts in spans)


def _what(choice: Choice) -> str:
    if isinstance(choice, str):
        return choice
    if not isinstance(choice, SomeTokens):
        return " + ".join(part for part in LAYER_PARTS if part in choice)
    whole = _what(choice.parts - choice.cut)
    return f"{_what(choice.cut)} of {choice.blocks.again:.1%} of tokens{whole and f', {whole} of all'}"


def _copies(cfg: Config) -> list[tuple[str, str]]:
    """What offloads are planned with."""
    rates = Rates.of(cfg.hardware, cfg.train.dtype)
    speeds = f"{rates.host_bytes / GIB:.4g} GiB/s each way beside {rates.flops / 1e12:.4g} TFLOP/s"
    hidden = hidden_share(cfg, rates)
    match hidden.whole:
        case ():
            what = "not even its input"
        case ("input",):
            what = "its input"
        case _ if hidden.share == 1:
            what = "all that it keeps"
        case _:
            what = f"its input, attention's result and {hidden.share:.0%} of what else it keeps"
    return [
        ("copies to the host", f"{speeds} ({rates.source})"),
        ("during a layer's forward", f"{what} can be copied"),
    ]


def _experts(cfg: Config) -> list[tuple[str, str]]:
    """The expert mesh and the layers that it serves, one row each."""
    p, model, edp = cfg.parallel, cfg.model, expert_replicas(cfg)
    moe = model.moe
    mesh = f"etp {p.etp} × ep {p.ep} × edp {edp} = {p.etp * p.ep * edp}{' of each stage' if p.pp > 1 else ''}"
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
    counts = " ".join(map(str, pipeline.counts))
    return [
        ("pipeline", f"{p.schedule}{chunks}"),
        ("layers of the stages", counts),
        ("vocabulary", vocab),
    ]


def _model(cfg: Config, memory: Memory) -> Table:
    counts = parameter_count(cfg.model)
    local = memory.held
    seq_len = cfg.train.seq_len
    rows = table("model")
    rows.add_row("parameters", f"{counts.total:,} ({counts.active:,} active per token)")
    where = f"pipeline rank {memory.rank}" if cfg.parallel.pp > 1 else "a rank"
    experts = f" ({local.experts:,} in experts)" if local.experts else ""
    rows.add_row(f"parameters of {where}", f"{local.local:,}{experts}, before data parallel sharding")
    unmasked = flops_per_token(cfg.model, seq_len)
    rows.add_row("FLOPs per token", f"{engineering(unmasked)}, unmasked attention (mfu)")
    full = flops_per_token_full_attention(cfg.model, seq_len)
    rows.add_row("", f"{engineering(full)}, full attention (mfu_full)")
    rows.add_row("FLOPs per step", engineering(unmasked * cfg.train.global_batch * seq_len))
    return rows


def _precision(cfg: Config) -> str:
    """In which type parameters, gradients, masters and states are, and over how many ranks each."""
    precise = "fp64" if cfg.train.dtype == "fp64" else "fp32"
    sharded = cfg.parallel.data.sharding
    over = _spread_over(cfg) if is_flat(cfg) else _sharded_over(cfg)
    states = f"{cfg.optim.name} in {_kept(cfg, precise)}{over}"
    if sharded == "deepspeed":
        kinds = ("states", "states and gradients", "parameters, gradients and states")[zero_stage(cfg) - 1]
        where = {"none": "", "optimizer": ", states on the host", "all": ", all on the host"}[zero_offload(cfg)]
        return f"DeepSpeed ZeRO {zero_stage(cfg)}: {kinds}{over}, fp32 masters, gathered in {cfg.train.dtype}{where}"
    if sharded == "fsdp2":
        return f"{precise} masters{over}, gathered in {cfg.train.dtype}; {states}"
    masters = f"masters in {precise}{over}, " if cfg.train.dtype == "bf16" else ""
    own = f" sharded over {dense_spread(cfg).grads} ranks" if dense_spread(cfg).grads > 1 else ""
    parts = f" sharded over {dense_spread(cfg).params} ranks" if dense_spread(cfg).params > 1 else ""
    gradients = f"parameters in {cfg.train.dtype}{parts}, gradients in {precise}{own}"
    return f"{gradients}, {masters}{states}"


def _kept(cfg: Config, precise: str) -> str:
    """How moments are kept."""
    states = cfg.optim.states if isinstance(cfg.optim, AdamWConfig) else "fp32"
    return precise if states == "fp32" else states


def _spread_over(cfg: Config) -> str:
    dense, experts = dense_spread(cfg), expert_spread(cfg)
    if dense.states == experts.states == 1:
        return ""
    copies = f", in {dense.copies} copies" if dense.copies > 1 else ""
    own = f" (experts {experts.states})" if cfg.model.moe.experts and experts.states != dense.states else ""
    return f" sharded over {dense.states} ranks{own}{copies}"


def _sharded_over(cfg: Config) -> str:
    share = cfg.parallel.dp * cfg.parallel.cp
    replicas = expert_replicas(cfg) if cfg.model.moe.experts else share
    if replicas != share:
        return f" sharded over {share} ranks (experts {replicas})"
    return f" sharded over {share} ranks" if share > 1 else ""
