"""Reading a sequence piece by piece gives the logits of the whole model, which knows nothing of pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from pentad.configs.resolve import resolve_model
from pentad.configs.schema import LinearAttentionConfig, MlaConfig, ModelConfig, MoeConfig, RopeConfig, RouterConfig
from pentad.models.generate.decode import CachedReader, PrefixReader, can_cache, make_reader
from pentad.models.generate.sampling import Sampling, TokenSampler, generate_tokens
from pentad.models.transformer import Transformer
from pentad.models.weights.initialise import initialise

DENSE = ModelConfig(
    layers=3, hidden=32, heads=4, kv_heads=2, head_dim=8, ffn=48, vocab=61, max_positions=64, init_std=0.3
)
ROUTED = replace(DENSE, moe=MoeConfig(experts=4, ffn=24, shared=16, router=RouterConfig(groups_kept=1)))
CHOSEN = replace(ROUTED, moe=replace(ROUTED.moe, router=replace(ROUTED.moe.router, name="expert_choice")))
FULL = replace(ROUTED, moe=replace(ROUTED.moe, capacity_factor=1.0))
GPT2: dict[str, Any] = {
    "norm": "layer",
    "position": "learned",
    "activation": "gelu_tanh",
    "qkv_bias": True,
    "out_bias": True,
    "ffn_bias": True,
    "tied": True,
}
CASES = {
    "dense": DENSE,
    "window": replace(DENSE, window=5),
    "window of one": replace(DENSE, window=1),
    "window in every other layer, sinks": replace(DENSE, window=4, window_every=2, sinks=True),
    "yarn": resolve_model(
        replace(DENSE, rope=RopeConfig(scaling="yarn", factor=4.0, original_positions=16), qk_norm=True), 64
    ),
    "gpt2": replace(DENSE, **GPT2),
    "experts": ROUTED,
    "latent": replace(
        ROUTED, kv_heads=4, head_dim=12, mla=MlaConfig(kv_rank=16, q_rank=12, nope_dim=8, rope_dim=4, value_dim=6)
    ),
    "linear": replace(
        DENSE,
        attention_every=3,
        linear=LinearAttentionConfig(key_dim=8, value_dim=16, gate_rank=4, chunk=4),
    ),
    "expert choice": CHOSEN,
    "capacity": FULL,
    "padding": replace(DENSE, vocab_used=50),
}
TOKENS = torch.randint(0, 50, (1, 14), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small for more
    yield
    torch.set_num_threads(threads)


def made(cfg: ModelConfig) -> Transformer:
    model = Transformer(cfg).double()
    initialise(model, cfg)
    return model


@pytest.mark.parametrize("name", CASES)
def test_pieces_give_the_logits_of_the_whole(name: str) -> None:
    model = made(CASES[name])
    with torch.no_grad():
        expected = [model(TOKENS[:, :length])[0, -1] for length in range(1, 15)]
    for pieces in ([6, 1, 3, 1, 1, 1, 1], [1] * 6, [14]):
        reader, read = make_reader(model), 0
        for size in pieces:
            logits = reader(TOKENS[:, read : read + size])
            read += size
            torch.testing.assert_close(logits, expected[read - 1], rtol=1e-10, atol=1e-10)


def test_models_whose_tokens_depend_on_later_ones_are_read_again() -> None:
    assert isinstance(make_reader(made(CHOSEN)), PrefixReader)
    assert isinstance(make_reader(made(FULL)), PrefixReader)
    assert all(can_cache(cfg) for name, cfg in CASES.items() if name not in ("expert choice", "capacity"))


def test_greedy_tokens_are_those_of_whole_forwards() -> None:
    model = made(ROUTED)
    expected = TOKENS[:, :5]
    with torch.no_grad():
        for _ in range(12):
            expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), dim=1)
    found = list(generate_tokens(CachedReader(model), TOKENS[0, :5].tolist(), count=12))
    assert found == expected[0, 5:].tolist()
    stop = found[3]
    again = list(generate_tokens(CachedReader(model), TOKENS[0, :5].tolist(), count=12, stop={stop}))
    assert again == found[: found.index(stop) + 1]


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 1.0, -20.0])
    temperature = 0.7
    expected = torch.softmax(logits.double() / temperature, -1)
    sampler = TokenSampler(Sampling(temperature, seed=3))
    counts = torch.bincount(torch.tensor([sampler(logits) for _ in range(4000)]), minlength=5) / 4000
    torch.testing.assert_close(counts.double(), expected, rtol=0, atol=0.025)

    nucleus = TokenSampler(Sampling(temperature, top_p=0.9, seed=3))
    drawn = {nucleus(logits) for _ in range(500)}
    ordered = expected.sort(descending=True)
    needed = int((ordered.values.cumsum(-1) < 0.9).sum()) + 1
    assert drawn == set(ordered.indices[:needed].tolist()) and needed < 4
    first = [TokenSampler(Sampling(1.0, seed=5))(logits) for _ in range(3)]
    assert len(set(first)) == 1
    assert TokenSampler(Sampling(1.0, top_p=0.0))(logits) == 0  # the likeliest one alone
    assert TokenSampler(Sampling())(logits) == 0
