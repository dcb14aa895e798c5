"""Ranks that come together, fail on the way or never come; each a thread with its own view of one store."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pentad.configs import UserError
from pentad.parallel.comm.processes import PeerGone
from pentad.trainer.processes import meeting as meetings
from pentad.trainer.processes.failure import failure_of, print_failure
from pentad.trainer.processes.meeting import LostRank, Meeting, Stopped

_ABOUT = json.dumps({"model": "1", "train": "2"})


def _free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def _env(**others: str) -> dict[str, str]:
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), **others}


def _each(world: int, rank: Callable[[Meeting], Any], env: dict[str, str] | None = None) -> list[Any]:
    """What `rank` returns or raises on each rank."""
    env = env or _env()

    def run(number: int) -> Any:
        own = Meeting(number, world, env)
        try:
            return rank(own)
        except Exception as error:
            return error
        finally:
            own.leave()

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))


def test_all_ranks_come() -> None:
    def rank(own: Meeting) -> str:
        own.open(30)
        own.come(_ABOUT, 30)
        return "here"

    assert _each(3, rank) == ["here"] * 3


@pytest.mark.parametrize("failing", [0, 2])
def test_a_rank_that_fails_on_its_way_ends_those_that_wait(failing: int) -> None:
    def rank(own: Meeting) -> bool | None:
        own.open(30)
        if own.rank == failing:
            return own.tell("no GPU", user=True)
        own.come(_ABOUT, 600)
        return None

    results = _each(3, rank)
    assert results.pop(failing) is True
    assert all(
        isinstance(r, LostRank) and r.user and f"rank {failing}" in str(r) and "no GPU" in str(r) for r in results
    )


def test_rank_0_that_fails_before_there_is_a_store_is_heard() -> None:
    def rank(own: Meeting) -> bool | None:
        if own.rank < 2:
            return own.tell("no such file", user=True)  # both for the same reason: one says so
        own.open(600)
        return None

    first, second, third = _each(3, rank)
    assert (first, second) == (True, False)
    assert isinstance(third, LostRank) and third.user and "no such file" in str(third)


def test_a_rank_whose_config_alone_is_wrong_is_heard() -> None:
    def rank(own: Meeting) -> bool | None:
        if own.rank == 1:
            return own.tell("no such file", user=True)
        own.open(600)
        own.come(_ABOUT, 600)
        return None

    first, second = _each(2, rank)
    assert second is True and isinstance(first, LostRank) and "rank 1 could not start: no such file" in str(first)


def test_ranks_that_do_not_come_are_named() -> None:
    env = _env()
    first, third = Meeting(0, 3, env), Meeting(2, 3, env)
    for own, missing in ((first, "2 of 3 ranks have not come: 1, 2"), (third, "1 of 3 ranks have not come: 1")):
        own.open(30)
        with pytest.raises(TimeoutError, match=missing):
            own.come(_ABOUT, 0)


def test_a_rank_without_rank_0_ends_after_its_time_or_when_it_is_asked_to() -> None:
    with pytest.raises(TimeoutError, match="rank 0 has not come"):
        Meeting(1, 2, _env()).open(0.1)
    with pytest.raises(Stopped):
        Meeting(1, 2, _env(), lambda: True).open(600)


def test_ranks_of_other_configurations_and_twins_are_refused() -> None:
    def differ(own: Meeting) -> None:
        own.open(30)
        try:
            own.come(json.dumps({"model": "1", "train": str(own.rank)}), 600)
        except UserError as error:
            own.tell(str(error), user=True)
            raise

    errors = [e for e in _each(2, differ) if isinstance(e, UserError)]
    assert len(errors) == 1 and "another configuration: train=" in str(errors[0])
    env = _env()
    host = Meeting(0, 3, env)
    host.open(30)
    twins = [Meeting(1, 3, env) for _ in range(2)]
    for twin in twins:
        twin.open(30)
    with pytest.raises(TimeoutError):
        twins[0].come(_ABOUT, 0)
    with pytest.raises(UserError, match="two processes say that they are rank 1 of 3"):
        twins[1].come(_ABOUT, 0)


def test_a_port_in_use_and_variables_that_are_missing_are_one_line() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        with pytest.raises(UserError, match=f"MASTER_PORT: 127.0.0.1:{port} is in use by another program; set another"):
            Meeting(0, 2, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}).open(5)
    with pytest.raises(UserError, match="MASTER_ADDR: is not set"):
        Meeting(0, 2, {"MASTER_PORT": "1"}).open(5)
    with pytest.raises(UserError, match="MASTER_PORT: must be a port"):
        Meeting(0, 2, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"}).open(5)


def test_of_ranks_that_lost_others_the_first_says_so_in_one_line_and_nobody_prints_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rank(own: Meeting) -> None:
        own.open(30)
        own.come(_ABOUT, 30)
        print_failure(failure_of(PeerGone("rank 3 has left"), rank=own.rank, world=3), own)

    assert _each(3, rank) == [None] * 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and sum(line.startswith("error: ") for line in lines) == 1
    # Rank 0 is dead, and the store with it: nobody calls itself the first.
    survivor = Meeting(2, 3, _env())
    survivor._complete = True
    print_failure(failure_of(PeerGone("rank 0 has left"), rank=2, world=3), survivor)
    assert capsys.readouterr().err == "rank 2 then stopped: PeerGone: rank 0 has left\n"
    # What is a cause of its own is shown whole even then.
    print_failure(failure_of(ArithmeticError("mine"), rank=2, world=3), survivor)
    assert capsys.readouterr().err.endswith("error: rank 2 of 3 failed: ArithmeticError: mine\n")


def test_an_answer_that_is_no_failure_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer in (b"pentad {", b'pentad {"rank": 1}', b"pentad " + b"[" * 9999):
        monkeypatch.setattr(meetings, "_knock", lambda host, port, answer=answer: answer)
        with pytest.raises(LostRank, match="rank 0 could not start"):
            Meeting(1, 2, _env()).open(5)


def test_ranks_meet_at_another_store_when_the_first_one_is_lost() -> None:
    there = Meeting(0, 2, _env())
    elsewhere = there.open(30)
    assert elsewhere is not None
    elsewhere.set("mesh", "1")
    survivor = Meeting(0, 2, _env())
    first = survivor.move("", 30)
    assert first is survivor.open(30) is not elsewhere
    moved = survivor.move(f"127.0.0.1:{there._env['MASTER_PORT']}", 30)
    assert moved is not None and moved.get("mesh") == b"1"
    assert survivor.move("", 30) is moved
