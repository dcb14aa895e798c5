"""Where a rank stands, as JSON: what the watcher of one node tells that of another, read as strictly as a file."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

from ...configs.strict_json import JsonError, expect_int, expect_list, expect_number, expect_object, expect_text
from .stand import Call, Condition, Stand

_PLAIN = ("rank", "pid", "code", "writer_stage")
_NUMBERS = ("phase_s", "idle_s", "data_s", "data_busy", "writer_s", "busy")
_TEXTS = ("host", "phase", "line", "starved")
_FLAGS = ("late", "writer_waits")
_MOST = 1 << 40


def dump_stand(stand: Stand) -> dict[str, Any]:
    """For JSON."""
    plain = {name: getattr(stand, name) for name in (*_PLAIN, *_NUMBERS, *_TEXTS, *_FLAGS)}
    return plain | {
        "condition": stand.condition.value,
        "at": list(stand.at),
        "waits": None if stand.waits is None else list(astuple(stand.waits)),
        "entered": [[*key, count] for key, count in stand.entered.items()],
        "calls": [list(astuple(call)) for call in stand.calls],
        "members": {axis: list(ranks) for axis, ranks in stand.members.items()},
        "stack": list(stand.stack),
    }


def load_stand(value: object) -> Stand:
    """What `dump_stand` made, from JSON.

    Raises:
        JsonError: something else.
    """
    wanted = (*_PLAIN, "condition", "at", "waits", "entered", "calls", "members", "stack")
    known = expect_object(value, "a stand", (*wanted, *_NUMBERS, *_TEXTS, *_FLAGS))
    step, micro_batch, op = (expect_int(each, "at", -1, _MOST) for each in _row(known["at"], 3))
    try:
        condition = Condition(expect_text(known["condition"], "condition"))
    except ValueError:
        raise JsonError(f"no condition {known['condition']!r}") from None
    entered = {}
    for row in expect_list(known["entered"], "entered"):
        axis, group, kind, peer, count = _row(row, 5)
        sort = expect_text(axis, "axis"), expect_int(group, "group"), expect_text(kind, "kind")
        entered[*sort, expect_int(peer, "peer", -1)] = expect_int(count, "count")
    members = expect_object(known["members"], "members")
    return Stand(
        rank=expect_int(known["rank"], "rank"),
        pid=expect_int(known["pid"], "pid"),
        code=None if known["code"] is None else expect_int(known["code"], "code", -255, 255),
        writer_stage=expect_int(known["writer_stage"], "writer_stage"),
        condition=condition,
        at=(step, micro_batch, op),
        waits=None if known["waits"] is None else _call(known["waits"]),
        entered=entered,
        calls=tuple(_call(row) for row in expect_list(known["calls"], "calls")),
        members={axis: tuple(expect_int(r, "rank") for r in expect_list(m, axis)) for axis, m in members.items()},
        stack=tuple(expect_text(frame, "a frame") for frame in expect_list(known["stack"], "stack")),
        phase_s=expect_number(known["phase_s"], "phase_s"),
        idle_s=expect_number(known["idle_s"], "idle_s"),
        data_s=expect_number(known["data_s"], "data_s"),
        data_busy=expect_number(known["data_busy"], "data_busy"),
        writer_s=expect_number(known["writer_s"], "writer_s"),
        busy=expect_number(known["busy"], "busy"),
        host=expect_text(known["host"], "host"),
        phase=expect_text(known["phase"], "phase"),
        line=expect_text(known["line"], "line"),
        starved=expect_text(known["starved"], "starved"),
        late=known["late"] is True,
        writer_waits=known["writer_waits"] is True,
    )


def _row(value: object, length: int) -> list[Any]:
    row = expect_list(value, "a row")
    if len(row) != length:
        raise JsonError(f"a row of {len(row)} instead of {length}")
    return row


def _call(value: object) -> Call:
    kind, axis, *numbers, is_open, at, beside = _row(value, 12)
    group, peer, seq, nbytes, step, micro_batch, op = (expect_int(n, "a number", -1, _MOST) for n in numbers)
    texts = expect_text(kind, "kind"), expect_text(axis, "axis")
    where = group, peer, seq, nbytes, step, micro_batch, op
    return Call(*texts, *where, is_open is True, expect_int(at, "at"), beside is True)
