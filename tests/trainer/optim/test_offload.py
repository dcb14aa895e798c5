"""Masters and moments on the host: the same bits as on the device, in every way to update them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pentad.configs.errors import UserError
from pentad.configs.schema import AdamWConfig, Config, MemoryConfig
from pentad.parallel.comm.disk import Disk
from pentad.trainer.optim.offload import OffloadedStates
from pentad.trainer.optim.optimizer import UpdatePiece, UpdateScalars, make_rule
from pentad.trainer.optim.places import HostStatePlace, make_place
from pentad.trainer.optim.states import Optimizer, make_optimizer
from tests.distributed import run_distributed
from tests.trainer.checkpoint.test_resume import text_job, train
from tests.trainer.optim.test_optimizer import CPU, _units
from tests.training import Run, job

SMALL = 0.01
"""MiB of a subgroup: several of each bucket of `job`."""
WAYS: dict[str, dict[str, Any]] = {
    "host": {"offload_optimizer": "host", "optimizer_stride": 0},
    "every third on the device": {"offload_optimizer": "host", "optimizer_stride": 3},
    "device": {"offload_optimizer": "host", "optimizer_stride": 1},
    "disk": {"offload_optimizer": "disk"},
    "measured": {"offload_optimizer": "host", "optimizer_stride": "auto"},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp, bf16": {"dtype": "bf16"},
    "zero1, bf16": {"dp": 2, "sharding": "zero1", "dtype": "bf16"},
    "zero1, fp64, tp": {"dp": 2, "tp": 2, "sharding": "zero1"},
    "fp32, momentum": {"dtype": "fp32", "optim": "sgd"},
    "fsdp, bf16": {"dp": 2, "sharding": "fsdp2", "dtype": "bf16"},
}


def trained(rank: int, world: int, cfg: Config) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """The curve of a job, and everything that this rank has at its end."""
    run = Run(rank, cfg)
    try:
        curve = [run.step(step) for step in range(cfg.train.steps)]
        run.parts.replicas.wait_gathers()
        held = {f"params/{name}": value.clone() for name, value in run.parts.replicas.keep().items()}
        for unit, states in run.optimizer.states.items():
            held |= {f"states/{unit}/{name}": value.clone() for name, value in states.items()}
        return curve, held
    finally:
        run.close()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "ways"),
    [
        ("ddp, bf16", ("host", "every third on the device", "device", "measured")),
        ("zero1, bf16", ("every third on the device", "disk")),
        ("zero1, fp64, tp", ("host",)),
        ("fp32, momentum", ("every third on the device",)),
        ("fsdp, bf16", ("every third on the device",)),
        *(pytest.param(layout, tuple(WAYS), marks=pytest.mark.slow) for layout in LAYOUTS),
    ],
)
def test_every_way_gives_the_bits_of_the_device(layout: str, ways: tuple[str, ...], tmp_path: Path) -> None:
    wanted = {"steps": 3, **LAYOUTS[layout]}
    world = job(**wanted).parallel.ranks
    expected = run_distributed(trained, world, job(**wanted), group=False)
    for way in ways:
        memory = {**WAYS[way], "optimizer_subgroup_mib": SMALL, "offload_disk": str(tmp_path)}
        found = run_distributed(trained, world, job(**wanted, memory=memory), group=False)
        for (curve, held), (curve_there, held_there) in zip(expected, found, strict=True):
            assert curve_there == curve and held_there.keys() == held.keys()
            assert all(torch.equal(held_there[name], value) for name, value in held.items()), way
    assert not list(tmp_path.iterdir())


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("none", "disk"),
        pytest.param("none", "host", marks=pytest.mark.slow),
        pytest.param("host", "none", marks=pytest.mark.slow),
        pytest.param("disk", "host", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_states_elsewhere(tmp_path: Path, first: str, second: str) -> None:
    """Bit for bit, from a checkpoint that was written with them in another place."""
    layout = {"dp": 2, "sharding": "zero1", "dtype": "bf16", "deterministic": True}
    rows = {}
    for name, wheres in (("straight", (first,)), ("parts", (first, second))):
        rows[name] = []
        for where, until in zip(wheres, (10, 20) if len(wheres) == 2 else (20,), strict=True):
            memory = {"offload_optimizer": where, "optimizer_subgroup_mib": SMALL, "optimizer_stride": 2}
            memory["offload_disk"] = str(tmp_path)
            cfg = text_job(tmp_path, memory=memory, **layout)
            rows[name] += run_distributed(train, 2, cfg, tmp_path / name, until, group=False)[0][0]
    assert len(rows["parts"]) == 20 and rows["parts"] == rows["straight"]


class _Breaks:
    """A rule that fails once, before its nth update."""

    def __init__(self, cfg: AdamWConfig, at: int) -> None:
        self._rule, self._left = make_rule(cfg, CPU), at
        self.names, self.dtype = self._rule.names, self._rule.dtype

    def update(self, pieces: Sequence[UpdatePiece], now: UpdateScalars) -> None:
        self._left -= 1
        if self._left == 0:
            raise OSError("broken")
        self._rule.update(pieces, now)


@pytest.mark.parametrize("stride", [0, 1, 2])
def test_an_update_that_breaks_off_inside_a_unit_goes_on_where_it_was(stride: int) -> None:
    cfg = AdamWConfig(weight_decay=0.1)
    memory = MemoryConfig(optimizer_stride=stride, optimizer_subgroup_mib=0.001)
    elements = (30000, 9000)
    for at in (1, 2, 5, 9, 12):
        rule = _Breaks(cfg, at)
        broken: Optimizer = OffloadedStates(
            rule, rule, HostStatePlace(pinned=False), CPU, memory, fixed=False, recorder=None
        )
        results = []
        for optimizer in (broken, make_optimizer(cfg, CPU)):
            units = _units(torch.float32, elements)
            for unit in units:
                unit.grad.copy_(unit.value.flip(0))
                optimizer.prepare(unit, None)
            now = UpdateScalars(0.01, torch.tensor(0.5), torch.tensor(0.0), torch.tensor(1.0))
            try:
                optimizer.step(units, now)
            except OSError:
                optimizer.step(units, now)
            optimizer.settle()
            results.append(
                [unit.value for unit in units] + [s for u in units for s in optimizer.states[u.key].values()]
            )
            optimizer.close()
        for mine, theirs in zip(*results, strict=True):
            assert torch.equal(mine, theirs), at


def test_a_disk_without_direct_io_is_said_once_and_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Disk, "open", staticmethod(lambda folder: Disk(folder, False)))
    cfg = job(memory={"offload_optimizer": "disk", "offload_disk": str(tmp_path)})
    for first in (True, False):
        place = make_place(cfg, CPU, first=first)
        assert place is not None
        place.reserve([40_000])
        tensor = place.allocate(10_000, torch.float32)
        fetched = place.fetch([tensor])
        (run,) = fetched.wait()
        assert run.eq(0).all()
        run.copy_(torch.arange(10_000))
        fetched.store()
        place.settle()
        assert torch.equal(tensor, torch.arange(10_000.0))
        place.close()
    assert capsys.readouterr().err.count("has no direct access") == 1 and not list(tmp_path.iterdir())


def test_a_disk_or_host_without_room_names_the_key(tmp_path: Path) -> None:
    cfg = job(memory={"offload_optimizer": "disk", "offload_disk": str(tmp_path)})
    place = make_place(cfg, CPU)
    assert place is not None
    with pytest.raises(UserError, match=r"memory\.offload_disk: .*takes no 4,611,686,018,427,387,904 bytes more"):
        place.allocate(1 << 60, torch.float32)
    place.close()
    with pytest.raises(UserError, match=r"memory\.offload_optimizer: host: the host has no .* bytes left; set disk"):
        HostStatePlace(pinned=False).allocate(1 << 58, torch.float32)
