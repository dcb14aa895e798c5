"""How a model is cut for tensor parallelism: patterns of parameter names, first match wins.

Parameters have the same names in all families; a family whose cuts differ brings a plan of its own.
"""

from __future__ import annotations

from ..configs.schema import ModelConfig
from ..parallel.sharding_rules import ColumnWise, Expert, Plan, RowWise, Vocab, Whole
from .hf.families import find_family

DECODER: Plan = (
    ("embed.weight", Vocab()),
    ("head.weight", Vocab()),
    ("positions.weight", Whole()),
    ("*.attention.q.*", ColumnWise()),
    ("*.attention.k.*", ColumnWise(kv=True)),
    ("*.attention.v.*", ColumnWise(kv=True)),
    ("*.attention.out.*", RowWise()),
    ("*.attention.sinks", ColumnWise()),
    ("*.attention.q_down.*", Whole()),
    ("*.attention.q_up.*", ColumnWise()),
    ("*.attention.kv_down.*", Whole()),
    ("*.attention.kv_up.*", ColumnWise()),
    ("*.ffn.gate.*", ColumnWise()),
    ("*.ffn.up.*", ColumnWise()),
    ("*.ffn.down.*", RowWise()),
    ("*.moe.router.*", Whole()),
    ("*.moe.shared_gate.*", Whole()),
    ("*.moe.shared.gate.*", ColumnWise()),
    ("*.moe.shared.up.*", ColumnWise()),
    ("*.moe.shared.down.*", RowWise()),
    ("*.moe.experts.gate.*", Expert(inner=1)),
    ("*.moe.experts.up.*", Expert(inner=1)),
    ("*.moe.experts.down.weight", Expert(inner=2)),
    ("*.moe.experts.down.bias", Expert()),
    ("mtp.*.project.*", Whole()),
    ("*norm.*", Whole()),
)

_NORMS_OVER_ALL_HEADS: Plan = (
    ("*.attention.q_norm.*", ColumnWise()),
    ("*.attention.k_norm.*", ColumnWise(kv=True)),
)


def plan_of(cfg: ModelConfig) -> Plan:
    """The plan of the model's family, with the rules that its options change."""
    plan = find_family(cfg.family).sharding or DECODER
    if cfg.qk_norm_whole:
        plan = _NORMS_OVER_ALL_HEADS + plan
    return _linear_attention(cfg) + plan


def _linear_attention(cfg: ModelConfig) -> Plan:
    """Linear attention has a key and a value for every head, and is cut by them."""
    columns = ("k", "v", "gate", "decay_up")
    return tuple(
        rule
        for i in cfg.linear_layers
        for rule in (
            *((f"layers.{i}.attention.{name}.*", ColumnWise()) for name in columns),
            (f"layers.{i}.attention.decay_down.*", Whole()),
        )
    )
