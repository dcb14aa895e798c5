"""Which keys decide nothing, given the others: one table for the warnings of a job and for the identity of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .fields import all_keys, short, value_of
from .reading.spread import is_flat
from .resolve import resolve_model
from .schema import CODED_STATES, AdamWConfig, Config, ModelConfig, MoeConfig
from .schema_data import TokenizedData
from .tables.schedules import SCHEDULES, is_program

_Section = TypeVar("_Section")


@dataclass(frozen=True)
class Inert(Generic[_Section]):
    """Keys that change nothing as long as other keys have certain values."""

    keys: tuple[str, ...]
    """Those that are inert; a section stands for all its keys."""
    by: tuple[str, ...]
    """Those that make them so: the warning shows their values."""
    holds: Callable[[_Section], bool]
    """Whether these values do."""

    def covers(self, key: str) -> bool:
        """Whether the row is about a key."""
        return _covered(key, self.keys)


def _unscaled(*kinds: str) -> Callable[[ModelConfig], bool]:
    """Whether the rotary embedding is scaled in none of these ways."""
    return lambda m: m.rope.scaling not in kinds


_ROUTED_ONLY = tuple(f"moe.{f.name}" for f in dataclasses.fields(MoeConfig) if f.name not in ("experts", "every"))
_SOFTMAX_ONLY = ("rope", "qk_norm", "qk_norm_whole", "sinks", "qkv_bias", "out_bias", "window", "window_every")

MODEL: tuple[Inert[ModelConfig], ...] = (
    Inert(("rope",), ("position",), lambda m: m.position != "rope"),
    Inert(("rope.factor",), ("rope.scaling",), _unscaled("linear", "llama3", "yarn")),
    Inert(("rope.original_positions",), ("rope.scaling",), _unscaled("llama3", "yarn")),
    Inert(("rope.low_freq_factor", "rope.high_freq_factor"), ("rope.scaling",), _unscaled("llama3")),
    Inert(
        ("rope.beta_fast", "rope.beta_slow", "rope.attention_factor", "rope.truncate"),
        ("rope.scaling",),
        _unscaled("yarn"),
    ),
    Inert(("qk_norm_whole",), ("qk_norm",), lambda m: not m.qk_norm),
    Inert(
        ("mla.q_rank", "mla.nope_dim", "mla.rope_dim", "mla.value_dim"), ("mla.kv_rank",), lambda m: not m.mla.kv_rank
    ),
    Inert(("window_every",), ("window",), lambda m: m.window is None),
    Inert(("linear",), ("attention_every",), lambda m: not m.linear_layers),
    Inert(_SOFTMAX_ONLY, ("attention_every", "layers"), lambda m: len(m.linear_layers) == m.layers and not m.mtp),
    Inert(("mtp_loss",), ("mtp",), lambda m: not m.mtp),
    Inert(("ffn_bias",), ("moe.experts",), lambda m: len(m.moe_layers) == m.layers and not m.moe.shared),
    Inert(("moe.every",), ("moe.experts",), lambda m: not m.moe.experts),
    Inert(_ROUTED_ONLY, ("moe.experts",), lambda m: not m.moe.experts),
    Inert(("moe.shared_gate",), ("moe.shared",), lambda m: not m.moe.shared),
    Inert(("moe.drop", "moe.capacity_scope"), ("moe.capacity_factor",), lambda m: m.moe.capacity_factor is None),
    Inert(
        ("moe.drop", "moe.capacity_scope", "moe.pad", "moe.router.normalize"),
        ("moe.router.name",),
        lambda m: m.moe.router.name == "expert_choice",
    ),
    Inert(("moe.pad", "moe.overlap_chunks"), ("moe.dispatcher",), lambda m: m.moe.dispatcher == "all_gather"),
    Inert(
        ("moe.router.score", "moe.router.normalize"),
        ("moe.router.name", "moe.top_k"),
        lambda m: m.moe.router.name == "sinkhorn" and m.moe.top_k == 1,
    ),
    Inert(
        ("moe.router.groups_kept", "moe.router.group_members"),
        ("moe.router.groups",),
        lambda m: m.moe.router.groups == 1,
    ),
    Inert(("moe.router.bias_rate",), ("moe.router.selection_bias",), lambda m: not m.moe.router.selection_bias),
    Inert(("moe.router.aux_level",), ("moe.router.aux_loss",), lambda m: not m.moe.router.aux_loss),
)
"""Keys relative to `model`."""


def _offloads(config: Config) -> bool:
    """Whether activations go to the host, as its keys or its schedule say."""
    row = SCHEDULES.get(config.parallel.pipeline_in_use.schedule or "")
    return config.memory.offload_activations != "none" or (row is not None and row.offloads > 0)


def _from_file(config: Config) -> bool:
    """Whether its program is a file's, which may store activations on a disk itself."""
    return is_program(config.parallel.pipeline_in_use.schedule or "")


def _has_copies(config: Config) -> bool:
    """Whether several ranks hold the same parameters: replicas, norms under tp, the tables of both pipeline ends."""
    p, model = config.parallel, config.model
    ends = p.pp > 1 and p.pipeline_in_use.vocab == "ends" and (model.tied or model.mtp > 0)
    return p.tp > 1 or ends or (p.dp * p.cp > 1 and p.data.sharding != "fsdp2")


JOB: tuple[Inert[Config], ...] = (
    Inert(
        ("model.moe.pad", "model.moe.overlap_chunks"),
        ("model.moe.dispatcher",),
        lambda c: c.model.moe.dispatcher == "deepep" and c.parallel.ep > 1,
    ),
    Inert(("parallel.pipeline",), ("parallel.pp",), lambda c: c.parallel.pp == 1),
    Inert(
        ("parallel.pipeline.vocab_barriers",),
        ("parallel.pipeline.vocab",),
        lambda c: c.parallel.pipeline.vocab == "ends",
    ),
    Inert(("parallel.tensor",), ("parallel.tp",), lambda c: c.parallel.tp == 1),
    Inert(("parallel.context",), ("parallel.cp",), lambda c: c.parallel.cp == 1),
    Inert(("memory.recompute_parts",), ("memory.recompute",), lambda c: c.memory.recompute != "selective"),
    Inert(
        ("memory.recompute_every", "memory.recompute_layers"),
        ("memory.recompute",),
        lambda c: c.memory.recompute not in ("full", "selective"),
    ),
    Inert(("memory.token_share",), ("memory.recompute",), lambda c: c.memory.recompute not in ("selective", "auto")),
    Inert(("parallel.data.deepspeed",), ("parallel.data.sharding",), lambda c: c.parallel.data.sharding != "deepspeed"),
    Inert(("parallel.data.bucket_mib",), ("parallel.data.sharding",), lambda c: c.parallel.data.sharding == "fsdp2"),
    Inert(
        ("parallel.data.params", "parallel.data.grads", "parallel.data.states"),
        ("parallel.data.sharding",),
        lambda c: not is_flat(c),
    ),
    Inert(
        ("memory.optimizer_stride",),
        ("memory.offload_optimizer",),
        lambda c: c.memory.offload_optimizer in ("none", "disk"),
    ),
    Inert(
        ("memory.optimizer_subgroup_mib",),
        ("memory.offload_optimizer",),
        lambda c: c.memory.offload_optimizer == "none",
    ),
    Inert(
        ("optim.states_above",),
        ("optim.states",),
        lambda c: isinstance(c.optim, AdamWConfig) and c.optim.states not in CODED_STATES,
    ),
    Inert(("memory.host_gib",), ("memory.offload_activations",), lambda c: not _offloads(c)),
    Inert(
        ("memory.offload_disk",),
        ("memory.host_gib", "memory.offload_optimizer"),
        lambda c: c.memory.host_gib is None and c.memory.offload_optimizer != "disk" and not _from_file(c),
    ),
    Inert(("hardware.peak_fp8_tflops",), ("train.fp8",), lambda c: c.train.fp8 == "none"),
    Inert(("data.tokenizer.eod",), ("data.tokenizer.path",), lambda c: c.data.tokenizer.path is None),
    Inert(("data.cache",), ("data.name",), lambda c: isinstance(c.data, TokenizedData)),
    Inert(("eval.steps",), ("eval.every",), lambda c: c.eval.every == 0),
    Inert(("checkpoint.keep_best",), ("eval.every",), lambda c: c.eval.every == 0),
    Inert(("checkpoint.keep_every", "checkpoint.keep_best"), ("checkpoint.keep",), lambda c: c.checkpoint.keep == 0),
    Inert(
        ("checkpoint.local.every", "checkpoint.local.keep"),
        ("checkpoint.local.dir",),
        lambda c: c.checkpoint.local.dir is None,
    ),
    Inert(("eval.prompt_tokens",), ("eval.prompts",), lambda c: not c.eval.prompts),
    Inert(("faults.alive_s", "faults.hang_s", "faults.pause_s"), ("faults.watch",), lambda c: not c.faults.watch),
    Inert(
        ("faults.spares", "faults.ladder", "faults.layouts", "faults.grow"),
        ("faults.recover",),
        lambda c: not c.faults.recover,
    ),
    Inert(("faults.layouts",), ("faults.ladder",), lambda c: "layouts" not in c.faults.ladder),
    Inert(("faults.grow",), ("faults.ladder",), lambda c: not {"shrink", "resplit", "layouts"} & {*c.faults.ladder}),
    Inert(
        ("faults.numerics.replicas_every",),
        ("parallel.tp", "parallel.dp", "parallel.cp", "parallel.data.sharding"),
        lambda c: not _has_copies(c),
    ),
    Inert(("faults.numerics.recompute",), ("memory.recompute",), lambda c: c.memory.recompute == "none"),
    Inert(("faults.numerics.on_spike",), ("faults.numerics.spikes",), lambda c: not c.faults.numerics.spikes),
    Inert(("log.wandb_project",), ("log.wandb",), lambda c: not c.log.wandb),
)
"""Keys of a whole job that more than its model decides about."""

_FREE = {
    "preset",
    "family",
    "norm_impl",
    "init_std",
    "dropout",
    "mtp_loss",
    "linear.chunk",
    "moe.dispatcher",
    "moe.capacity_factor",
    "moe.capacity_scope",
    "moe.drop",
    "moe.pad",
    "moe.weigh",
    "moe.compute",
    "moe.overlap_chunks",
    "moe.router.bias_rate",
    "moe.router.jitter",
    "moe.router.aux_loss",
    "moe.router.aux_level",
    "moe.router.z_loss",
}
"""Names, and choices of a job that leave the function of the weights alone."""


def inert_keys(config: Config) -> dict[str, str]:
    """The keys that change nothing in a resolved job, each with what makes it so: `parallel.pp=1`."""
    found: dict[str, str] = {}
    holding = [(row.keys, row.by) for row in JOB if row.holds(config)]
    holding += [(_in_model(row.keys), _in_model(row.by)) for row in MODEL if row.holds(config.model)]
    for keys, by in holding:
        why = " ".join(f"{key}={short(value_of(config, key))}" for key in by)
        found |= {key: why for key in all_keys() if _covered(key, keys) and key not in found}
    return found


def _in_model(keys: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"model.{key}" for key in keys)


def _covered(key: str, by: tuple[str, ...]) -> bool:
    return any(key == mine or key.startswith(f"{mine}.") for mine in by)


def differences(one: ModelConfig, other: ModelConfig, *, padded: bool = False) -> dict[str, tuple[Any, Any]]:
    """The keys (`moe.router.scale`) that decide what a model computes and in which two differ, with both values.

    Keys whose values mean nothing in either model are left out.

    Args:
        one, other: resolved.
        padded: vocabularies are the same that have the same ids in use, whatever padding they have.
    """
    # Those that were made by hand, or are from an older checkpoint, may lack what is derived.
    values = [_flat(dataclasses.asdict(resolve_model(config, config.max_positions or 1))) for config in (one, other)]
    for config, flat in zip((one, other), values, strict=True):
        flat["vocab_used"] = config.used_vocab
        if padded:
            flat["vocab"] = flat.pop("vocab_used")
    means_nothing = _FREE | (_undecisive(one) & _undecisive(other))
    if one.moe_layers == other.moe_layers:
        means_nothing |= {"moe.every", "moe.dense_layers"}
    pairs = {key: (value, values[1][key]) for key, value in values[0].items() if key not in means_nothing}
    return {key: (a, b) for key, (a, b) in pairs.items() if a != b}


def _undecisive(model: ModelConfig) -> set[str]:
    """Keys of a model that leave the function of its weights alone."""
    holding = [row for row in MODEL if row.holds(model)]
    found = {key for key in _flat(dataclasses.asdict(model)) if any(row.covers(key) for row in holding)}
    if model.position == "rope":
        found.add("max_positions")  # the length that an export records
    if len(model.moe_layers) == model.layers:
        found.add("ffn")  # the default of moe.ffn, no more
    return found


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
