"""How each family is cut for tensor parallelism: patterns of parameter names, first match wins."""

from __future__ import annotations

from ..parallel.plan import Column, Expert, Plan, Row, Vocab, Whole

_DECODER: Plan = (
    ("embed.weight", Vocab()),
    ("head.weight", Vocab()),
    ("positions.weight", Whole()),
    ("layers.*.attention.q.*", Column()),
    ("layers.*.attention.k.*", Column(kv=True)),
    ("layers.*.attention.v.*", Column(kv=True)),
    ("layers.*.attention.out.*", Row()),
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
