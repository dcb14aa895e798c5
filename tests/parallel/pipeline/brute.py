"""Simulations that share nothing with the package's but the definition of what an operation needs; slow and literal."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from pentad.parallel.pipeline.communication import data_needs
from pentad.parallel.pipeline.kind import Kind, Role
from pentad.parallel.pipeline.needs import Kinds
from pentad.parallel.pipeline.program import Op, Program
from pentad.parallel.pipeline.times import Times

Spans = list[list[tuple[float, float]]]


def compute_only(program: Program, times: Times) -> Spans | None:
    """Spans of a program of compute, by going round until nothing moves; None where it is stuck."""
    ended: dict[tuple[int, Kind, int, int], float] = {}
    spans: Spans = [[] for _ in program.ranks]
    moved = True
    while moved:
        moved = False
        for rank, ops in enumerate(program.ranks):
            if len(spans[rank]) == len(ops):
                continue
            op = ops[len(spans[rank])]
            arrivals = [0.0] + [end for _, end in spans[rank][-1:]]
            for source, need in data_needs(program, op):
                end = ended.get((source, need.kind, need.index, need.stage))
                if end is None:
                    break
                arrivals.append(end + _delay(times, op, need, source != rank))
            else:
                start = max(arrivals)
                spans[rank].append((start, start + times.of(op, rank)))
                kind = Kinds.INPUT_GRAD if op.kind is Kinds.BACKWARD else op.kind
                ended[rank, kind, op.index, op.stage] = spans[rank][-1][1]
                moved = True
    return None if any(len(mine) < len(ops) for mine, ops in zip(spans, program.ranks, strict=True)) else spans


def _delay(times: Times, op: Op, need: Op, remote: bool) -> float:
    vocabulary = {Kinds.HEAD, Kinds.HEAD_GRAD, Kinds.EMBED, Kinds.EMBED_GRAD}
    if vocabulary & {op.kind, need.kind}:
        return times.collective
    return times.hop + times.link if remote else 0.0


@dataclass
class _Channel:
    sends: deque[Op] = field(default_factory=deque)
    receives: deque[Op] = field(default_factory=deque)
    under_way: int = 0
    free: float = 0.0


class Lowered:
    """A lowered program, played instant by instant."""

    def __init__(self, program: Program, times: Times) -> None:
        self.program, self.times = program, times
        self.now = 0.0
        self.at = [0] * len(program.ranks)
        self.busy = [0.0] * len(program.ranks)
        self.starts: list[list[float]] = [[] for _ in program.ranks]
        self.channels: dict[tuple[int, int], _Channel] = {}
        self.lanes = [[deque[Op]() for _ in program.ranks] for _ in range(2)]
        self.lane_busy = [False, False]
        self.engines: dict[tuple[int, str], float] = {}
        self.pending: list[tuple[float, str, object]] = []
        self.arrived: set[tuple[Kind, int, int]] = set()

    def run(self) -> list[list[float]] | None:
        """When each operation starts (its token runs); None where the program is stuck or matches other operations."""
        while True:
            try:
                while any([self._advance(rank) for rank in range(len(self.at))]) or self._match():
                    pass
            except ValueError:
                return None
            moments = [when for when, _, _ in self.pending]
            free = [channel.free for channel in self.channels.values()]
            moments += [when for when in (*self.busy, *free) if when > self.now]
            if not moments:
                break
            self.now = min(moments)
            self._complete()
        done = all(at == len(ops) for at, ops in zip(self.at, self.program.ranks, strict=True))
        left = any(c.sends or c.receives for c in self.channels.values()) or any(q for lane in self.lanes for q in lane)
        return self.starts if done and not left else None

    def _complete(self) -> None:
        due = [each for each in self.pending if each[0] <= self.now]
        self.pending = [each for each in self.pending if each[0] > self.now]
        for _, what, which in due:
            if what == "copy":
                op: Op = which  # type: ignore[assignment]
            elif what == "lane":
                lane, op = which  # type: ignore[misc]
                self.lane_busy[lane] = False
            else:
                channel, op = which  # type: ignore[misc]
                self.channels[channel].under_way -= 1
            self.arrived.add((op.kind, op.index, op.stage))

    def _match(self) -> bool:
        moved = False
        for key, channel in self.channels.items():
            while channel.sends and channel.receives and channel.free <= self.now:
                sent, received = channel.sends.popleft(), channel.receives.popleft()
                forward = sent.kind is Kinds.SEND_FORWARD
                if (received.kind is Kinds.RECV_FORWARD) != forward or received.index != sent.index:
                    raise ValueError
                if received.stage != sent.stage + (1 if forward else -1):
                    raise ValueError
                channel.free = self.now + self.times.link
                self.pending.append((channel.free + self.times.hop, "channel", (key, received)))
                moved = True
        for number, lane in enumerate(self.lanes):
            if not self.lane_busy[number] and all(lane):
                heads = {queue.popleft() for queue in lane}
                if len(heads) > 1:
                    raise ValueError
                self.lane_busy[number] = True
                self.pending.append((self.now + self.times.collective, "lane", (number, heads.pop())))
                moved = True
        before = len(self.pending)
        self._complete()  # what takes no time at all
        return moved or len(self.pending) < before

    def _advance(self, rank: int) -> bool:
        moved = False
        ops = self.program.ranks[rank]
        while self.at[rank] < len(ops) and self.busy[rank] <= self.now and self._start(rank, ops[self.at[rank]]):
            self.starts[rank].append(self.now)
            self.at[rank] += 1
            moved = True
        return moved

    def _start(self, rank: int, op: Op) -> bool:
        where, s = self.program.placement, op.stage
        if op.kind.computes:
            if not self._ready(rank, op):
                return False
            self.busy[rank] = self.now + self.times.of(op, rank)
        elif op.kind in (Kinds.OFFLOAD, Kinds.RELOAD):
            out = op.kind is Kinds.OFFLOAD
            engine = (rank, "both" if self.times.one_engine else "out" if out else "in")
            took = self.times.offload if out else self.times.reload
            ends = max(self.now, self.engines.get(engine, 0.0)) + took[op.stage if len(took) > 1 else 0]
            self.engines[engine] = ends
            self.pending.append((ends, "copy", op))
        elif op.kind in (Kinds.RELEASE, Kinds.RESUME):
            copied = Kinds.OFFLOAD if op.kind is Kinds.RELEASE else Kinds.RELOAD
            return (copied, op.index, op.stage) in self.arrived
        elif op.kind in (Kinds.SEND_FORWARD, Kinds.SEND_BACKWARD):
            to = where[s + 1 if op.kind is Kinds.SEND_FORWARD else s - 1]
            channel = self.channels.setdefault((rank, to), _Channel())
            if channel.under_way == 2:
                return False
            channel.under_way += 1
            channel.sends.append(op)
        elif op.kind in (Kinds.RECV_FORWARD, Kinds.RECV_BACKWARD):
            source = where[s - 1 if op.kind is Kinds.RECV_FORWARD else s + 1]
            plain = Op(op.kind, op.index, op.stage)
            self.channels.setdefault((source, rank), _Channel()).receives.append(plain)
        elif op.kind.role is Role.COLLECTIVE:
            self.lanes[op.kind.lane == "embed"][rank].append(op)
        return True

    def _ready(self, rank: int, op: Op) -> bool:
        where, s, i = self.program.placement, op.stage, op.index
        last, barriers = self.program.stages - 1, self.program.vocab_barriers
        waits: tuple[Kind, int, int] | None = None
        match op.kind:
            case Kinds.FORWARD if s > 0 and where[s - 1] != rank:
                waits = (Kinds.RECV_FORWARD, i, s)
            case Kinds.FORWARD if s == 0 and barriers:
                waits = (Kinds.EMBEDDED, i, -1)
            case Kinds.BACKWARD | Kinds.INPUT_GRAD if s < last and where[s + 1] != rank:
                waits = (Kinds.RECV_BACKWARD, i, s)
            case Kinds.BACKWARD | Kinds.INPUT_GRAD if s == last and barriers:
                waits = (Kinds.STATISTICS if barriers == 1 else Kinds.HIDDEN_GRAD, i, -1)
            case Kinds.HEAD:
                waits = (Kinds.HIDDEN, i, -1)
            case Kinds.HEAD_GRAD:
                waits = (Kinds.STATISTICS, i, -1)
            case Kinds.EMBED_GRAD:
                waits = (Kinds.EMBEDDED_GRAD, i, -1)
        return waits is None or waits in self.arrived
