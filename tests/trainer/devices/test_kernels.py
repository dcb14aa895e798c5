"""A model's kernels in Triton train as torch's do, alone and under tensor parallelism."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from pentad.configs.errors import UserError
from pentad.parallel.kernels.triton import gates, norms, rotary
from pentad.trainer.devices import kernels
from tests.distributed import run_distributed
from tests.training import Run, curve, job

MODEL: dict[str, Any] = {"hidden": 32, "kv_heads": 2, "qk_norm": True}
STEPS: dict[str, Any] = {"steps": 2, "global_batch": 2, "micro_batch": 1, "seq_len": 8}


def _losses(found: list[tuple[float, float, float]]) -> list[float]:
    return [step[0] for step in found]


@pytest.fixture(scope="module")
def exact() -> list[float]:
    """The losses in fp32."""
    return _losses(curve(0, 1, job(model=MODEL, dtype="fp32", **STEPS)))


def test_the_model_gets_them_and_trains_the_same(exact: list[float]) -> None:
    run = Run(0, job(model=MODEL, dtype="bf16", kernels="triton", **STEPS))
    layer: Any = run.parts.model.layers["0"]
    assert (
        layer.attention_norm.kernel is norms.triton_rms_norm and layer.attention.q_norm.kernel is norms.triton_rms_norm
    )
    assert layer.ffn.activation is gates.triton_swiglu and layer.attention.rotate is rotary.triton_rotate
    losses = [run.step(step)[0] for step in range(2)]
    run.close()
    assert losses == pytest.approx(exact, rel=5e-3)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [{"tp": 2}, pytest.param({"tp": 2, "pp": 2}, marks=pytest.mark.slow)])
def test_a_model_that_is_cut_trains_the_same(layout: dict[str, int], exact: list[float]) -> None:
    cfg = job(model=MODEL, dtype="bf16", kernels="triton", **layout, **STEPS)
    for found in run_distributed(curve, cfg.parallel.ranks, cfg, group=False):
        assert _losses(found) == pytest.approx(exact, rel=5e-3)


def test_experts_train_the_same() -> None:
    model = {"ffn": 64, "moe": job().model.moe.__class__(experts=4, top_k=2, ffn=32)}
    exact = _losses(curve(0, 1, job(model=model, dtype="fp32", **STEPS)))
    found = curve(0, 1, job(model=model, dtype="bf16", kernels="triton", **STEPS))
    assert _losses(found) == pytest.approx(exact, rel=1e-2)


def test_auto_falls_back_and_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kernels, "triton_problem", lambda device: "Triton's kernel of SwiGLU is wrong on cuda:0 by 0.1")
    cfg = job(model=MODEL, dtype="bf16", kernels="auto", **STEPS)
    assert not kernels.uses_triton(cfg, torch.device("cpu"))
    assert kernels.uses_triton(cfg, torch.device("cuda", 0))
    run = Run(0, cfg)
    kernels.use_kernels(cfg, run.parts.model, torch.device("cuda", 0), torch.bfloat16)
    layer: Any = run.parts.model.layers["0"]
    assert layer.attention_norm.kernel is None
    run.close()
    assert "SwiGLU is wrong on cuda:0 by 0.1: torch's kernels are used" in capsys.readouterr().err


def test_kernels_that_are_asked_for_must_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "triton_problem", lambda device: "Triton's kernels do not run on cpu (no reason)")
    with pytest.raises(UserError, match=r"train\.kernels: Triton's kernels do not run .* set train\.kernels=torch"):
        Run(0, job(model=MODEL, dtype="bf16", kernels="triton", **STEPS))
