"""The lane: order, results, failure, abort, and the context of its entries in the record."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from pentad.parallel.comm.lane import Lane, LaneFailed
from pentad.parallel.comm.mesh import Axis
from pentad.parallel.comm.waiting import Abort, Aborted
from pentad.parallel.record import reader
from pentad.parallel.record.ring import Recorder


def test_jobs_run_in_order_beside_the_caller():
    lane, order, gate = Lane("test", "cpu"), [], threading.Event()
    first = lane.submit(lambda: (gate.wait(10), order.append(0), "first")[2])
    others = [lane.submit(lambda i=i: order.append(i) or i) for i in range(1, 5)]
    assert order == [] and not first.done()  # submitting waits for nothing
    gate.set()
    assert [other.wait() for other in others] == [1, 2, 3, 4]
    assert first.wait() == "first" and first.wait() == "first"
    assert order == [0, 1, 2, 3, 4]
    lane.close()


def test_close_runs_what_was_submitted():
    lane, ran = Lane("test", "cpu"), []
    for i in range(3):
        lane.submit(lambda i=i: (time.sleep(0.01), ran.append(i)))
    lane.close()
    assert ran == [0, 1, 2]


def test_an_exception_comes_out_of_wait_and_later_jobs_do_not_run():
    lane, ran = Lane("test", "cpu"), []
    bad = lane.submit(lambda: 1 // 0)
    later = lane.submit(lambda: ran.append(1))
    with pytest.raises(LaneFailed, match="lane test: an earlier job failed: integer division") as caught:
        later.wait()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        bad.wait()
    with pytest.raises(LaneFailed):
        lane.submit(lambda: ran.append(2)).wait()
    assert ran == []
    lane.close()


def test_wait_can_be_aborted_and_closing_does_not_hang():
    abort, gate = Abort(60), threading.Event()
    lane = Lane("test", "cpu", Axis("vocab_head", 0, 1, (0,), abort=abort))
    stuck = lane.submit(lambda: gate.wait(60))
    threading.Timer(0.1, abort.trigger, ["a peer is gone"]).start()
    with pytest.raises(Aborted, match="lane test: a peer is gone"):
        stuck.wait()
    lane.close()
    assert not gate.is_set()
    gate.set()


def test_closing_ends_with_an_abort_that_comes_meanwhile():
    abort, gate = Abort(60), threading.Event()
    lane = Lane("test", "cpu", Axis("vocab_head", 0, 1, (0,), abort=abort))
    lane.submit(lambda: gate.wait(20))
    threading.Timer(0.1, abort.trigger, ["a peer is gone"]).start()
    lane.close()
    assert lane._thread is not None and lane._thread.is_alive(), "the job was not waited for"
    gate.set()


def test_a_result_that_an_abort_cut_off_is_never_taken_for_one():
    abort, gate = Abort(60), threading.Event()
    lane = Lane("test", "cpu", Axis("vocab_head", 0, 1, (0,), abort=abort))
    stuck = lane.submit(lambda: gate.wait(60))
    threading.Timer(0.1, abort.trigger, ["a peer is gone"]).start()
    for _ in range(2):  # the abort has set what the first wait waited for
        with pytest.raises(Aborted, match="lane test: a peer is gone"):
            stuck.wait()
    gate.set()
    lane.close()


def test_wait_times_out():
    lane, gate = Lane("test", "cpu", Axis("vocab_head", 0, 1, (0,), abort=Abort(0.01))), threading.Event()
    with pytest.raises(TimeoutError, match="lane test"):
        lane.submit(lambda: gate.wait(60)).wait()
    gate.set()
    lane.close()


def test_jobs_track_no_gradients_and_flush_denormals_like_their_maker():
    torch.set_flush_denormal(True)
    try:
        lane = Lane("test", "cpu")
    finally:
        torch.set_flush_denormal(False)
    assert lane.submit(lambda: (torch.is_grad_enabled(), float(torch.tensor(1e-39) * 0.5))).wait() == (False, 0.0)
    lane.close()
    assert float(torch.tensor(1e-39) * 0.5) > 0


def test_entries_carry_the_context_of_their_submission(tmp_path):
    main = Recorder(tmp_path / "ring", rank=0, world=1, entries=64)
    lane_recorder = main.fork()
    lane = Lane("test", "cpu", Axis("vocab_head", 0, 1, (0,), recorder=lane_recorder))
    kind, gate = main.intern("job"), threading.Event()

    def job() -> None:
        gate.wait(10)
        lane_recorder.exit(lane_recorder.enter(kind))

    main.context = (7, 2, 30)
    pending = lane.submit(job)
    main.context = (8, 5, 1)
    main.exit(main.enter(kind))  # meanwhile, by the caller
    gate.set()
    pending.wait()
    main.exit(main.enter(kind))
    lane.close()
    entries = [e for e in reader.read(tmp_path / "ring").entries if e["kind"] == kind]
    assert [(e["step"], e["micro_batch"], e["op"]) for e in entries] == [(8, 5, 1), (7, 2, 30), (8, 5, 1)]
