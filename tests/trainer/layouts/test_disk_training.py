"""Training with activations on a disk gives the bits of training without, through stops and resumes too."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from pentad.configs.errors import UserError
from pentad.configs.schema import Config, HardwareConfig
from pentad.parallel.comm import disk as disks
from pentad.parallel.comm.lane import Lane
from pentad.parallel.pipeline.memory import ActivationBytes, slot_bytes
from pentad.parallel.pipeline.needs import Kinds
from pentad.parallel.pipeline.offload import offload
from pentad.trainer.memory.copies import copies_of
from pentad.trainer.metrics.peak import Peak
from pentad.trainer.pipeline import host_copies, programs
from pentad.trainer.pipeline.disk_space import tier_problems
from pentad.trainer.pipeline.disk_tier import GIB, HostRoom
from pentad.trainer.pipeline.programs import Pipeline, training_program
from pentad.trainer.pipeline.rates import disk_rate
from tests.distributed import run_distributed
from tests.slow_lane import SlowLane
from tests.trainer.checkpoint.test_resume import straight, text_job, train
from tests.training import Run, curve, job

SIZE: dict[str, Any] = {"steps": 2, "seq_len": 64, "global_batch": 16, "offload": "all"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {"group": 1},
    "1f1b": {"pp": 2, "dp": 2, "model": {"layers": 4}},
    "gpipe": {"pp": 2, "model": {"layers": 4}, "pipeline": {"schedule": "gpipe"}},
    "po-h": {"pp": 4, "offload": "none", "model": {"layers": 8}, "pipeline": {"schedule": "po-h", "chunks": 2}},
    "v-half": {"pp": 2, "tp": 2, "model": {"layers": 4}, "pipeline": {"schedule": "v-half", "chunks": 2}},
}


FAST_COPIES = HardwareConfig(peak_tflops=1e-3, host_gib_s=1e3)
"""Beside these passes copies to the host take no time."""


def _job(name: str, **more: Any) -> Config:
    return replace(job(**{**SIZE, **LAYOUTS[name], **more}), hardware=FAST_COPIES)


def _everything(rank: int, world: int, cfg: Config, seed: int | None) -> tuple[list, int, int]:
    """The curve with all that is offloaded on the disk, and bytes of the host and the disk."""

    def all_of_it(room: Any, chosen: Any, times: Any) -> Any:
        return frozenset(chosen), times

    lane = Lane if seed is None else partial(SlowLane, seed=1000 * seed + rank)
    with mock.patch.object(HostRoom, "stored", all_of_it), mock.patch.object(host_copies, "Lane", lane):
        run = Run(rank, cfg)
        try:
            found = [run.step(step) for step in range(cfg.train.steps)]
            copies = run.stepper._copies
            assert copies is not None
            return found, copies.offloads.host_bytes, copies.offloads.disk_bytes
        finally:
            run.close()


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name != "alone" else ()) for name in LAYOUTS]
)
def test_curves_are_bit_equal_with_everything_on_the_disk(name: str) -> None:
    cfg = _job(name)
    plain = run_distributed(curve, cfg.parallel.ranks, cfg, group=False)
    with tempfile.TemporaryDirectory() as folder:
        on_disk = replace(cfg, memory=replace(cfg.memory, offload_disk=folder))
        for seed in (None, 1):
            for rank, (found, _, on_the_disk) in enumerate(
                run_distributed(_everything, cfg.parallel.ranks, on_disk, seed, group=False)
            ):
                assert found == plain[rank] and on_the_disk > 0
        assert os.listdir(folder) == []


def _needs(cfg: Config, share: float) -> Config:
    """The job with room on the host for what passes through to the disk (0), for all that is offloaded (1), or so."""
    pipeline = Pipeline.of(cfg)
    copies = copies_of(cfg, pipeline)
    sizes = ActivationBytes(activation=copies.kept)
    microbatches = cfg.train.global_batch // (cfg.train.micro_batch * cfg.parallel.dp)
    all_host = training_program(cfg, pipeline, microbatches, [1] * cfg.parallel.pp, copies)
    away = [(op.stage, op.index) for ops in all_host.ranks for op in ops if op.kind is Kinds.OFFLOAD]
    compute = programs.lower(programs.compute_program(cfg, pipeline, microbatches), times=pipeline.times)
    times = replace(copies.beside(pipeline), store=(0.0,), fetch=(0.0,))
    least, most = (
        max(slot_bytes(each, sizes, "slab")) for each in (offload(compute, away, times, stored=away), all_host)
    )
    assert least < most
    room = (least + share * (most - least)) * (1 + 1e-9) / GIB
    return replace(cfg, memory=replace(cfg.memory, host_gib=room, offload_disk=tempfile.gettempdir()))


def _stored(cfg: Config) -> list[int]:
    pipeline = Pipeline.of(cfg)
    copies = copies_of(cfg, pipeline)
    microbatches = cfg.train.global_batch // (cfg.train.micro_batch * cfg.parallel.dp)
    program = training_program(cfg, pipeline, microbatches, [1] * cfg.parallel.pp, copies)
    return [sum(op.kind is Kinds.STORE for op in ops) for ops in program.ranks]


def test_the_disk_takes_what_the_host_may_not_hold_the_longest_lived_first() -> None:
    cfg = _job("gpipe")
    none, some, most = (_stored(_needs(cfg, share)) for share in (1.0, 0.5, 0.0))
    assert none == [0, 0] and 0 < some[0] < most[0]
    pipeline, wanted = Pipeline.of(cfg), _needs(cfg, 0.5)
    copies = copies_of(cfg, pipeline)
    sizes = ActivationBytes(activation=copies.kept)
    program = training_program(wanted, pipeline, 8, [1, 1], copies)
    assert max(slot_bytes(program, sizes, "slab")) <= wanted.memory.host_gib * GIB  # type: ignore[operator]


def test_what_the_host_cannot_hold_without_a_disk_is_said_with_the_key() -> None:
    cfg = _needs(_job("gpipe"), 0.5)
    without = replace(cfg, memory=replace(cfg.memory, offload_disk=None))
    with pytest.raises(UserError, match=r"memory\.host_gib: .* take .* GiB of the host .* set memory\.offload_disk"):
        _stored(without)
    tiny = replace(cfg, memory=replace(cfg.memory, host_gib=1e-9))
    with pytest.raises(UserError, match=r"memory\.host_gib: 1e-09, but .* on their way to the disk"):
        _stored(tiny)
    # What costs no time is offloaded as far as the host has room.
    auto = replace(without.memory, offload_activations="auto")
    assert _stored(replace(without, memory=auto)) == [0, 0]
    for broken in (without, tiny):
        assert [each.key for each in tier_problems(broken)] == ["memory.host_gib"]


def test_a_disk_that_has_no_room_is_found_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = _needs(_job("gpipe"), 0.0)
    assert tier_problems(cfg) == []
    real = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: type("Full", (), {"f_bavail": 1, "f_frsize": real.f_frsize}))
    (found,) = tier_problems(cfg)
    assert found.key == "memory.offload_disk" and "GiB free, and one rank needs" in found.message


def _measured(rank: int, world: int, cfg: Config) -> tuple[list, list]:
    with mock.patch.object(disks, "_PROBE", 1 << 16):
        run = Run(rank, cfg, peak=lambda mesh: Peak(0.1, "made up"))
        try:
            ops = [str(op) for op in run.session.program.ranks[run.mesh.axis("pp").rank]]
            return [run.step(step) for step in range(cfg.train.steps)], ops
        finally:
            run.close()


@pytest.mark.distributed
def test_the_disk_is_measured_at_the_start_and_training_is_the_same() -> None:
    cfg = _job("gpipe")
    plain = run_distributed(curve, 2, cfg, group=False)
    found = run_distributed(_measured, 2, _needs(cfg, 0.3), group=False)
    assert [each for each, _ in found] == plain
    assert any(token.startswith("STO") for token in found[0][1])


def test_a_file_system_without_direct_access_is_named_by_one_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(disks, "_PROBE", 1 << 16)
    monkeypatch.setattr(disks.Disk, "open", lambda folder: disks.Disk(folder, False))
    assert min(*disk_rate(str(tmp_path), says=True), *disk_rate(str(tmp_path), says=False)) > 0
    assert capsys.readouterr().err.count("has no direct access (O_DIRECT)") == 1
    with pytest.raises(UserError, match=r"memory\.offload_disk: .* cannot be written"):
        monkeypatch.undo()
        disk_rate(str(tmp_path / "none"), says=True)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_that_stopped_goes_on_bit_for_bit(tmp_path: Path) -> None:
    given = {**LAYOUTS["gpipe"], "model": {"layers": 4, "max_positions": 64}, "seq_len": 64, "global_batch": 16}
    cfg = replace(text_job(tmp_path, **given, offload="all", deterministic=True), hardware=FAST_COPIES)
    world, expected = cfg.parallel.ranks, straight(tmp_path, cfg.parallel.ranks, cfg)
    away = replace(cfg, memory=_needs(cfg, 0.3).memory)
    first = run_distributed(train, world, away, tmp_path / "parts", 10, group=False)[0][0]
    assert first + run_distributed(train, world, away, tmp_path / "parts", 20, group=False)[0][0] == expected
