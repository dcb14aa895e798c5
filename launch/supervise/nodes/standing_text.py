"""Who is there and what comes next, as the deciding watcher tells the others: JSON, read as strictly as a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ....configs.strict_json import JsonError, expect_int, expect_list, expect_object, expect_text
from ....trainer.recovery.plan import EpochPlan
from ..ladder import Standing

_MOST = 1 << 24
_COUNTS = tuple(each.name for each in fields(Standing) if each.type == "int")
"""Annotations are text here."""


@dataclass(frozen=True)
class Prepared:
    """A plan that all nodes make ready for before any of them shows it to its ranks.

    Args:
        plan: of the next mesh.
        standing: after it.
        started: numbers of processes to start, and the node of each.
        before: the plan before it, for a node that was not told in time.
    """

    plan: EpochPlan
    standing: Standing
    started: Mapping[int, str] = field(default_factory=dict)
    before: EpochPlan | None = None

    def dump(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "plan": self.plan.dump(),
            "standing": dump_standing(self.standing),
            "started": _pairs(self.started),
            "before": self.before.dump() if self.before is not None else "",
        }

    @staticmethod
    def load(value: object, own: Standing) -> Prepared:
        """What `dump` made, from JSON; `own` as of `load_standing`.

        Raises:
            JsonError: something else.
        """
        known = expect_object(value, "a prepared plan", ("plan", "standing", "started", "before"))
        before = expect_text(known["before"], "before").encode()
        return Prepared(
            EpochPlan.load(expect_text(known["plan"], "plan").encode()),
            load_standing(known["standing"], own),
            _named(known["started"], "started"),
            EpochPlan.load(before) if before else None,
        )


def dump_standing(standing: Standing) -> dict[str, Any]:
    """For JSON; without what all nodes know from the job."""
    return {
        "members": list(standing.members),
        "nodes": list(standing.nodes),
        "spares": _pairs(standing.spares),
        "coming": sorted(standing.coming),
        "lines": list(standing.lines),
        "starts": standing.starts,
        **{name: getattr(standing, name) for name in _COUNTS},
    }


def load_standing(value: object, own: Standing) -> Standing:
    """What `dump_standing` made, from JSON.

    Args:
        value: what came.
        own: what the node knows itself: which rungs and layouts there are.

    Raises:
        JsonError: something else.
    """
    known = expect_object(value, "a standing", (*_COUNTS, "members", "nodes", "spares", "coming", "lines", "starts"))
    members = tuple(expect_int(each, "a member", 0, _MOST) for each in expect_list(known["members"], "members"))
    nodes = tuple(expect_text(each, "a node") for each in expect_list(known["nodes"], "nodes"))
    if len(members) != len(nodes):
        raise JsonError(f"{len(members)} members on {len(nodes)} nodes")
    counts = {name: expect_int(known[name], name, -1, 1 << 40) for name in _COUNTS}
    if not 0 <= counts["way"] < max(1, len(own.ways)):
        raise JsonError(f"layout {counts['way']} of {len(own.ways)}")
    if own.ways and not 0 <= counts["split"] < len(own.ways[counts["way"]].settled()):
        raise JsonError(f"split {counts['split']} of layout {counts['way']}")
    return replace(
        own,
        members=members,
        nodes=nodes,
        spares=_named(known["spares"], "spares"),
        coming=frozenset(expect_int(each, "a spare", 0, _MOST) for each in expect_list(known["coming"], "coming")),
        lines=tuple(expect_text(each, "a line") for each in expect_list(known["lines"], "lines")),
        starts=known["starts"] is True,
        **counts,
    )


@dataclass(frozen=True)
class Address:
    """Where the watcher of a node listens."""

    node: str
    host: str
    port: int


def dump_state(standing: Standing, roster: list[Address]) -> dict[str, Any]:
    """What every node knows, so that any of them can decide next: who is there, and the nodes in the order in which
    they follow the one that decides."""
    return {"standing": dump_standing(standing), "roster": [[each.node, each.host, each.port] for each in roster]}


def load_state(value: object, own: Standing) -> tuple[Standing, list[Address]]:
    """What `dump_state` made, from JSON; `own` as of `load_standing`.

    Raises:
        JsonError: something else.
    """
    known = expect_object(value, "a state", ("standing", "roster"))
    roster = []
    for row in expect_list(known["roster"], "roster"):
        node, host, port = expect_list(row, "an address") if len(expect_list(row, "an address")) == 3 else ("", "", -1)
        roster.append(Address(expect_text(node, "node"), expect_text(host, "host"), expect_int(port, "port", 1, 65535)))
    return load_standing(known["standing"], own), roster


def _pairs(named: Mapping[int, str]) -> list[list[int | str]]:
    return [[number, node] for number, node in named.items()]


def _named(value: object, what: str) -> dict[int, str]:
    found = {}
    for row in expect_list(value, what):
        pair = expect_list(row, what)
        if len(pair) != 2:
            raise JsonError(f"{what}: {pair!r} is no number and node")
        found[expect_int(pair[0], what, 0, _MOST)] = expect_text(pair[1], what)
    return found
