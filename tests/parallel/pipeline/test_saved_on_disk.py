"""Activations on a disk: equal gradients, whatever the copies' speed and order; what is on its way is not read."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pentad.configs.errors import UserError
from pentad.parallel.comm import disk as disks
from pentad.parallel.comm.disk import CopyStopped, Disk, DiskFile
from pentad.parallel.comm.lane import Lane
from pentad.parallel.comm.slab import DiskLanes
from pentad.parallel.comm.waiting import Abort, Aborted
from pentad.parallel.pipeline.needs import Kinds
from pentad.parallel.pipeline.offload import offload, windows
from pentad.parallel.pipeline.program import Op, Program
from pentad.parallel.pipeline.saved import Offloads
from pentad.parallel.pipeline.schedules import generate
from pentad.parallel.pipeline.times import Times
from tests.parallel.pipeline.test_saved import Ran, run_net
from tests.slow_lane import SlowLane

CPU = torch.device("cpu")
TIMES = Times(offload=(0.1,), reload=(0.1,), store=(0.3,), fetch=(0.3,))


def _program(microbatches: int, stored: Callable[[int], bool] = lambda index: True) -> Program:
    program = generate("gpipe", ranks=1, microbatches=microbatches)
    chosen = [window.pass_ for mine in windows(program, TIMES) for window in mine]
    return offload(program, chosen, TIMES, stored=[each for each in chosen if stored(each[1])])


@contextmanager
def _lanes(folder: Path, make: Callable[..., Lane] = Lane) -> Iterator[dict[str, Any]]:
    abort = Abort()
    lanes = {name: make(name, CPU, abort=abort) for name in ("out", "back", "store", "get")}
    disk = DiskLanes(Disk.open(folder), lanes["store"], lanes["get"], lambda: abort.reason is not None)
    try:
        yield {"out": lanes["out"], "back": lanes["back"], "disk": disk}
    finally:
        for lane in lanes.values():
            lane.close()


def _same(one: Ran, other: Ran) -> bool:
    pairs = zip([*one.grads, *one.outputs], [*other.grads, *other.outputs], strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_gradients_are_those_of_activations_that_stayed(tmp_path: Path) -> None:
    with _lanes(tmp_path) as lanes:
        plain = run_net(generate("gpipe", ranks=1, microbatches=6), **lanes)
        everything, some = run_net(_program(6), **lanes), run_net(_program(6, lambda i: i % 2 == 0), **lanes)
        host = run_net(_program(6, lambda i: False), **lanes)
    assert _same(plain, everything) and _same(plain, some) and _same(plain, host)
    assert everything.disk_bytes > some.disk_bytes > 0 == host.disk_bytes
    assert everything.host_bytes < some.host_bytes < host.host_bytes
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("seed", range(12))
def test_slow_copies_that_end_in_any_order_change_nothing(seed: int, tmp_path: Path) -> None:
    with _lanes(tmp_path) as lanes:
        plain = run_net(generate("gpipe", ranks=1, microbatches=5), **lanes)

    def slow(name: str, device: Any, **given: Any) -> Lane:
        return SlowLane(name, device, seed=seed, most_s=0.03 if name in ("store", "get") else 0.01, **given)

    with _lanes(tmp_path, slow) as lanes:
        assert _same(plain, run_net(_program(5, lambda i: (i + seed) % 3 > 0), **lanes, steps=2))


class _Counted:
    """A disk that counts reads, and whose writes wait until they may."""

    def __init__(self, disk: Disk) -> None:
        self.disk, self.may, self.reads = disk, threading.Event(), 0

    def file(self, nbytes: int) -> Any:
        file, write, read = self.disk.file(nbytes), DiskFile.write, DiskFile.read

        def slow(data: memoryview, stopped: Callable[[], bool]) -> None:
            self.may.wait()
            write(file, data, stopped)

        def counted(data: memoryview, stopped: Callable[[], bool]) -> None:
            self.reads += 1
            read(file, data, stopped)

        file.write, file.read = slow, counted  # type: ignore[method-assign]
        return file


WAY = ("OFF0@0#0", "REL0@0", "STO0@0#0", "DRP0@0", "GET0@0#0", "GOT0@0", "PRE0@0", "RLD0@0", "RES0@0")


@pytest.mark.parametrize("written", [True, False])
def test_what_is_on_its_way_to_the_disk_is_not_read_from_it(written: bool, tmp_path: Path) -> None:
    ops = [Op(Kinds.FORWARD, 0, 0), *map(Op.parse, WAY), Op(Kinds.BACKWARD, 0, 0)]
    with _lanes(tmp_path) as lanes:
        plain = run_net(generate("gpipe", ranks=1, microbatches=1), **lanes)
        store, counted = lanes["disk"].store, _Counted(lanes["disk"].disk)
        disk = DiskLanes(counted, store, lanes["disk"].get, lambda: False)  # type: ignore[arg-type]

        def between(op: Op) -> None:
            if op.kind is (Kinds.DROP if written else Kinds.FETCH):
                counted.may.set()
                store.submit(lambda: None).wait()

        ran = run_net(Program(1, (0,), (tuple(ops),)), **{**lanes, "disk": disk}, between=between)
    assert _same(plain, ran) and counted.reads == written


def test_files_are_gone_when_they_are_open_and_hold_their_space(tmp_path: Path) -> None:
    disk = Disk.open(tmp_path)
    assert min(disk.measure(1 << 20)) > 0
    file = disk.file(1 << 20)
    assert os.listdir(tmp_path) == [] and os.fstat(file._fd).st_blocks * 512 >= 1 << 20
    fd = file._fd
    del file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_file_system_without_direct_access_uses_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(fd: int, command: int, flags: int = 0) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return 0

    monkeypatch.setattr(disks.fcntl, "fcntl", refuses)
    disk = Disk.open(tmp_path)
    assert not disk.direct
    data = bytearray(os.urandom(100_000))
    file, back = disk.file(100_000), bytearray(100_000)
    file.write(memoryview(data))
    file.read(memoryview(back))
    assert back == data


def test_a_full_disk_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    with _lanes(tmp_path) as lanes:
        with pytest.raises(UserError, match=r"memory\.offload_disk: .* cannot take"):
            lanes["disk"].file(1 << 60)
        with pytest.raises(UserError, match=r"memory\.offload_disk"):
            missing = Disk(tmp_path / "missing", True)
            DiskLanes(missing, lanes["disk"].store, lanes["disk"].get, lambda: False).file(4096)


def test_a_copy_that_nobody_wants_ends_between_two_pieces(tmp_path: Path) -> None:
    file, asked = Disk.open(tmp_path).file(3 * disks.PIECE), []

    def stopped() -> bool:
        asked.append(1)
        return len(asked) > 2

    memory = disks.mmap.mmap(-1, 3 * disks.PIECE)
    with pytest.raises(CopyStopped):
        file.write(memoryview(memory), stopped)
    assert len(asked) == 3


def test_an_abort_ends_the_wait_for_a_disk(tmp_path: Path) -> None:
    with _lanes(tmp_path) as lanes:
        may = threading.Event()
        lanes["disk"].store.submit(may.wait)
        offloads = Offloads(_program(2), 0, device=CPU, **lanes)
        for tokens in (("OFF0@0#0", "REL0@0", "STO0@0#0", "DRP0@0"), ()):
            with offloads.catching(0, 0):
                (torch.ones(3000, requires_grad=True) * 2).square()
            for op in map(Op.parse, tokens):
                offloads.handlers[op.kind](op)
            if tokens:
                offloads.clear()
        threading.Timer(0.05, lambda: lanes["back"]._abort.trigger("somebody is gone")).start()
        with pytest.raises(Aborted):  # the slab is still being written
            offloads.handlers[Kinds.OFFLOAD](Op.parse("OFF0@0#0"))
        offloads.close()
        assert offloads.host_bytes == offloads.disk_bytes == 0
        may.set()
