"""Fill in what is derived from other keys. No torch; only the files that tell a vocabulary are read."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path

from .errors import UserError
from .paths import default_checkpoint_folder, resolve_paths
from .reading.program_file import read_frame
from .schema import (
    Config,
    ContextConfig,
    DataConfig,
    FaultsConfig,
    ModelConfig,
    MoeConfig,
    ParallelConfig,
    PipelineConfig,
    RopeConfig,
)
from .schema_data import TokenizedData
from .tables.context_methods import CONTEXT_METHODS
from .tables.schedules import SCHEDULES, default_chunks, is_program
from .tokenized import read_metas
from .vocabulary import initial_vocab, padded

BYTE_TOKENS = 257
"""256 bytes and the end-of-document token of the built-in tokenizer."""


def resolve(config: Config, world_size: int | None = None) -> Config:
    """Replace every derivable None; values that cannot be derived stay None and `validate` says why.

    Args:
        config: as read.
        world_size: number of ranks; None: not known yet, and parallel.dp becomes 1 where it was not given.
    """
    config = resolve_paths(config)
    cache = config.data.cache if config.data.cache is not None else str(_user_cache() / "pentad")
    folder = config.checkpoint.dir
    model = _resolve_padding(resolve_model(config.model, config.train.seq_len, config.data), config.checkpoint.init)
    return replace(
        config,
        model=model,
        parallel=resolve_parallel(config.parallel, model, world_size),
        data=replace(config.data, cache=cache),
        faults=_resolve_faults(config.faults),
        checkpoint=replace(
            config.checkpoint,
            dir=folder if folder is not None else default_checkpoint_folder(config),
        ),
    )


def _resolve_faults(faults: FaultsConfig) -> FaultsConfig:
    """The limits that are not given, each below the next: else a wait's time-out would hide who is waited for."""
    most = faults.timeout_s
    alive = min(max(most / 60, 5.0), most / 4) if faults.alive_s is None else faults.alive_s
    hang = min(max(most / 10, 2 * alive), most / 3) if faults.hang_s is None else faults.hang_s
    pause = max(most / 2, (hang + most) / 2) if faults.pause_s is None else faults.pause_s
    return replace(faults, alive_s=alive, hang_s=hang, pause_s=pause)


def resolve_model(model: ModelConfig, seq_len: int, data: DataConfig | None = None) -> ModelConfig:
    """The model with kv_heads, head_dim, vocab, max_positions, the rope's attention factor and the experts' sizes.

    Args:
        model: as read.
        seq_len: tokens per sequence; the default of max_positions.
        data: whose tokenizer gives the vocabulary where model.vocab is None; None: the vocabulary is left alone.
    """
    head_dim = model.head_dim
    if head_dim is None and model.mla.kv_rank:
        head_dim = model.mla.nope_dim + model.mla.rope_dim
    if head_dim is None and model.heads > 0 and model.hidden % model.heads == 0:
        head_dim = model.hidden // model.heads
    vocab = model.vocab
    if vocab is None and data is not None:
        vocab = tokenizer_vocab(data)
        vocab = None if vocab is None else padded(vocab)
    return replace(
        model,
        kv_heads=model.heads if model.kv_heads is None else model.kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        max_positions=seq_len if model.max_positions is None and seq_len > 0 else model.max_positions,
        rope=_resolve_rope(model.rope),
        moe=_resolve_moe(model.moe, model.ffn),
    )


def _resolve_padding(model: ModelConfig, init: str | None) -> ModelConfig:
    """What the vocabulary has beyond that of the weights that start the run is padding."""
    if init is None or model.vocab is None or model.vocab_used is not None:
        return model
    known = initial_vocab(init)
    return replace(model, vocab_used=known) if known is not None and known < model.vocab else model


def tokenizer_vocab(data: DataConfig) -> int | None:
    """Number of token ids of the job's tokenizer, unpadded.

    Of tokenized data: of the tokenizers that made it, as PREFIX.meta.json says, or of data.tokenizer.path. None for
    files that are missing or damaged, and for tokens of unknown origin.
    """
    if isinstance(data, TokenizedData):
        known = _vocab_of_tokens(data)
        if known is not None or data.tokenizer.path is None:
            return known
    elif data.tokenizer.path is None:
        return BYTE_TOKENS
    try:
        content = json.loads(Path(data.tokenizer.path).read_text(encoding="utf-8"))
        vocab = content["model"]["vocab"]
        ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
        ids += [token["id"] for token in content.get("added_tokens") or []]
        return max(ids) + 1
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _vocab_of_tokens(data: TokenizedData) -> int | None:
    try:
        return max((meta.coding.vocab for meta in read_metas(data) or ()), default=None)
    except UserError:
        return None  # whoever opens the files says what is wrong with them


def _resolve_rope(rope: RopeConfig) -> RopeConfig:
    if rope.attention_factor is not None:
        return rope
    return replace(rope, attention_factor=yarn_scale(rope.factor) if rope.scaling == "yarn" else 1.0)


def yarn_scale(factor: float, coefficient: float = 1.0) -> float:
    """What YaRN multiplies cos and sin by for contexts so many times longer: 1 / sqrt(t) = 0.1 ln(s) + 1 (Peng et al.,
    2023, eq. 22); DeepSeek's `mscale` is a coefficient of the logarithm."""
    return 0.1 * coefficient * math.log(factor) + 1.0 if factor > 1 else 1.0


def _resolve_moe(moe: MoeConfig, ffn: int) -> MoeConfig:
    router = moe.router
    kept = router.groups if router.groups_kept is None and router.groups >= 1 else router.groups_kept
    return replace(moe, ffn=ffn if moe.ffn is None else moe.ffn, router=replace(router, groups_kept=kept))


def resolve_parallel(parallel: ParallelConfig, model: ModelConfig, world_size: int | None = None) -> ParallelConfig:
    """The section with everything that follows from the rest of it, from the resolved model and the number of ranks."""
    context = resolve_context(parallel, model)
    parallel = replace(parallel, context=context, pipeline=_resolve_pipeline(parallel.pipeline, parallel.pp))
    if parallel.dp is not None:
        return parallel
    if world_size is None:
        return replace(parallel, dp=1)
    inner = parallel.model_ranks
    divides = inner > 0 and world_size % inner == 0
    return replace(parallel, dp=world_size // inner) if divides else parallel


def _resolve_pipeline(pipeline: PipelineConfig, pp: int) -> PipelineConfig:
    chunks, schedule = pipeline.chunks, pipeline.schedule
    if schedule is None:
        schedule = "1f1b" if chunks is None or chunks == 1 else "gis"
    if is_program(schedule):
        return replace(pipeline, chunks=_stages_per_rank(schedule) if chunks is None and pp > 1 else chunks or 1)
    if chunks is None:
        chunks = default_chunks(schedule)
    group = pp if pipeline.group is None and SCHEDULES[schedule].group is not None else pipeline.group
    return replace(pipeline, schedule=schedule, chunks=chunks, group=group)


def _stages_per_rank(file: str) -> int:
    try:
        return read_frame(file).chunks
    except UserError:
        return 1  # `validate` says what is wrong with it


def resolve_context(parallel: ParallelConfig, model: ModelConfig) -> ContextConfig:
    """The context section with method, inner and placement filled in.

    Per rank and pass Ulysses sends (P − 1) / P · 2 (H + K) · d numbers a token and a ring 2 (P − 1) · K · d · 3/4, so
    with P ranks and H / K = g query heads per key-value head Ulysses sends less from 3/4 · P > 1 + g on. Latent
    attention has one narrow vector a token to gather, a few per cent of its keys and values.
    """
    context, cp = parallel.context, parallel.cp
    linear = bool(model.linear_layers)
    placement = context.placement or ("contiguous" if linear else "zigzag")
    if cp <= 1 or model.kv_heads is None or model.heads < 1 or model.kv_heads < 1:
        return replace(context, placement=placement)
    heads, kv_heads = max(1, model.heads // parallel.tp), max(1, model.kv_heads // parallel.tp)
    method = context.method
    if method == "auto":
        # Only what travels from rank to rank can pass those by that have no use for it.
        cheapest = "allgather" if model.mla.kv_rank else _cheapest(cp, heads, kv_heads, linear=linear)
        method = "ring" if placement == "by_length" else cheapest
    inner = context.inner
    if inner is None and CONTEXT_METHODS[method].exchanges == "inner":
        inner = _largest_inner(cp, heads, kv_heads)
    return replace(context, method=method, inner=inner, placement=placement)


def divides(cp: int, heads: int, kv_heads: int) -> bool:
    """Whether heads can be exchanged over so many ranks; key-value heads may be copied."""
    return heads % cp == 0 and (kv_heads % cp == 0 or cp % kv_heads == 0)


def _cheapest(cp: int, heads: int, kv_heads: int, *, linear: bool) -> str:
    exchange = divides(cp, heads, kv_heads)
    if linear:
        return "ulysses" if exchange else "allgather"
    if exchange and 0.75 * cp > 1 + heads / kv_heads:
        return "ulysses"
    return "ring"


def _largest_inner(cp: int, heads: int, kv_heads: int) -> int:
    """The largest part of cp whose ranks can exchange heads without copies, or else 1."""
    return max(size for size in range(1, cp + 1) if cp % size == 0 and heads % size == 0 and kv_heads % size == 0)


def _user_cache() -> Path:
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        # No home folder: containers that run under a bare user id.
        return Path(tempfile.gettempdir())
