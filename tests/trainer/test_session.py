"""A session leaves nothing behind, opens again, and a step that breaks off anywhere changes nothing or all."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch

from pentad.configs.errors import UserError
from pentad.configs.schema import AdamWConfig, Config, ConstantSchedule, MoeConfig, RouterConfig
from pentad.parallel.comm.waiting import Aborted
from pentad.parallel.pipeline.needs import Kinds
from pentad.parallel.pipeline.program import Op
from pentad.trainer.data.dataset import Dataset
from pentad.trainer.metrics.peak import Peak
from pentad.trainer.outcome import StepResult
from pentad.trainer.pipeline.programs import evaluation_program
from pentad.trainer.session import Here, Session, SessionState
from pentad.trainer.step import Stepper
from tests.distributed import run_distributed
from tests.training import job, make_here, microbatches, world_of

ROUTED: dict[str, Any] = {
    "moe": MoeConfig(experts=4, top_k=2, ffn=24, router=RouterConfig(selection_bias=True, aux_loss=0.01))
}
CODED = AdamWConfig(lr=3e-3, schedule=ConstantSchedule(), states="int4", states_above=500)
ON_HOST = {"offload_optimizer": "host", "optimizer_subgroup_mib": 0.01, "optimizer_stride": 2}
GUARDED = {"replicas_every": 1, "checksums": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank, accumulation": {"global_batch": 6},
    "tp 2, dp 2, zero1, bf16": {"tp": 2, "dp": 2, "sharding": "zero1", "dtype": "bf16", "numerics": GUARDED},
    "dp 2, ep 2, selection bias": {"dp": 2, "ep": 2, "model": ROUTED, "numerics": GUARDED},
    "pp 2, split backward": {"pp": 2, "pipeline": {"schedule": "zb-h1"}},
    "pp 2, balanced vocabulary": {"pp": 2, "pipeline": {"schedule": "gis", "vocab": "balanced"}},
    "pp 2, activations on the host": {"pp": 2, "pipeline": {"schedule": "gis"}, "offload": "all", "seq_len": 64},
    "tp 2, dp 2, coded moments": {"tp": 2, "dp": 2, "sharding": "zero1", "dtype": "bf16", "optim": CODED},
    "dp 2, states on the host": {"dp": 2, "sharding": "zero1", "dtype": "bf16", "memory": ON_HOST},
    "pp 2, dp 2, experts, fsdp": {"pp": 2, "dp": 2, "ep": 2, "model": ROUTED, "sharding": "fsdp", "dtype": "bf16"},
    "dp 2, fsdp2": {"dp": 2, "sharding": "fsdp2", "global_batch": 4},
}
QUICK = ("dp 2, ep 2, selection bias",)
"""Where a step of `make test` breaks off at every operation."""


def run_step(session: Session, step: int) -> StepResult:
    """One step of the job on this rank."""
    cfg, dp = session.cfg, session.mesh.axis("dp")
    valid = sum(batch.valid for batch in microbatches(cfg, step, 0, 1))
    return session.stepper.run(step, microbatches(cfg, step, dp.rank, dp.size), valid, cfg.optim.lr)


def bits(session: Session) -> dict[str, torch.Tensor]:
    """Everything that a step may change on this rank."""
    session.parts.replicas.wait_gathers()
    memory = {f"params/{name}": value for name, value in session.parts.replicas.keep().items()}
    states = {
        f"states/{unit}/{name}": value
        for unit, each in session.optimizer.states.items()
        for name, value in each.items()
    }
    buffers = {f"buffers/{name}": value for name, value in session.parts.model.named_buffers()}
    tensors = memory | states | buffers | {"updates": session.stepper.updates}
    return {name: value.clone() for name, value in tensors.items()}


def numbers(result: StepResult) -> tuple[float, float, float]:
    return float(result.loss), float(result.grad_norm), float(result.skipped)


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# Nothing is left --------------------------------------------------------------------------------------------------


def _held() -> tuple[int, int, int]:
    """Threads, descriptors, and mapped segments of this process."""
    maps = Path("/proc/self/maps").read_text()
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), maps.count("memfd:pentad")


def _open_and_close(rank: int, world: int, cfg: Config, times: int) -> tuple[list[tuple[int, int, int]], list[int]]:
    """What is held, and the resident pages, after each session; slots move from process to process."""
    here, held, pages = make_here(rank, cfg), [], []
    for epoch in range(times):
        session = Session.open(cfg, [(slot + epoch) % world for slot in range(world)], epoch, here=here)
        run_step(session, epoch)
        session.close()
        held.append(_held())
        pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
    return held, pages


_GROWTH_PAGES = 8 << 8
"""8 MiB: the allocator keeps some; what forty sessions have in models, stacks of threads and groups is far more."""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "times"),
    [
        pytest.param({}, 50, id="one"),
        pytest.param({"tp": 2, "dp": 2, "sharding": "zero1"}, 15, id="tp2-dp2"),
        pytest.param({"tp": 2, "dp": 2, "sharding": "zero1"}, 50, id="tp2-dp2-often", marks=pytest.mark.slow),
        pytest.param({"pp": 2, "cp": 2}, 50, id="pp2-cp2", marks=pytest.mark.slow),
        pytest.param(
            {"pp": 2, "pipeline": {"schedule": "gis", "vocab": "balanced"}}, 15, id="balanced", marks=pytest.mark.slow
        ),
        pytest.param({"dp": 2, "ep": 2, "model": ROUTED}, 50, id="ep2", marks=pytest.mark.slow),
        pytest.param({"dp": 2, "sharding": "fsdp2"}, 15, id="fsdp", marks=pytest.mark.slow),
    ],
)
def test_sessions_open_and_close_without_growth(layout: dict[str, Any], times: int) -> None:
    cfg = job(**layout, steps=1)
    for held, pages in run_distributed(_open_and_close, world_of(cfg), cfg, times, group=False, timeout_s=300.0):
        # The session that was closed last has nothing more than the first one, from which on torch keeps a thread.
        assert set(held[1:]) == {held[1]}
        assert max(pages[10:]) - pages[9] < _GROWTH_PAGES


def _after_closing(rank: int, world: int, cfg: Config) -> tuple[Any, Any]:
    here = make_here(rank, cfg)
    before = _held()
    session = Session.open(cfg, range(world), 0, here=here)
    run_step(session, 0)
    model = session.parts.model  # somebody who has not let go of the model yet
    session.close()
    session.close()
    del model
    return before, _held()


@pytest.mark.distributed
def test_a_closed_session_has_no_thread_left() -> None:
    cfg = job(tp=2, dp=2, sharding="zero1", steps=1)
    for (threads, _, maps), after in run_distributed(_after_closing, 4, cfg, group=False):
        assert (after[0], after[2]) == (threads, maps)


# The next session goes on -----------------------------------------------------------------------------------------


class _Calls:
    """Makes what a session takes over, and counts how often."""

    def __init__(self) -> None:
        self.data, self.peak = 0, 0

    def open(self, cfg: Config, ranks: Any, epoch: int, here: Any, state: SessionState | None) -> Session:
        return Session.open(cfg, ranks, epoch, here=here, state=state, data=self._data, peak=self._peak)

    def _data(self) -> Dataset:
        self.data += 1
        return Dataset(None, None, None, 0, 0, "", ())  # type: ignore[arg-type]

    def _peak(self, mesh: object) -> Peak:
        self.peak += 1
        return Peak(1.0, "test")


def _reopened(rank: int, world: int, cfg: Config, every: int) -> Any:
    """The curve and the last bits of six steps, with a new session every so many steps."""
    here, calls, curve, places = make_here(rank, cfg), _Calls(), [], set()
    session = calls.open(cfg, range(world), 0, here, None)
    for step in range(6):
        if step and step % every == 0:
            state = session.leave()
            session = calls.open(cfg, range(world), step, here, state)
        curve.append(numbers(run_step(session, step)))
        places.add(tuple(value.data_ptr() for value in session.parts.replicas.keep().values()))
    last = bits(session)
    sharded = cfg.parallel.data.sharding == "fsdp2"
    session.close()
    return curve, last, (calls.data, calls.peak), sharded or len(places) == 1


@pytest.mark.sample(1)
@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_goes_on_over_sessions(layout: str) -> None:
    cfg = job(**LAYOUTS[layout])
    whole = run_distributed(_reopened, world_of(cfg), cfg, 100, group=False)
    parts = run_distributed(_reopened, world_of(cfg), cfg, 2, group=False)
    for (curve, last, _, _), (curve_again, last_again, calls, in_place) in zip(whole, parts, strict=True):
        assert curve_again == curve and same(last, last_again)
        assert calls == (1, 1)  # nothing is read or measured again
        assert in_place  # the same memory


def _moved(rank: int, world: int, cfg: Config, then: Config, order: list[int], fresh: list[int]) -> Any:
    here = make_here(rank, cfg)
    state: SessionState | None = Session.open(cfg, range(world), 0, here=here).leave()
    state = None if rank in fresh else state
    session = Session.open(then, order, 1, here=here, state=state)
    curve = [numbers(run_step(session, step)) for step in range(2)]
    session.close()
    return curve


def _refused(rank: int, world: int, *given: Any) -> str:
    with pytest.raises(UserError) as refused:
        _moved(rank, world, *given)
    return str(refused.value)


@pytest.mark.distributed
def test_slots_move_between_ranks_that_hold_the_same_slices() -> None:
    cfg = job(tp=2, dp=2, sharding="ddp")
    stay = run_distributed(_moved, 4, cfg, cfg, [0, 1, 2, 3], [], group=False)
    assert run_distributed(_moved, 4, cfg, cfg, [2, 1, 0, 3], [], group=False) == stay


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("then", "order", "fresh", "count"),
    [
        ({"tp": 2, "dp": 2, "sharding": "zero1"}, [1, 0, 2, 3], [], "2 of 4"),
        ({"tp": 4, "sharding": "zero1"}, [0, 1, 2, 3], [], "0 of 4"),
        ({"tp": 2, "dp": 2, "sharding": "zero1", "bucket_mib": 0.1}, [0, 1, 2, 3], [], "0 of 4"),
        ({"tp": 2, "dp": 2, "sharding": "zero1"}, [0, 1, 2, 3], [3], "3 of 4"),
    ],
    ids=["moved", "other layout", "other buckets", "one without"],
)
def test_other_slices_are_refused_on_all_ranks(then: Any, order: list[int], fresh: list[int], count: str) -> None:
    cfg = job(tp=2, dp=2, sharding="zero1")
    for message in run_distributed(_refused, 4, cfg, job(**then), order, fresh, group=False):
        assert re.match(rf"parallel: {count} ranks hold the slices .* checkpoint\.resume=latest", message)


def test_a_rank_needs_a_slot_and_every_slot_a_rank() -> None:
    cfg = job()
    for ranks, wrong in (([1], "rank 0 has no slot"), ([0, 1], "has 1 slots, and there are 2 ranks")):
        with pytest.raises(ValueError, match=wrong):
            Session.open(cfg, ranks, 0, here=make_here(0, cfg))


# A step that breaks off -------------------------------------------------------------------------------------------


class Broken(Exception):
    """What a handler raises."""


def _break_at(stepper: Stepper, at: int, flag: Path) -> None:
    """This rank's operation `at` raises instead of running, and says so to the ranks that wait for it."""
    count = iter(range(len(stepper.ops)))

    def breaking(handler: Callable[[Op], None]) -> Callable[[Op], None]:
        def run(op: Op) -> None:
            if next(count) == at:
                flag.touch()
                raise Broken
            handler(op)

        return run

    stepper._handlers = {kind: breaking(handler) for kind, handler in stepper._handlers.items()}


@contextmanager
def _woken(session: Session, flag: Path) -> Iterator[None]:
    """Nobody waits any longer once another rank has broken off."""
    over = Event()

    def watch() -> None:
        while not over.wait(0.002):
            if flag.exists():
                session.mesh.abort.trigger("a rank broke off")
                return

    thread = Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _together(here: Here, world: int, what: str) -> None:
    """Returns when all ranks have come here."""
    if here.store is not None:
        here.store.set(f"{what}-{here.rank}", "")
        here.store.wait([f"{what}-{rank}" for rank in range(world)])


def _places(session: Session) -> list[int]:
    """Operations of the longest list, counted from NORM: before it, the ranks' lists have different lengths."""
    norms = [[op.kind for op in ops].index(Kinds.NORM) for ops in session.program.ranks]
    tails = [len(ops) - norm for ops, norm in zip(session.program.ranks, norms, strict=True)]
    return list(range(-max(norms), max(tails)))


def _interrupted(rank: int, world: int, cfg: Config, folder: Path, disturbed: bool) -> Any:
    """A step for every place of the program, broken off there, reset, and repeated if it had not committed.

    Returns the numbers of the steps, what is there at the end, and for each place whether the step had committed and
    whether the rank was as before it.
    """
    here, curve, seen = make_here(rank, cfg), [], []
    session = Session.open(cfg, range(world), 0, here=here)
    curve.append(numbers(run_step(session, 0)))
    for step, place in enumerate(_places(session), start=1):
        done = None
        norm = [op.kind for op in session.stepper.ops].index(Kinds.NORM)
        if disturbed and norm + place < len(session.stepper.ops):
            before, flag = bits(session), folder / str(step)
            _break_at(session.stepper, max(norm + place, 0), flag)
            # Past the commit nobody waits for anybody, and whoever is still in it must be let through.
            with pytest.raises((Broken, Aborted)), _woken(session, flag if place <= 0 else folder / "never"):
                run_step(session, step)
            _together(here, world, f"broken-{step}")
            done = _reset(session)
            seen.append((place, done is not None, same(before, bits(session))))
            session = Session.open(cfg, range(world), step, here=here, state=session.leave())
        elif disturbed:
            done = run_step(session, step)
            _together(here, world, f"broken-{step}")
            session = Session.open(cfg, range(world), step, here=here, state=session.leave())
        curve.append(numbers(done if done is not None else run_step(session, step)))
    last = bits(session)
    session.close()
    return curve, last, seen


def _reset(session: Session) -> StepResult | None:
    """What `reset` gives; before it, and in the mesh in which ranks broke off also after it, no step begins."""
    stepper = session.stepper
    assert stepper.half_way
    for call in (lambda: run_step(session, 0), session.leave):
        with pytest.raises(RuntimeError, match="left half-way"):
            call()
    committed, done = stepper.result is not None, stepper.reset()
    assert (done is not None) == committed and stepper.reset() is None
    if session.mesh.degrees.world > 1:
        with pytest.raises(RuntimeError, match="open a new session"):
            run_step(session, 0)
    return done


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LAYOUTS],
)
def test_a_step_that_breaks_off_at_any_operation_is_repeated_or_ended(layout: str, tmp_path: Path) -> None:
    cfg = job(**{"bucket_mib": 1.0, **LAYOUTS[layout]})
    whole = run_distributed(_interrupted, world_of(cfg), cfg, tmp_path, False, group=False)
    parts = run_distributed(_interrupted, world_of(cfg), cfg, tmp_path, True, group=False, timeout_s=300.0)
    for (curve, last, _), (curve_again, last_again, seen) in zip(whole, parts, strict=True):
        assert curve_again == curve and same(last, last_again)
        for place, committed, unchanged in seen:
            assert committed == (place > 0) and unchanged == (place <= 0)


def test_a_rank_alone_goes_on_in_its_session(tmp_path: Path) -> None:
    cfg = job(global_batch=6, model=ROUTED)
    session, undisturbed = (Session.open(cfg, [0], 0, here=make_here(0, cfg)) for _ in range(2))
    places = _places(session)
    for step, place in enumerate(places):
        handlers = session.stepper._handlers
        _break_at(session.stepper, place - places[0], tmp_path / "flag")
        with pytest.raises(Broken):
            run_step(session, step)
        session.stepper._handlers = handlers
        done = session.stepper.reset()
        assert numbers(done or run_step(session, step)) == numbers(run_step(undisturbed, step))
        assert same(bits(session), bits(undisturbed))
    session.close()
    undisturbed.close()


def test_an_evaluation_that_breaks_off_is_forgotten(tmp_path: Path) -> None:
    cfg = job(global_batch=4)
    session = Session.open(cfg, [0], 0, here=make_here(0, cfg))
    program = evaluation_program(cfg, session.parts.pipeline, 2)
    run_step(session, 0)
    before, batches = bits(session), microbatches(cfg, 1, 0, 1)
    expected = session.stepper.evaluate(batches, program)

    def broken(logits: object, labels: object, shard: object) -> None:
        raise Broken

    with pytest.raises(Broken):
        session.stepper.evaluate(batches, program, broken)
    assert session.stepper.half_way and session.stepper.reset() is None
    assert torch.equal(session.stepper.evaluate(batches, program), expected) and same(before, bits(session))
    session.close()
