"""Every part that a layer can make again: gradients of one that keeps everything, and so much less memory as said."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pentad.configs import resolve_model
from pentad.configs.schema_model import LinearAttentionConfig, MlaConfig, MoeConfig
from pentad.configs.tables.layer_parts import LAYER_PARTS
from pentad.models.costs.activations import layer_rows
from pentad.models.costs.kept import Choice, SomeTokens, kept_bytes
from pentad.models.costs.widths import LocalWork
from pentad.models.dropout import Draws
from pentad.models.recompute import RunLayers
from pentad.models.sequences import Inputs
from pentad.models.transformer import Transformer
from pentad.models.weights.initialise import initialise
from pentad.parallel.token_blocks import TokenBlocks
from tests.training import TINY

BATCH, LENGTH = 2, 32
N, H, F = BATCH * LENGTH, TINY.hidden, TINY.ffn
EXPERTS = MoeConfig(experts=4, top_k=2, ffn=48, shared=40)
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "gelu, layer norm": {"norm": "layer", "activation": "gelu", "kv_heads": 2, "qkv_bias": True},
    "normed heads": {"qk_norm": True, "activation": "swiglu_clipped"},
    "all heads normed": {"qk_norm": True, "qk_norm_whole": True, "window": 5, "sinks": True},
    "experts": {"moe": EXPERTS},
    "experts, weighed before": {"moe": replace(EXPERTS, weigh="before", shared=0)},
    "latent": {"mla": MlaConfig(kv_rank=16, q_rank=12, nope_dim=8, rope_dim=4, value_dim=8), "head_dim": 12},
    "latent, whole queries": {"mla": MlaConfig(kv_rank=16, nope_dim=8, rope_dim=4, value_dim=8), "head_dim": 12},
    "linear": {"attention_every": 2, "linear": LinearAttentionConfig(key_dim=8, value_dim=8, gate_rank=4, chunk=8)},
    "dropout, two predictions": {"dropout": 0.1, "mtp": 2},
}


class Alive(TorchDispatchMode):
    """Bytes of all storages that operations inside have made and that are still there; not of parameters."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self._elsewhere = {param.untyped_storage()._cdata for param in model.parameters()}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self._elsewhere:
                    self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return found

    def bytes(self) -> int:
        return sum(nbytes for storage, nbytes in self._made.values() if not storage.expired())


@dataclass(frozen=True)
class Ran:
    loss: Tensor
    gradients: dict[str, Tensor]
    kept: int
    """Bytes alive between forward and backward."""
    left: int
    """Bytes alive after backward, but for the gradients."""


def run(name: str, choice: Choice, dtype: torch.dtype = torch.float64) -> Ran:
    cfg = replace(TINY, **MODELS[name])
    model = Transformer(cfg)
    for param in model.parameters():
        param.data = param.data.to(dtype)
    initialise(model, cfg, seed=3)
    model.run_layer = RunLayers(dict.fromkeys(range(cfg.layers + cfg.mtp), choice))
    draws = torch.Generator().manual_seed(0)
    tokens = torch.randint(cfg.used_vocab, (BATCH, LENGTH), generator=draws)
    labels = torch.randint(cfg.used_vocab, (1 + cfg.mtp, BATCH, LENGTH), generator=draws)
    dropout = Draws(cfg.dropout, 1, 0, (0, 1), LENGTH, torch.arange(N)) if cfg.dropout else None
    inputs = Inputs(tokens, labels if cfg.mtp else labels[0], draws=dropout, share=1.0)
    alive = Alive(model)
    with alive:
        loss = model(inputs)
        kept = alive.bytes()
        loss.backward()
        left = alive.bytes()
    gradients = {key: param.grad for key, param in model.named_parameters() if param.grad is not None}
    return Ran(loss.detach(), gradients, kept, left - sum(g.untyped_storage().nbytes() for g in gradients.values()))


def parts_of(name: str) -> list[str]:
    given = MODELS[name]
    has = {"latent": "mla" in given, "moe": "moe" in given}
    return [part for part in LAYER_PARTS if has.get(part, True)]


ALWAYS = {"dense", "experts", "latent"}
"""Part by part in `make test`; the others with all parts at once, and part by part in `make test-all`."""
CASES = [
    pytest.param(name, parts, marks=() if name in ALWAYS or len(parts) > 1 else pytest.mark.slow)
    for name in MODELS
    for parts in (*(frozenset({part}) for part in parts_of(name)), frozenset(parts_of(name)), "full")
]


@pytest.mark.parametrize(("name", "choice"), CASES, ids=lambda x: x if isinstance(x, str) else "+".join(sorted(x)))
def test_gradients_are_bit_equal_and_less_is_kept(name: str, choice: Choice) -> None:
    plain, ran = run(name, "none"), run(name, choice)
    assert torch.equal(plain.loss, ran.loss) and plain.gradients.keys() == ran.gradients.keys()
    for key, gradient in plain.gradients.items():
        assert torch.equal(gradient, ran.gradients[key]), key
    routed_alone = (
        isinstance(choice, frozenset)
        and {*choice} <= {"ffn", "activation"}
        and "moe" in MODELS[name]
        and not MODELS[name]["moe"].shared
    )
    assert ran.kept == plain.kept if routed_alone else ran.kept < plain.kept
    assert ran.left == plain.left
    # Autograd's hooks cost a few numbers a token of their own.
    assert plain.kept - ran.kept == pytest.approx(_said(name, "none") - _said(name, choice), rel=0.02)


def _said(name: str, choice: Choice) -> int:
    """Bytes that the layers keep, as the memory model says."""
    cfg = resolve_model(replace(TINY, **MODELS[name]), LENGTH)
    work = LocalWork(sequences=BATCH, tokens=N, width=8)
    return sum(kept_bytes(layer_rows(cfg, layer, work), choice) for layer in range(cfg.layers + cfg.mtp))


SOME = [pytest.param(name, marks=() if name in {"normed heads", "latent"} else pytest.mark.slow) for name in MODELS]


@pytest.mark.parametrize("name", SOME)
def test_some_tokens_of_every_part(name: str) -> None:
    """Of 32 tokens the first 12 are kept: the products of the others have other shapes, which rounds differently."""
    choice = SomeTokens(frozenset(parts_of(name)), TokenBlocks(LENGTH, 12))
    plain, ran, all_again = run(name, "none"), run(name, choice), run(name, choice.parts)
    assert torch.equal(plain.loss, ran.loss) and plain.gradients.keys() == ran.gradients.keys()
    for key, gradient in plain.gradients.items():
        norm = torch.linalg.vector_norm
        assert norm(gradient - ran.gradients[key]) <= 1e-12 * norm(gradient), key
    assert ran.left == plain.left
    assert ran.kept - all_again.kept == pytest.approx(_said(name, choice) - _said(name, choice.parts), rel=0.01)
    assert plain.kept - ran.kept == pytest.approx(_said(name, "none") - _said(name, choice), rel=0.02)


@pytest.mark.parametrize("share", [0.25, 0.6])
def test_some_tokens_of_each_part(share: float) -> None:
    blocks = TokenBlocks(LENGTH, int(share * LENGTH))
    for part in parts_of("dense"):
        whole, some = frozenset({part}), SomeTokens(frozenset({part}), blocks)
        kept, said = run("dense", some).kept - run("dense", whole).kept, _said("dense", some) - _said("dense", whole)
        assert said == pytest.approx((_said("dense", "none") - _said("dense", whole)) * blocks.kept / LENGTH)
        assert kept == said, part


@pytest.mark.parametrize(
    ("name", "parts", "elements"),
    [
        ("dense", {"norm"}, 2 * N * H + 2 * N),
        ("dense", {"activation"}, N * F),
        ("dense", {"attention"}, 3 * N * H),
        ("dense", {"ffn"}, 2 * N * F),
        ("dense", {"norm", "activation", "attention", "ffn"}, 5 * N * H + 2 * N + 3 * N * F),
        ("experts", {"moe"}, 2 * 2 * N * 48),
        ("experts", {"ffn", "activation"}, 3 * N * 40),
        # Queries and keys of 12, of keys and values 8 + 8; normed latents and queries with the norms' numbers.
        ("latent", {"latent"}, N * 4 * (12 + 12 + 16) + N * (16 + 12 + 2)),
        ("latent", {"attention"}, N * 4 * (12 + 12 + 16) + N * (2 * (16 + 12) + 4 + 2)),
    ],
)
def test_what_a_part_frees(name: str, parts: set[str], elements: int) -> None:
    """In each of two layers."""
    assert run(name, "none").kept - run(name, frozenset(parts)).kept == 2 * 8 * elements


def test_half_precision_too() -> None:
    plain, ran = (run("latent", frozenset(parts), torch.bfloat16) for parts in ((), parts_of("latent")))
    assert all(torch.equal(gradient, ran.gradients[key]) for key, gradient in plain.gradients.items())
