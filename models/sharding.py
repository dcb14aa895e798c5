"""How a model is cut for tensor parallelism: patterns of parameter names, first match wins.

Parameters have the same names in all families; a family whose cuts differ brings a plan of its own.
"""

from __future__ import annotations

from ..configs.schema import ModelConfig
from ..parallel.sharding_rules import Column, Expert, Plan, Row, Vocab, Whole
from .hf.families import find_family

DECODER: Plan = (
    ("embed.weight", Vocab()),
    ("head.weight", Vocab()),
    ("positions.weight", Whole()),
    ("*.attention.q.*", Column()),
    ("*.attention.k.*", Column(kv=True)),
    ("*.attention.v.*", Column(kv=True)),
    ("*.attention.out.*", Row()),
    ("*.attention.sinks", Column()),
    ("*.attention.q_down.*", Whole()),
    ("*.attention.q_up.*", Column()),
    ("*.attention.kv_down.*", Whole()),
    ("*.attention.kv_up.*", Column()),
    ("*.ffn.gate.*", Column()),
    ("*.ffn.up.*", Column()),
    ("*.ffn.down.*", Row()),
    ("*.moe.router.*", Whole()),
    ("*.moe.shared_gate.*", Whole()),
    ("*.moe.shared.gate.*", Column()),
    ("*.moe.shared.up.*", Column()),
    ("*.moe.shared.down.*", Row()),
    ("*.moe.experts.gate.*", Expert(inner=1)),
    ("*.moe.experts.up.*", Expert(inner=1)),
    ("*.moe.experts.down.weight", Expert(inner=2)),
    ("*.moe.experts.down.bias", Expert()),
    ("mtp.*.project.*", Whole()),
    ("*norm.*", Whole()),
)

_NORMS_OVER_ALL_HEADS: Plan = (
    ("*.attention.q_norm.*", Column()),
    ("*.attention.k_norm.*", Column(kv=True)),
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
            *((f"layers.{i}.attention.{name}.*", Column()) for name in columns),
            (f"layers.{i}.attention.decay_down.*", Whole()),
        )
    )
