"""Exact resume: twenty steps straight, or ten and ten under another layout (DESIGN invariant 2)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pentad.configs.schema import CheckpointConfig, Config, MoeConfig, RouterConfig, TextData
from pentad.trainer.job.outputs import Outputs
from pentad.trainer.metrics.report import Report
from pentad.trainer.processes.signals import StopRequest
from pentad.trainer.trainer import Trainer
from tests.distributed import run_distributed
from tests.training import job, open_trainer


class Curve:
    """A sink and an event log that remember."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, float, float]] = []
        self.events: list[dict] = []

    def log(self, found: Report | str, **fields) -> None:
        if isinstance(found, str):
            self.events.append({"event": found, **fields})
        else:
            self.rows.append((found.step, found.row["loss"], found.row["grad_norm"]))

    def add(self, report: Report) -> None: ...

    def close(self) -> None: ...


class StopAt(StopRequest):
    """Asks to stop in the step that is to be the last."""

    def __init__(self, trainer: Trainer, until: int) -> None:
        self._trainer, self._until = trainer, until

    @property
    def requested(self) -> bool:  # type: ignore[override]
        return self._trainer.step + 1 >= self._until


def train(rank: int, world: int, cfg: Config, folder: Path, until: int) -> tuple[list, list]:
    """Trains to step `until`, from the newest checkpoint in `folder` if there is one; curve and events of rank 0."""
    curve = Curve()
    session, trainer = open_trainer(rank, cfg, folder, asynchronous=True, on_event=curve.events.append)
    try:
        found = trainer.checkpointer.find_resume("latest")
        if found is not None:
            trainer.restore(found)
        trainer.train(Outputs(curve, curve), StopAt(trainer, until))  # type: ignore[arg-type]
        trainer.checkpointer.close()
    finally:
        session.close()
    return curve.rows, curve.events


def text_job(tmp_path: Path, **settings) -> Config:
    path = tmp_path / "text.txt"
    if not path.exists():
        path.write_text("".join(f"the {n}th line is {n * n} long\n" for n in range(3000)))
    model = {"vocab": 320, "max_positions": 32, **settings.pop("model", {})}
    cfg = job(model=model, steps=20, **settings)
    data = TextData(paths=(str(path),), cache=str(tmp_path / "cache"))
    return replace(cfg, data=data, checkpoint=CheckpointConfig(every=10))


def straight(tmp_path: Path, world: int, cfg: Config) -> list:
    return run_distributed(train, world, cfg, tmp_path / "straight", 20, group=False)[0][0]


LAYOUTS = {
    "one": {},
    "tp2 dp2 zero1": {"tp": 2, "dp": 2, "sharding": "zero1"},
    "tp4 zero1, kv replicated": {"tp": 4, "sharding": "zero1"},
    "dp4 fsdp2": {"dp": 4, "sharding": "fsdp2"},
    "tp2 dp2 fsdp2": {"tp": 2, "dp": 2, "sharding": "fsdp2"},
    "dp2 ddp": {"dp": 2, "sharding": "ddp"},
    "pp2 dp2 fsdp": {"pp": 2, "dp": 2, "sharding": "fsdp"},
    "pp2 dp2 zero2": {"pp": 2, "dp": 2, "sharding": "zero2"},
    "cp2 dp2, states over two": {"cp": 2, "dp": 2, "states": 2},
}
PAIRS = [
    ("one", "tp2 dp2 zero1"),
    ("tp2 dp2 zero1", "dp4 fsdp2"),
    ("dp4 fsdp2", "tp4 zero1, kv replicated"),
    ("tp4 zero1, kv replicated", "dp2 ddp"),
    ("tp2 dp2 fsdp2", "one"),
    ("dp4 fsdp2", "cp2 dp2, states over two"),
    ("cp2 dp2, states over two", "pp2 dp2 zero2"),
    ("pp2 dp2 zero2", "pp2 dp2 fsdp"),
    ("pp2 dp2 fsdp", "tp2 dp2 zero1"),
]


@pytest.mark.sample(1)
@pytest.mark.distributed
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_another_layout(tmp_path, first, second):
    model = {"kv_heads": 2, "tied": True}
    reference = straight(tmp_path, 1, text_job(tmp_path, model=model))
    assert reference[-1][1] < 0.95 * reference[0][1]
    rows = []
    for name, until in ((first, 10), (second, 20)):
        cfg = text_job(tmp_path, model=model, **LAYOUTS[name])
        world = cfg.parallel.ranks
        rows += run_distributed(train, world, cfg, tmp_path / "run", until, group=False)[0][0]
    assert [row[0] for row in rows] == list(range(1, 21))
    for mine, theirs in zip(rows, reference, strict=True):
        assert mine[1:] == pytest.approx(theirs[1:], rel=1e-11)


EXPERT_LAYOUTS = {
    "one": {},
    "dp2 ep2": {"dp": 2, "ep": 2, "sharding": "zero1"},
    "tp2 etp2": {"tp": 2, "etp": 2, "sharding": "zero1"},
    "tp2 dp2 ep4": {"tp": 2, "dp": 2, "ep": 4},
    "cp2 pp2 ep2": {"cp": 2, "pp": 2, "ep": 2, "sharding": "zero1"},
    "dp4 ep2, two replicas": {"dp": 4, "ep": 2, "sharding": "zero1"},
}


@pytest.mark.sample(1)
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("dp2 ep2", "tp2 etp2"),
        ("tp2 dp2 ep4", "cp2 pp2 ep2"),
        ("dp4 ep2, two replicas", "tp2 dp2 ep4"),
        ("tp2 etp2", "one"),
    ],
)
def test_experts_under_another_layout(tmp_path, first, second):
    """Experts are kept under their global numbers, with the biases and loads of their routers."""
    router = RouterConfig(
        groups_kept=1, selection_bias=True, bias_rate=0.01, aux_loss=0.05, aux_level="global_batch", z_loss=1e-3
    )
    model = {"moe": MoeConfig(experts=4, top_k=2, ffn=16, bias=True, router=router)}
    reference = straight(tmp_path, 1, text_job(tmp_path, model=model, optim="sgd"))
    rows = []
    for name, until in ((first, 10), (second, 20)):
        cfg = text_job(tmp_path, model=model, optim="sgd", **EXPERT_LAYOUTS[name])
        p = cfg.parallel
        world = p.ranks
        rows += run_distributed(train, world, cfg, tmp_path / "run", until, group=False)[0][0]
    assert [row[0] for row in rows] == list(range(1, 21))
    for mine, theirs in zip(rows, reference, strict=True):
        assert mine[1:] == pytest.approx(theirs[1:], rel=1e-11)


@pytest.mark.sample(1)
@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["one", "tp2 dp2 zero1", "tp2 dp2 fsdp2"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_same_layout_bit_for_bit(tmp_path, layout, dtype):
    cfg = text_job(tmp_path, dtype=dtype, deterministic=True, **LAYOUTS[layout])
    world = cfg.parallel.ranks
    reference = straight(tmp_path, world, cfg)
    rows = [
        row
        for until in (10, 20)
        for row in run_distributed(train, world, cfg, tmp_path / "run", until, group=False)[0][0]
    ]
    assert rows == reference


def test_other_data_is_refused(tmp_path):
    from pentad.configs.errors import UserError

    train(0, 1, text_job(tmp_path), tmp_path / "run", 10)
    with pytest.raises(UserError, match=r"train\.seed.*checkpoint was trained with 0, not 1"):
        train(0, 1, text_job(tmp_path, seed=1), tmp_path / "run", 20)
