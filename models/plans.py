"""How each family is cut for tensor parallelism: patterns of parameter names, first match wins."""

from __future__ import annotations

from ..parallel.plan import Column, Plan, Row, Vocab, Whole

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
    ("*norm.*", Whole()),
)

PLANS: dict[str, Plan] = {
    "llama": _DECODER,
    "mistral": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _DECODER,
    "gpt2": _DECODER,
}
