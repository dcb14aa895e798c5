"""How each family is cut for tensor parallelism: patterns of parameter names, first match wins."""

from __future__ import annotations

from ..configs.schema import ModelConfig
from ..parallel.plan import Column, Expert, Plan, Row, Vocab, Whole

_DECODER: Plan = (
    ("embed.weight", Vocab()),
    ("head.weight", Vocab()),
    ("positions.weight", Whole()),
    ("layers.*.attention.q.*", Column()),
    ("layers.*.attention.k.*", Column(kv=True)),
    ("layers.*.attention.v.*", Column(kv=True)),
    ("layers.*.attention.out.*", Row()),
    ("layers.*.attention.sinks", Column()),
    ("layers.*.attention.q_down.*", Whole()),
    ("layers.*.attention.q_up.*", Column()),
    ("layers.*.attention.kv_down.*", Whole()),
    ("layers.*.attention.kv_up.*", Column()),
    ("layers.*.ffn.gate.*", Column()),
    ("layers.*.ffn.up.*", Column()),
    ("layers.*.ffn.down.*", Row()),
    ("layers.*.moe.router.*", Whole()),
    ("layers.*.moe.shared_gate.*", Whole()),
    ("layers.*.moe.shared.gate.*", Column()),
    ("layers.*.moe.shared.up.*", Column()),
    ("layers.*.moe.shared.down.*", Row()),
    ("layers.*.moe.experts.gate.*", Expert(inner=1)),
    ("layers.*.moe.experts.up.*", Expert(inner=1)),
    ("layers.*.moe.experts.down.weight", Expert(inner=2)),
    ("layers.*.moe.experts.down.bias", Expert()),
    ("*norm.*", Whole()),
)

_NORMS_OVER_ALL_HEADS: Plan = (
    ("layers.*.attention.q_norm.*", Column()),
    ("layers.*.attention.k_norm.*", Column(kv=True)),
)

_FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gpt2",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
)
PLANS: dict[str, Plan] = dict.fromkeys(_FAMILIES, _DECODER)


def plan_of(cfg: ModelConfig) -> Plan:
    """The plan of the model's family, with the rules that its options change."""
    plan = _NORMS_OVER_ALL_HEADS + PLANS[cfg.family] if cfg.qk_norm_whole else PLANS[cfg.family]
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
