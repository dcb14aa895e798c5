"""Upcycled jobs: made offline or when the run starts, under any layout, they begin as the dense model."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pentad.configs.errors import UserError
from pentad.configs.schema import Config, ModelConfig, MoeConfig, RouterConfig
from pentad.models.hf.config_json import links
from pentad.models.hf.folder import load_hf, write_hf
from pentad.models.transformer import Transformer
from pentad.trainer.checkpoint.checkpointer import Checkpointer, read_full, write_full
from pentad.trainer.checkpoint.hugging_face import Upcycle, export_hf, import_hf, load_initial
from pentad.trainer.checkpoint.retention import Retention
from pentad.trainer.checkpoint.saved_model import model_config_from_state
from tests.distributed import run_distributed
from tests.training import Run, job

DENSE = ModelConfig(
    family="llama", layers=2, hidden=32, heads=4, kv_heads=4, head_dim=8, ffn=64, vocab=64, max_positions=32
)
TOKENS = torch.arange(40).reshape(2, 20) % 64
STEPS = 3


def write_dense(folder: Path, dtype: torch.dtype = torch.float64) -> None:
    """The dense model as a Hugging Face folder, and beside it as a checkpoint of a run."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: shape for link in links(DENSE) for name, shape in link.ours.items()}
    tensors = {
        name: (0.3 * torch.randn(shape, generator=generator, dtype=torch.float64) + (len(shape) == 1)).to(dtype)
        for name, shape in shapes.items()
    }
    write_hf(folder / "hf", DENSE, tensors)
    write_full(
        folder / "checkpoint",
        {f"model/{name}": tensor for name, tensor in tensors.items()},
        {"step": 9, "model": asdict(DENSE)},
    )


def routed(granularity: int, **options: Any) -> ModelConfig:
    return replace(
        DENSE,
        moe=MoeConfig(experts=2 * granularity, top_k=granularity, ffn=DENSE.ffn // granularity, **options),
    )


@pytest.mark.parametrize("granularity", [1, 2, 8])
def test_offline(granularity: int, tmp_path: Path) -> None:
    write_dense(tmp_path)
    made = tmp_path / "made"
    wanted = Upcycle(experts=2 * granularity, top_k=granularity, granularity=granularity)
    config = import_hf(tmp_path / "hf", made, wanted)
    tensors, state = read_full(made)
    assert state["step"] == 0 and model_config_from_state(state) == config
    model = Transformer(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model/{name}"])
        expected = load_hf(tmp_path / "hf", torch.float64)(TOKENS)
        torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=1e-10)
    export_hf(made, tmp_path / "exported")
    with torch.no_grad():
        torch.testing.assert_close(load_hf(tmp_path / "exported", torch.float64)(TOKENS), expected, rtol=0, atol=1e-10)


def test_offline_keeps_the_dtype(tmp_path: Path) -> None:
    write_dense(tmp_path, torch.bfloat16)
    import_hf(tmp_path / "hf", tmp_path / "made", Upcycle(experts=12, top_k=4, granularity=4))
    tensors, _ = read_full(tmp_path / "made")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    down = read_full(tmp_path / "checkpoint")[0]["model/layers.0.ffn.down.weight"]
    assert torch.equal(tensors["model/layers.0.moe.experts.down.weight"][5], 4 * down[:, 16:32])


def start(rank: int, world: int, cfg: Config, path: Path, upcycle: bool) -> tuple[list[tuple[float, ...]], Any]:
    """(the curve, logits of `TOKENS` where the rank holds the whole pipeline) of a job that starts from `path`."""
    run = Run(rank, cfg)
    checkpointer = Checkpointer(
        path.parent / "run",
        group=run.mesh.checkpoint_group if world > 1 else None,
        rank=rank,
        world=world,
        keep=Retention(1),
        asynchronous=False,
        on_event=lambda event: None,
    )
    try:
        load_initial(path, run.parts, checkpointer, upcycle=upcycle, seed=cfg.train.seed)
        logits = None
        if cfg.parallel.pp == 1:
            with torch.no_grad():
                logits = run.parts.model(TOKENS).clone()
        return [run.step(step) for step in range(cfg.train.steps)], logits
    finally:
        checkpointer.close()
        run.close()


_EXPECTED: dict[str, Any] = {}


def alone(cfg: Config, folder: Path, upcycle: bool) -> Any:
    """One process's result; the same for all folders that `write_dense` fills."""
    key = repr((cfg.model, cfg.train, upcycle))
    if key not in _EXPECTED:
        _EXPECTED[key] = run_distributed(start, 1, cfg, folder / "hf", upcycle, group=False)[0]
    return _EXPECTED[key]


LAYOUTS: dict[str, dict[str, Any]] = {
    "ep2": {"dp": 2, "ep": 2},
    "tp2-ep2": {"tp": 2, "dp": 2, "ep": 2, "sharding": "zero1"},
    "ep4-folded": {"tp": 2, "dp": 2, "ep": 4},
    "pp2-ep2": {"pp": 2, "dp": 2, "ep": 2},
    "etp2": {"dp": 2, "etp": 2},
}


CASES = [
    pytest.param(
        layout,
        granularity,
        kind,
        marks=[] if layout == "tp2-ep2" or (granularity, kind) == (2, "hf") else pytest.mark.slow,
    )
    for layout in LAYOUTS
    for granularity in (1, 2, 8)
    for kind in ("hf", "checkpoint")
]


@pytest.mark.distributed
@pytest.mark.parametrize(("layout", "granularity", "kind"), CASES)
def test_online(layout: str, granularity: int, kind: str, tmp_path: Path) -> None:
    """The dense model's logits and loss before the first step, then one process's curve."""
    degrees = LAYOUTS[layout]
    model = routed(2 if layout == "ep4-folded" and granularity == 1 else granularity)
    settings: dict[str, Any] = {"steps": STEPS, "optim": "sgd"}
    write_dense(tmp_path)
    cfg = job(model=vars(model), **degrees, **settings)
    world = math.prod(cfg.parallel.__dict__[axis] for axis in ("tp", "pp", "dp"))
    ranks = run_distributed(start, world, cfg, tmp_path / kind, True, group=False)

    dense_curve, dense_logits = alone(job(model=vars(DENSE), **settings), tmp_path, False)
    curve, _ = alone(job(model=vars(model), **settings), tmp_path, True)
    assert abs(dense_curve[0][0] - curve[0][0]) < 1e-10
    for found, logits in ranks:
        if logits is not None:
            torch.testing.assert_close(logits, dense_logits, rtol=0, atol=1e-10)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(curve), rtol=1e-9, atol=0)


def test_a_bf16_job_upcycles_into_its_masters(tmp_path: Path) -> None:
    write_dense(tmp_path, torch.bfloat16)
    cfg = job(model=vars(routed(2)), dtype="bf16", steps=1)
    (_, logits), (_, dense) = (
        run_distributed(start, 1, c, tmp_path / "hf", up, group=False)[0]
        for c, up in ((cfg, True), (job(model=vars(DENSE), dtype="bf16", steps=1), False))
    )
    assert float((logits - dense).norm() / dense.norm()) < 0.02


@pytest.mark.parametrize("kind", ["hf", "checkpoint"])
def test_mistakes(kind: str, tmp_path: Path) -> None:
    write_dense(tmp_path)

    def begin(model: ModelConfig, upcycle: bool = True) -> None:
        start(0, 1, job(model=vars(model), steps=1), tmp_path / kind, upcycle)

    with pytest.raises(UserError, match=r"model\.moe\.experts: 4, but .* dense model; .* or checkpoint\.upcycle=true"):
        begin(routed(2), upcycle=False)
    with pytest.raises(UserError, match=r"model\.heads: 2, but checkpoint\.init=.* has 4; set model\.heads=4"):
        begin(replace(routed(2), heads=2, kv_heads=2, head_dim=16))
    with pytest.raises(UserError, match=r"model\.moe\.top_k: 3 is not a multiple of the granularity 2"):
        begin(replace(routed(2), moe=replace(routed(2).moe, top_k=3)))
    with pytest.raises(UserError, match=r"model\.moe\.router\.normalize: false"):
        begin(routed(2, router=RouterConfig(normalize=False)))


def test_a_checkpoint_with_experts_is_not_upcycled(tmp_path: Path) -> None:
    write_dense(tmp_path)
    import_hf(tmp_path / "hf", tmp_path / "made", Upcycle(experts=4, top_k=2, granularity=2))
    cfg = job(model=vars(routed(2)), steps=1)
    with pytest.raises(UserError, match=r"checkpoint\.upcycle: the model has 4 experts already"):
        start(0, 1, cfg, tmp_path / "made", True)
    curve, _ = start(0, 1, cfg, tmp_path / "made", False)
    assert abs(curve[0][0] - alone(job(model=vars(DENSE), steps=1), tmp_path, False)[0][0][0]) < 1e-10


def test_what_the_balancing_loss_remembers_stays_behind(tmp_path: Path) -> None:
    """Weights trained with the load of the step before start a job without it, and the other way round."""
    remembers = routed(2, router=RouterConfig(aux_loss=0.01, aux_level="global_batch"))
    write_dense(tmp_path)
    import_hf(tmp_path / "hf", tmp_path / "made", Upcycle(experts=4, top_k=2, granularity=2))
    tensors, state = read_full(tmp_path / "made")
    load = {f"model/layers.{i}.moe.router.load": torch.ones(4) for i in range(2)}
    write_full(tmp_path / "with", tensors | load, {**state, "model": asdict(remembers)})
    for model, path in ((routed(2), "with"), (remembers, "made")):
        start(0, 1, job(model=vars(model), steps=1), tmp_path / path, False)
