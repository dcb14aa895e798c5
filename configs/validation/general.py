"""Checks across keys: one pure function without torch, which returns every problem instead of raising the first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import Problem
from ..fields import value_of
from ..resolve import BYTE_TOKENS
from ..schema import BinData, BlendData, Config, TextData, WsdSchedule
from ..schema_data import TokenizedData
from ..tokenized import META_SUFFIX
from ..vocabulary import indivisible_vocab, padded
from .context import validate_context
from .deepspeed import validate_deepspeed
from .divisible import indivisible
from .elastic import validate_elastic
from .faults import fault_problems
from .fp8 import validate_fp8
from .kernels import validate_kernels
from .layouts import layout_problems
from .memory import validate_memory
from .moe import validate_moe
from .pipeline import validate_pipeline
from .spread import validate_spread

LONGEST_NAME = 200
"""Bytes; file systems take 255, and files beside the folder add to its name."""
_POSITIVE = [
    "model.layers",
    "model.hidden",
    "model.heads",
    "model.kv_heads",
    "model.head_dim",
    "model.ffn",
    "model.vocab",
    "model.vocab_used",
    "model.max_positions",
    "model.window",
    "model.window_every",
    "model.attention_every",
    "model.linear.key_dim",
    "model.linear.value_dim",
    "model.linear.gate_rank",
    "model.linear.chunk",
    "model.rope.original_positions",
    "model.mla.q_rank",
    "model.mla.nope_dim",
    "model.mla.rope_dim",
    "model.mla.value_dim",
    "model.moe.top_k",
    "model.moe.ffn",
    "model.moe.every",
    "model.moe.router.groups",
    "model.moe.router.groups_kept",
    "model.moe.router.group_members",
    "parallel.tp",
    "parallel.pp",
    "parallel.cp",
    "parallel.ep",
    "parallel.etp",
    "parallel.context.inner",
    "parallel.dp",
    "hardware.ranks_per_node",
    "parallel.pipeline.chunks",
    "parallel.pipeline.group",
    "memory.recompute_every",
    "memory.recompute_layers",
    "train.steps",
    "train.global_batch",
    "train.micro_batch",
    "train.seq_len",
    "optim.schedule.decay_steps",
    "eval.steps",
    "eval.prompt_tokens",
    "checkpoint.local.keep",
    "log.every",
    "faults.max_bad_steps",
    "faults.record_entries",
]
_NOT_NEGATIVE = [
    "data.prefetch",
    "train.seed",
    "optim.schedule.warmup_steps",
    "optim.lr",
    "optim.weight_decay",
    "optim.clip",
    "eval.every",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.keep_every",
    "checkpoint.keep_best",
    "checkpoint.local.every",
    "faults.numerics.replicas_every",
    "faults.spares",
    "model.init_std",
    "model.mtp",
    "model.mtp_loss",
    "model.mla.kv_rank",
    "model.moe.experts",
    "model.moe.shared",
    "model.moe.dense_layers",
    "model.moe.router.bias_rate",
    "model.moe.router.null_experts",
    "model.moe.router.aux_loss",
    "model.moe.router.z_loss",
]
_ABOVE_ZERO = [
    "model.norm_eps",
    "model.rope.theta",
    "model.rope.factor",
    "model.rope.low_freq_factor",
    "model.rope.high_freq_factor",
    "model.rope.beta_fast",
    "model.rope.beta_slow",
    "model.rope.attention_factor",
    "model.rope.score_factor",
    "model.moe.capacity_factor",
    "model.moe.router.scale",
    "parallel.data.bucket_mib",
    "optim.eps",
    "faults.timeout_s",
    "faults.alive_s",
    "faults.hang_s",
    "faults.pause_s",
    "hardware.peak_tflops",
    "hardware.peak_fp8_tflops",
    "hardware.memory_gib",
    "hardware.host_gib_s",
    "memory.host_gib",
]
_FRACTIONS = [
    "model.dropout",
    "model.moe.router.jitter",
    "data.holdout",
    "optim.beta1",
    "optim.beta2",
    "optim.momentum",
]


def validate(config: Config, world_size: int | None = None) -> list[Problem]:
    """Every problem of a resolved configuration that follows from its values alone.

    Args:
        config: after `resolve`.
        world_size: number of ranks, where it is known.
    """
    ranges = _ranges(config)
    broken = {p.key for p in ranges}
    found = [
        *_layout(config, world_size),
        *_model(config),
        *_tensor_parallel(config),
        *validate_pipeline(config),
        *validate_moe(config),
        *validate_context(config),
        *validate_kernels(config),
        *validate_fp8(config),
        *validate_memory(config),
        *validate_deepspeed(config),
        *validate_spread(config),
        *validate_elastic(config),
        *_batches(config),
        *_schedule(config),
        *_data(config),
        *_run(config),
        *fault_problems(config),
        *layout_problems(config, validate),
    ]
    # A size that is out of its range makes the divisions by it meaningless; the range says enough.
    return ranges + [p for p in found if broken.isdisjoint(p.keys)]


def _ranges(config: Config) -> list[Problem]:
    rules: list[tuple[list[str], Callable[[Any], bool], str]] = [
        (_POSITIVE, lambda v: v >= 1, "at least 1"),
        (_NOT_NEGATIVE, lambda v: 0 <= v < float("inf"), "at least 0"),
        (_ABOVE_ZERO, lambda v: 0 < v < float("inf"), "above 0"),
        (_FRACTIONS, lambda v: 0 <= v < 1, "at least 0 and below 1"),
        (["optim.schedule.min_ratio"], lambda v: 0 <= v <= 1, "from 0 to 1"),
    ]
    problems = []
    for keys, holds, allowed in rules:
        for key in keys:
            value = value_of(config, key)
            if value is not None and not holds(value):
                problems.append(Problem(key, f"must be {allowed}, got {value}"))
    return problems


def _layout(config: Config, world_size: int | None) -> list[Problem]:
    p = config.parallel
    problems: list[Problem] = []
    if world_size is None:
        return problems
    inner = p.model_ranks
    degrees = f"parallel.tp={p.tp} x parallel.pp={p.pp} x parallel.cp={p.cp}"
    if inner > 0 and world_size % inner:
        message = (
            f"{degrees} = {inner} does not divide the world size {world_size}; start {inner} ranks or a multiple of "
            f"{inner}, or set smaller degrees"
        )
        problems.append(Problem("parallel.tp", message, ("parallel.pp", "parallel.cp")))
    elif p.dp is not None and inner * p.dp != world_size:
        message = (
            f"{degrees} x parallel.dp={p.dp} = {inner * p.dp} ranks, but the world size is {world_size}; "
            f"set parallel.dp={world_size // max(inner, 1)} or leave it out"
        )
        problems.append(Problem("parallel.dp", message, ("parallel.tp", "parallel.pp", "parallel.cp")))
    return problems


def _model(config: Config) -> list[Problem]:
    m, seq_len = config.model, config.train.seq_len
    problems: list[Problem] = []
    if m.head_dim is None and m.heads > 0:
        problems += indivisible("model.hidden", m.hidden, "model.heads", m.heads, "or give model.head_dim")
    if m.kv_heads:
        problems += indivisible(
            "model.heads", m.heads, "model.kv_heads", m.kv_heads, "each key head serves whole groups of query heads"
        )
    chunk = m.linear.chunk
    if chunk > 0 and chunk & (chunk - 1):
        message = f"must be a power of two (a chunk is halved again and again), got {chunk}; set 64"
        problems.append(Problem("model.linear.chunk", message))
    if m.position == "rope":
        problems += _rope(config)
    elif m.max_positions is not None and m.max_positions < seq_len:
        message = (
            f"{m.max_positions} learned positions are fewer than train.seq_len={seq_len}; "
            f"set train.seq_len={m.max_positions} or less"
        )
        problems.append(Problem("model.max_positions", message, ("train.seq_len",)))
    return problems + _vocab(config)


def _rope(config: Config) -> list[Problem]:
    m = config.model
    problems = []
    if m.head_dim is not None and m.head_dim % 2 and not m.mla.kv_rank:
        message = (
            f"must be even, rotary embedding turns pairs; got {m.head_dim} (by default model.hidden / model.heads)"
        )
        problems.append(Problem("model.head_dim", message, ("model.hidden", "model.heads")))
    low, high = m.rope.low_freq_factor, m.rope.high_freq_factor
    if m.rope.scaling == "llama3" and not low < high:
        message = f"must be above model.rope.low_freq_factor={low}, got {high}"
        problems.append(Problem("model.rope.high_freq_factor", message, ("model.rope.low_freq_factor",)))
    if m.rope.scaling == "yarn" and not m.rope.beta_slow <= m.rope.beta_fast:
        message = f"must be at least model.rope.beta_slow={m.rope.beta_slow}, got {m.rope.beta_fast}"
        problems.append(Problem("model.rope.beta_fast", message, ("model.rope.beta_slow",)))
    if m.rope.scaling != "none" and m.rope.factor < 1:
        message = f"must be at least 1 with scaling, got {m.rope.factor}"
        problems.append(Problem("model.rope.factor", message, ("model.rope.scaling",)))
    return problems


def _vocab(config: Config) -> list[Problem]:
    vocab, data = config.model.vocab, config.data
    if vocab is None:
        if isinstance(data, TokenizedData):
            reason = f"data.name={data.name} has no tokenizer to derive it from: no PREFIX{META_SUFFIX} says it"
            if data.tokenizer.path is not None:
                reason += f", and data.tokenizer.path={data.tokenizer.path} cannot be read"
        else:
            reason = f"data.tokenizer.path={data.tokenizer.path} is not a tokenizer.json that can be read"
        message = f"missing, and {reason}; set model.vocab"
        return [Problem("model.vocab", message, ("data.name", "data.paths", "data.weights", "data.tokenizer.path"))]
    used = config.model.vocab_used
    if used is not None and used > vocab:
        message = f"{used} is more than model.vocab={vocab}; set model.vocab={padded(used)}"
        return [Problem("model.vocab_used", message, ("model.vocab",))]
    tokenized = isinstance(data, TokenizedData)  # whose largest token counts, not what its tokenizer has
    if not tokenized and data.tokenizer.path is None and config.model.used_vocab < BYTE_TOKENS:
        key, size = ("model.vocab", 320) if used is None else ("model.vocab_used", BYTE_TOKENS)
        message = f"{config.model.used_vocab} is smaller than the byte tokenizer's {BYTE_TOKENS} tokens"
        return [Problem(key, f"{message}; set {key}={size}", ("data.name", "data.tokenizer.path"))]
    return []


def _tensor_parallel(config: Config) -> list[Problem]:
    m, t, tp = config.model, config.train, config.parallel.tp
    if tp <= 1:
        return []
    problems = indivisible("model.heads", m.heads, "parallel.tp", tp, "heads are split over the tensor ranks")
    if m.kv_heads and m.kv_heads % tp and tp % m.kv_heads:
        message = (
            f"{m.kv_heads} and parallel.tp={tp}: one must be a multiple of the other; "
            f"set parallel.tp={m.kv_heads} or change model.kv_heads"
        )
        problems.append(Problem("model.kv_heads", message, ("model.heads", "parallel.tp")))
    if m.moe.every < 1 or len(m.moe_layers) < m.layers:
        problems += indivisible("model.ffn", m.ffn, "parallel.tp", tp, "it is split over the tensor ranks")
    if m.vocab is not None:
        problems += indivisible_vocab(m.vocab, "parallel.tp", tp)
    tokens = t.micro_batch * t.seq_len
    if tokens % tp:
        message = (
            f"train.micro_batch={t.micro_batch} x train.seq_len={t.seq_len} = {tokens} tokens are not a multiple of "
            f"parallel.tp={tp} (sequence parallelism splits them); set train.seq_len={-(-t.seq_len // tp) * tp}"
        )
        problems.append(Problem("train.seq_len", message, ("train.micro_batch", "parallel.tp")))
    return problems


def _batches(config: Config) -> list[Problem]:
    t, dp = config.train, config.parallel.dp
    if dp is None:
        return []
    unit = t.micro_batch * dp
    if unit < 1 or t.global_batch % unit == 0:
        return []
    message = (
        f"{t.global_batch} is not a multiple of train.micro_batch={t.micro_batch} x "
        f"parallel.dp={dp} = {unit}; set train.global_batch={-(-t.global_batch // unit) * unit}"
    )
    return [Problem("train.global_batch", message, ("train.micro_batch", "parallel.dp"))]


def _schedule(config: Config) -> list[Problem]:
    s, steps = config.optim.schedule, config.train.steps
    if s.warmup_steps > steps:
        message = f"{s.warmup_steps} is more than train.steps={steps}; set it to {steps} or less"
        return [Problem("optim.schedule.warmup_steps", message, ("train.steps",))]
    if isinstance(s, WsdSchedule) and s.warmup_steps + s.decay_steps > steps:
        message = (
            f"optim.schedule.warmup_steps={s.warmup_steps} + optim.schedule.decay_steps={s.decay_steps} are more than "
            f"train.steps={steps}; set optim.schedule.decay_steps={max(1, steps - s.warmup_steps)} or less"
        )
        return [Problem("optim.schedule.decay_steps", message, ("optim.schedule.warmup_steps", "train.steps"))]
    return []


def _data(config: Config) -> list[Problem]:
    problems: list[Problem] = []
    data = config.data
    if isinstance(data, (TextData, BinData)) and not data.paths:
        problems.append(Problem("data.paths", "is empty; give at least one"))
    if isinstance(data, BlendData):
        wrong = [f"{k}: {w}" for k, w in data.weights.items() if not 0 <= w < float("inf")]
        if wrong:
            problems.append(Problem("data.weights", f"must be at least 0 and finite, got {', '.join(wrong)}"))
        elif not sum(data.weights.values()) > 0:
            problems.append(Problem("data.weights", f"must hold a weight above 0, got {dict(data.weights)}"))
    if config.eval.prompts and config.eval.every == 0:
        message = "are continued by evaluations, and eval.every=0 makes none; set eval.every, or eval.prompts=[]"
        problems.append(Problem("eval.prompts", message, ("eval.every",)))
    if config.eval.every > 0 and data.holdout == 0:
        message = "0 keeps nothing to evaluate on; set data.holdout above 0 or eval.every=0"
        problems.append(Problem("data.holdout", message, ("eval.every",)))
    return problems


def _run(config: Config) -> list[Problem]:
    problems: list[Problem] = []
    name = config.name
    if not name.strip() or name in {".", ".."} or set(name) & {"/", "\\"} or not name.isprintable():
        problems.append(Problem("name", f"names a folder of runs_dir, so it has no slashes; got {name!r}"))
    elif len(name.encode()) > LONGEST_NAME:
        message = f"names a folder of runs_dir; {len(name.encode())} bytes are more than {LONGEST_NAME}, shorten it"
        problems.append(Problem("name", message))
    for key, steps in (("log.profile", config.log.profile), ("log.modules", config.log.modules)):
        outside = [s for s in steps if not 1 <= s <= config.train.steps]
        if outside:
            message = f"steps {outside} are not among the run's 1 to train.steps={config.train.steps}"
            problems.append(Problem(key, message, ("train.steps",)))
    target = config.log.prometheus
    if target is not None and not (1 <= int(target) <= 65535 if target.isdecimal() else target.endswith(".prom")):
        message = f"is {target!r}; give a port from 1 to 65535, or a file whose name ends in .prom"
        problems.append(Problem("log.prometheus", message))
    c = config.checkpoint
    if c.init is not None and c.resume is not None and c.resume != "latest":
        message = "checkpoint.init and a path in checkpoint.resume exclude each other; set one of them to null"
        problems.append(Problem("checkpoint.init", message, ("checkpoint.resume",)))
    if c.local.dir is not None and c.local.every == 0:
        problems.append(Problem("checkpoint.local.every", "is 0 steps; give one, or set checkpoint.local.dir=null"))
    if c.upcycle and c.init is None:
        message = "true needs the dense model's weights; set checkpoint.init to a checkpoint or a Hugging Face folder"
        problems.append(Problem("checkpoint.upcycle", message, ("checkpoint.init",)))
    if c.upcycle and not config.model.moe.experts:
        message = "true needs a model with experts; set model.moe.experts"
        problems.append(Problem("checkpoint.upcycle", message, ("model.moe.experts",)))
    return problems
