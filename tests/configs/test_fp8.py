"""Layouts in which products in 8 bits would not be those of one process are refused, with the key to set."""

from __future__ import annotations

import pytest

from pentad.configs import UserError, load
from tests.jobs import DENSE

BASE = ["parallel.tp=1", "model.kv_heads=4", "train.dtype=bf16"]
WIDE = ["model.hidden=256", "model.heads=4", "model.kv_heads=4", "model.head_dim=64", "model.ffn=512"]
LATENTS = ["model.mla.kv_rank=16", "model.mla.nope_dim=8", "model.mla.rope_dim=8", "model.mla.value_dim=8"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.fp8=row", "model.kv_heads=2", "parallel.tp=4"], ["parallel.tp=4", "model.kv_heads=2", "to 2 or less"]),
        (["train.fp8=row", *LATENTS, "parallel.cp=2"], ["parallel.cp is 2", "parallel.cp=1"]),
        (
            ["train.fp8=tensor", "memory.recompute=selective", "memory.token_share=0.5"],
            ["token_share=0.5", "train.fp8=row"],
        ),
        (["train.fp8=block", *WIDE, "model.ffn=384", "parallel.tp=2"], ["multiple of 256", "model.ffn is 384"]),
        (["train.fp8=block", *WIDE, "parallel.tp=4"], ["multiple of 512", "model.heads · head_dim is 256"]),
        (["train.fp8=block", "parallel.cp=2", "train.seq_len=256"], ["multiple of 512", "which is 256"]),
        (
            ["train.fp8=block", "parallel.cp=2", "train.seq_len=512", "parallel.context.placement=by_length"],
            ["by_length", "zigzag"],
        ),
        (["train.fp8=row", "parallel.tp=2", "parallel.tensor.overlap=gemm"], ["overlap=gemm", "one of them to none"]),
        (["train.fp8=row", "train.device=cuda", "train.dtype=fp32"], ["bf16", "fp32"]),
        (
            ["train.fp8=row", "train.device=cuda", *WIDE, "model.ffn=520", "parallel.tp=2"],
            ["multiples of 16", "model.ffn is 260"],
        ),
    ],
)
def test_what_would_be_other_numbers_is_refused(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load(DENSE, [*BASE, *overrides])
    (problem,) = caught.value.problems
    assert problem.key == "train.fp8"
    assert all(word in problem.message for word in words), problem.message


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.fp8=block", *WIDE, "parallel.tp=2"],
        ["train.fp8=block", "parallel.cp=2", "train.seq_len=512"],
        ["train.fp8=tensor", "memory.recompute=selective"],
        ["train.fp8=row", "memory.recompute=selective", "memory.token_share=0.5"],
        ["train.fp8=row", *LATENTS, "parallel.tp=2"],
        ["train.fp8=row", "train.device=cuda", *WIDE, "parallel.tp=2"],
    ],
)
def test_the_others_are_not(overrides: list[str]) -> None:
    load(DENSE, [*BASE, *overrides])
