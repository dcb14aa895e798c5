"""The record: written by one process, read by another, whatever happens to the writer."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pentad.parallel.record import files as record_files
from pentad.parallel.record import reader as record_view
from pentad.parallel.record import ring as record
from pentad.parallel.record.ring import ABORTED, FAILED, Recorder, create
from pentad.parallel.record.slots import ENTRY, ENTRY_BYTES

_WRITER = """
import sys, time
from pathlib import Path
from pentad.parallel.record.ring import Recorder

path, mode, entries = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
r = Recorder(path, rank=3, world=8, entries=entries, epoch=2)
gather, tp = r.intern("all_gather"), r.intern("tp")
if mode == "hang":
    r.step, r.micro_batch, r.op = 17, 4, 9
    r.exit(r.enter(gather, axis=tp, seq=40))
    r.enter(gather, axis=tp, group=2, peer=5, nbytes=4096, seq=41)
    print("ready", flush=True)
    time.sleep(600)
else:
    print("ready", flush=True)
    n = 0
    while True:  # every field derives from one number: a mixture of two entries cannot pass the reader's check
        r.step, r.micro_batch, r.op = n, n % 1000, n % 77
        t = r.enter(gather, axis=n % 5, group=n % 7, peer=n % 11, nbytes=3 * n, seq=n + 1)
        r.exit(t, n % 2)
        n += 1
"""


def _start(path: Path, mode: str, entries: int) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", _WRITER, str(path), mode, str(entries)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def _kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _assert_names_the_open_entry(ring: record_view.RecordRing) -> None:
    (entry,) = ring.open()
    assert ring.name(entry["kind"]) == "all_gather" and ring.name(entry["axis"]) == "tp"
    assert (entry["step"], entry["micro_batch"], entry["op"]) == (17, 4, 9)
    assert (entry["group"], entry["peer"], entry["nbytes"], entry["seq"], entry["epoch"]) == (2, 5, 4096, 41, 2)
    assert entry["start"] == entry["enqueued"] <= time.monotonic_ns()


def test_open_entry_is_seen_while_the_writer_runs_and_after_sigkill(tmp_path: Path) -> None:
    path = tmp_path / "r.ring"
    process = _start(path, "hang", 64)
    try:
        live = record_view.read(path)
        assert live.header.pid == process.pid and live.header.rank == 3 and live.header.world == 8
        assert len(live.entries) == 2 and live.header.next_ticket == 2
        _assert_names_the_open_entry(live)
    finally:
        _kill(process)
    dead = record_view.read(path)
    _assert_names_the_open_entry(dead)
    assert not dead.header.closed and abs(dead.wall(time.monotonic_ns()) - time.time()) < 5


def test_no_torn_entry_from_a_writer_at_full_speed(tmp_path: Path) -> None:
    path = tmp_path / "r.ring"
    process = _start(path, "fast", 64)
    seen = 0
    try:
        last = -1
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            ring = record_view.read(path)
            e = ring.entries
            n = e["step"]
            np.testing.assert_array_equal(e["ticket"], n)
            np.testing.assert_array_equal(e["micro_batch"], n % 1000)
            np.testing.assert_array_equal(e["op"], n % 77)
            np.testing.assert_array_equal(e["axis"], n % 5)
            np.testing.assert_array_equal(e["group"], n % 7)
            np.testing.assert_array_equal(e["peer"], n % 11)
            np.testing.assert_array_equal(e["nbytes"], 3 * n)
            np.testing.assert_array_equal(e["seq"], n + 1)
            closed = e["end"] > 0
            np.testing.assert_array_equal(e["flags"][closed], n[closed] % 2)
            assert np.all(e["end"][closed] >= e["start"][closed])
            if not len(e):  # the writer came round the whole ring while this process was not running
                continue
            assert e["ticket"][-1] >= last
            last = e["ticket"][-1]
            seen += len(e)
    finally:
        _kill(process)
    assert seen > 1000 and last > 64
    dead = record_view.read(path)
    assert len(dead.entries) + dead.torn == 64 and dead.torn <= 1


def test_ring_keeps_the_newest_entries_and_late_exits_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "r.ring"
    recorder = Recorder(path, rank=0, world=1, entries=8)
    kind = recorder.intern("forward")
    tickets = [recorder.enter(kind, seq=i) for i in range(20)]
    assert tickets == list(range(20))
    recorder.exit(tickets[3], ABORTED)  # its slot now holds ticket 19
    recorder.stamp(tickets[4], 1, 2)
    recorder.exit(tickets[18], ABORTED)
    ring = record_view.read(path)
    assert list(ring.entries["ticket"]) == list(range(12, 20)) == list(ring.entries["seq"])
    assert list(ring.open()["ticket"]) == [12, 13, 14, 15, 16, 17, 19]
    assert ring.entries[6]["flags"] == ABORTED and ring.entries["flags"].sum() == ABORTED


def test_a_slot_left_half_written_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "r.ring"
    recorder = Recorder(path, rank=0, world=1, entries=8)
    for _ in range(3):
        recorder.enter(recorder.intern("x"))
    data = bytearray(path.read_bytes())
    data[65536 + ENTRY_BYTES] = 1  # odd version of slot 1
    other = tmp_path / "torn.ring"
    other.write_bytes(data)
    ring = record_view.read(other)
    assert list(ring.entries["ticket"]) == [0, 2] and ring.torn == 1


def test_stamp_span_and_close(tmp_path: Path) -> None:
    path = tmp_path / "r.ring"
    recorder = Recorder(path, rank=0, world=1)
    forward, load = recorder.intern("forward"), recorder.intern("load")
    ticket = recorder.enter(forward)
    recorder.stamp(ticket, 5_000_000_000, 7_000_000_000)
    with pytest.raises(RuntimeError), recorder.span(load):
        raise RuntimeError
    with recorder.span(forward) as span:
        recorder.stamp(span.ticket, 1, 2)
    recorder.epoch = 4
    recorder.enter(load)
    recorder.close()
    ring = record_view.read(path)
    assert ring.header.closed and ring.header.epoch == 4 and list(ring.entries["epoch"]) == [0, 0, 0, 4]
    assert ring.entries[0]["start"] == 5_000_000_000 and ring.entries[0]["end"] == 7_000_000_000
    assert ring.entries[1]["flags"] == FAILED and ring.entries[1]["end"] > 0


def test_names_outlive_a_full_table(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r.ring", rank=0, world=1, entries=8)
    codes = [recorder.intern(f"operation.{'x' * 200}.{i}") for i in range(400)]
    assert codes[0] == 1 == recorder.intern(f"operation.{'x' * 200}.0") and codes[-1] == 0
    assert recorder.intern("") == 0
    ring = record_view.read(tmp_path / "r.ring")
    assert ring.name(codes[100]).endswith(".100") and ring.name(9999) == "#9999"


def test_threads_share_a_recorder(tmp_path: Path) -> None:
    path = tmp_path / "r.ring"
    recorder = Recorder(path, rank=0, world=1, entries=4096)

    def work(thread: int) -> None:
        for i in range(500):
            recorder.exit(recorder.enter(recorder.intern(f"k{i % 10}"), group=thread, seq=i))

    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ring = record_view.read(path)
    assert len(ring.entries) == 2000 and not len(ring.open())
    assert sorted(zip(ring.entries["group"], ring.entries["seq"], strict=True)) == [
        (t, i) for t in range(4) for i in range(500)
    ]
    assert all(ring.name(e["kind"]) == f"k{e['seq'] % 10}" for e in ring.entries)


@pytest.fixture
def rings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where rings lie, of this test alone."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(record, "ring_folders", lambda: (folder, folder))
    return folder


def _ring(rank: int, entries: int = 8) -> Recorder:
    recorder = create("run", rank=rank, world=2, entries=entries)
    recorder.enter(recorder.intern("forward"))
    return recorder


def test_index_and_collect(tmp_path: Path, rings: Path) -> None:
    run = tmp_path / "run"
    files = [record_files.RingFile(rank, f"host{rank}", str(_ring(rank).path), os.getpid()) for rank in range(2)]
    record_files.write_index(run, files)
    record_files.write_index(run, [record_files.RingFile(0, "host0", "/absent", 1, epoch=1)])
    assert [(f.epoch, f.rank) for f in record_files.read_index(run)] == [(0, 0), (0, 1), (1, 0)]
    copies = record_files.collect(run, record_files.read_index(run), host="host1", remove=True)
    assert copies == [run / "record" / "rank-00001.epoch-0.ring"] and not (rings / "pentad-run-1.ring").exists()
    assert record_view.read(copies[0]).header.rank == 1 and (rings / "pentad-run-0.ring").exists()
    copied = record_view.read(copies[0])
    assert [copied.name(int(code)) for code in copied.entries["kind"]] == ["forward"]
    # Another run in the folder does not know the rings of the one before.
    record_files.write_index(run, files[:1], run="another")
    assert record_files.read_index(run) == files[:1]


def test_only_the_written_part_of_a_ring_is_copied_and_reads_the_same(tmp_path: Path, rings: Path) -> None:
    recorder = _ring(0, entries=4096)
    file = record_files.RingFile(0, "here", str(recorder.path), os.getpid())
    original = record_view.read(rings / "pentad-run-0.ring")
    (copy,) = record_files.collect(tmp_path, [file], host="here")
    assert copy.stat().st_size == 65536 + 128 < (rings / "pentad-run-0.ring").stat().st_size
    read = record_view.read(copy)
    assert read.header == original.header and (read.entries == original.entries).all()
    copy.write_bytes(copy.read_bytes()[:-1])
    with pytest.raises(record_view.RecordError, match="cut short"):
        record_view.read(copy)


def test_an_index_makes_nobody_copy_or_delete_other_files(tmp_path: Path, rings: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("mine")
    recorder = _ring(0)
    assert recorder.path is not None
    named = rings / "pentad-run-1.ring"
    named.write_text("not a ring")
    (rings / "pentad-link-0.ring").symlink_to(secret)
    (rings / "pentad-twin-0.ring").symlink_to(recorder.path)
    os.mkfifo(rings / "pentad-pipe-0.ring")
    elsewhere = tmp_path / "pentad-run-0.ring"
    elsewhere.write_bytes(recorder.path.read_bytes())
    other_name = rings / "notes-0.ring"
    other_name.write_bytes(recorder.path.read_bytes())
    pid = os.getpid()
    wrong = [
        (0, secret, pid),
        (1, named, pid),
        (0, rings / "pentad-link-0.ring", pid),
        (0, rings / "pentad-twin-0.ring", pid),
        (0, rings / "pentad-pipe-0.ring", pid),
        (0, elsewhere, pid),
        (0, other_name, pid),
        (0, rings / "x" / ".." / "pentad-run-0.ring", pid),
        (0, recorder.path, pid + 1),  # another run's
        (1, recorder.path, pid),
    ]
    before = sorted(rings.iterdir())
    files = [record_files.RingFile(rank, "here", str(path), pid) for rank, path, pid in wrong]
    assert record_files.collect(tmp_path / "run", files, host="here", remove=True) == []
    assert sorted(rings.iterdir()) == before and secret.read_text() == "mine" and elsewhere.exists()


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"rings": 3}',
        '{"rings": [{"rank": -1, "host": "h", "file": "f", "pid": 1}]}',
        '{"rings": [{"rank": 0, "host": "h", "file": "f", "pid": 1, "epoch": "../../x"}]}',
        '{"rings": [{"rank": 1e999, "host": "h", "file": "f", "pid": 1}]}',
        '{"rings": [[[]]], "rings": []}',
        "[" * 100000,
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "index.json").write_text(text)
    with pytest.raises(record_view.RecordError, match=r"index.json"):
        record_files.read_index(tmp_path)
    record_files.write_index(tmp_path, [])
    assert record_files.read_index(tmp_path) == []


@pytest.mark.parametrize(
    ("offset", "width", "value"),
    [
        (8, 4, 1),  # format
        (12, 4, 1 << 30),  # bytes of the header
        (16, 4, 8),  # bytes of the names
        (24, 8, 0),  # capacity
        (24, 8, -1),
        (32, 4, -1),  # rank
        (36, 4, 0),  # world
        (512, 8, 1 << 62),  # next ticket
        (520, 8, 1 << 40),  # bytes of the names in use
    ],
)
def test_a_ring_with_a_damaged_header_is_refused(
    tmp_path: Path, rings: Path, offset: int, width: int, value: int
) -> None:
    recorder = _ring(0)
    assert recorder.path is not None
    data = bytearray(recorder.path.read_bytes()[: 65536 + 128])  # as in a run's folder
    data[offset : offset + width] = value.to_bytes(width, "little", signed=True)
    (tmp_path / "ring").write_bytes(data)
    with pytest.raises(record_view.RecordError):
        record_view.read(tmp_path / "ring")


def test_rings_of_dead_processes_are_swept_and_no_others(rings: Path) -> None:
    alive = _ring(0)
    assert alive.path is not None
    process = _start(rings / "pentad-dead-3.ring", "hang", 8)
    other = rings / "pentad-other-0.ring"
    other.write_text("not a ring")
    assert record_files.sweep() == []
    _kill(process)
    assert record_files.sweep() == [rings / "pentad-dead-3.ring"]
    assert alive.path.exists() and other.exists()


def test_a_ring_whose_writer_lives_in_another_container_is_kept(rings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = _ring(0)
    assert recorder.path is not None
    monkeypatch.setattr(record_files.ProcessId, "alive", False)  # its process is not seen here; its lock is
    assert record_files.sweep() == [] and recorder.path.exists()


def test_create_replaces_a_previous_ring_without_touching_its_readers() -> None:
    run_id = f"test-{os.getpid()}"
    first = create(run_id, rank=0, world=1, entries=8)
    assert first.path is not None
    try:
        first.enter(first.intern("x"))
        second = create(run_id, rank=0, world=1, entries=16)
        assert second.path == first.path
        assert record_view.read(first.path).header.capacity == 16 and not len(record_view.read(first.path).entries)
        first.exit(first.enter(first.intern("y")))  # the old mapping stays valid
    finally:
        first.path.unlink(missing_ok=True)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"hello")
    with pytest.raises(record_view.RecordError, match="not a record ring"):
        record_view.read(tmp_path / "a")
    with pytest.raises(ValueError, match="at least 1"):
        Recorder(None, rank=0, world=1, entries=0)


def test_layout() -> None:
    assert ENTRY.size == ENTRY_BYTES == record_view.ON_FILE.itemsize


def test_an_entry_is_written_with_a_handful_of_calls() -> None:
    """What an entry costs, counted instead of timed: no loop, no formatting, nothing that grows with the ring."""
    import sys

    counts = []
    for entries in (64, 4096):
        recorder = Recorder(None, rank=0, world=1, entries=entries)
        recorder.hold()
        kind = recorder.intern("all_reduce")
        calls: list[str] = []
        sys.setprofile(
            lambda _frame, event, _what, found=calls: found.append(event) if event.endswith("call") else None
        )
        try:
            recorder.exit(recorder.enter(kind, 1, 2, -1, 3, 4096, 12, 0))
        finally:
            sys.setprofile(None)
        counts.append(sum(event.endswith("call") for event in calls))
    assert counts[0] == counts[1] <= 8, counts


def test_garbage_that_is_collected_while_entries_are_written_is_an_entry_itself(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "ring", rank=0, world=1, entries=512)
    recorder.hold()
    kind, made = recorder.intern("collect"), 0

    def collecting(phase: str, about: dict[str, int]) -> None:
        nonlocal made
        made += 1
        recorder.exit(recorder.enter(kind))

    thresholds = gc.get_threshold()
    gc.callbacks.append(collecting)
    gc.set_threshold(1)
    try:
        for _ in range(20):
            for _ in range(5):
                recorder.enter(kind)
            recorder.flush()
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(collecting)
    recorder.flush()
    assert made
    entries = record_view.read(tmp_path / "ring").entries
    assert len(entries) == min(100 + made, 512)
