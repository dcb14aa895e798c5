"""Words for a verdict: ranks, places, operations, who waits for what, stacks; each line can be read alone."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .stand import TRANSFERS, Call, Condition, Stand

_FRAMES = 4
"""Of a stack, that are shown; files have all of it."""
_PHASES = {
    "start": "while it started",
    "load": "while it loaded a checkpoint",
    "data": "while it waited for its data",
    "evaluation": "in the evaluation",
    "save": "while it saved",
    "end": "at the end",
}


ADVICE = {
    "killed": "look at the host's log (dmesg) for a lack of memory or a hardware error; go on with "
    "checkpoint.resume=latest, on another host if it comes again",
    "out of memory": "raise the limit (memory.max of the control group; --mem of SLURM, --memory of docker), or need "
    "less: a smaller train.micro_batch, memory.recompute, parallel.data.sharding; pentad check says what a rank needs",
    "ended": "something called exit in that rank; its own output says more; go on with checkpoint.resume=latest",
    "lost node": "look whether that host is up, and at its network; go on with checkpoint.resume=latest without it",
    "stopped": "kill -CONT wakes it; if nobody stopped it by hand, look for a debugger or the batch system's suspend",
    "frozen": "the stack names a call in C that holds Python's lock; give it up, or let it release the lock",
    "failed": "the traceback is in record/, of every rank; mend its cause, and go on with checkpoint.resume=latest",
    "hang": "the stack shows where; look at the device and storage of that host; go on with checkpoint.resume=latest",
    "livelock": "the stack shows the loop; go on with checkpoint.resume=latest once it is mended",
    "data stall": "look at the storage of data.paths on that host, and at what the data source waits for",
    "data livelock": "the stack shows which transform does not end; look at the samples that it is given",
    "checkpoint": "look at the storage of checkpoint.dir on that host; the checkpoints before are untouched",
    "deadlock": "the ranks do not make the same calls: the call sites above differ; a launch of the same code on all "
    "ranks, and no branch that depends on the rank, mends it",
    "link": "test the link between these hosts; NCCL_DEBUG=INFO, and the counters of the network cards",
    "skipped collective": "a branch of that rank leaves the call out: look at what depends on its data or its rank",
    "other collective": "that rank runs other code, or takes another branch: look at what depends on its data or rank",
    "other size": "a tensor of that rank has another shape: look at what its size comes from",
    "receive without send": "that rank receives once too often: the other side never sends it",
}
"""What to do about each kind of verdict."""


@dataclass(frozen=True)
class Places:
    """What a rank's operations are called.

    Args:
        world: ranks of the job.
        programs: the tokens of each pipeline rank's program; empty: not known.
    """

    world: int
    programs: tuple[tuple[str, ...], ...] = ()

    def stage(self, rank: int) -> int:
        """The pipeline rank of a rank: the pipeline axis is the slowest of the mesh."""
        return rank * max(len(self.programs), 1) // max(self.world, 1)

    def token(self, rank: int, op: int) -> str:
        """`F2@1`; empty outside a program."""
        if not 0 <= self.stage(rank) < len(self.programs) or op < 0:
            return ""
        ops = self.programs[self.stage(rank)]
        return ops[op] if op < len(ops) else ""


def ranks_words(ranks: Iterable[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5`."""
    found = sorted(set(ranks))
    runs: list[list[int]] = []
    for rank in found:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'s' if len(found) > 1 else ''} {', '.join(words)}"


def place_words(stand: Stand, places: Places) -> str:
    """Where a rank is: `in step 17, at F2@1`."""
    step, _, op = stand.at
    if stand.phase in _PHASES:
        return f"{_PHASES[stand.phase]}, after step {step + 1}" if stand.phase != "data" else _PHASES["data"]
    token = places.token(stand.rank, op)
    return f"in step {step + 1}" + (f", at {token}" if token else "")


def call_words(call: Call) -> str:
    """`all_reduce over dp (number 12, 4096 bytes)`."""
    if call.kind == "wait":
        return f"the lane of {call.axis}" if call.axis else "a copy"
    peer = f" {'to' if call.kind == 'send' else 'from'} rank {call.peer}" if call.kind in TRANSFERS else ""
    size = f", {call.nbytes} bytes" if call.nbytes else ""
    return f"{call.kind} over {call.axis}{peer} (number {call.seq}{size})"


def hang_line(kind: str, causes: Sequence[Stand], places: Places) -> str:
    """What happened, in one line."""
    first = causes[0]
    hosts = ", ".join(sorted({each.host for each in causes if each.host}))
    where, who = place_words(first, places), ranks_words(each.rank for each in causes)
    on = f" on {hosts}" if hosts else ""
    many = len(causes) > 1
    was, has, does = ("were", "have", "do") if many else ("was", "has", "does")
    waited = f"; {'they wait' if many else 'it waits'} in {call_words(first.waits)}" if first.waits is not None else ""
    idle = f"{first.idle_s:.1f} s"
    lines = {
        "killed": f"{who} {_killed(first, was)}{on}, {where}",
        "out of memory": f"{who} {was} killed by the kernel's out-of-memory killer{on}, {where}, for {first.starved}: "
        "raise it, lower train.micro_batch or set memory.recompute",
        "ended": f"{who} ended with exit code {first.code} and no message{on}, {where}",
        "lost node": f"{who}{on} cannot be reached any more: the node is down, or the way to it",
        "stopped": f"{who}{on} {was} stopped (SIGSTOP, or a debugger) {where}, {idle} ago",
        "frozen": f"{who}{on} {has} given no sign of life for {idle}, {where}: something holds Python's lock",
        "failed": f"{who}{on} failed {where}: {first.line}",
        "hang": f"{who}{on} {has} not come on for {idle}, {where}",
        "livelock": f"{who}{on} {has} run in circles for {idle}, {where}: it computes and does not come on",
        "data stall": f"{who}{on} {has} had no data for {idle}: reading {does} not come back",
        "data livelock": f"{who}{on} {has} had no data for {idle}: preparing {does} not end, with a core busy",
        "checkpoint": f"the save of {who}{on} has not ended for {first.writer_s:.1f} s: the storage does not answer",
        "deadlock": f"{who}{on} wait for each other {where}{waited}",
        "link": f"{who}{on} {has} got nothing through for {idle}, {where}{waited}: all are there, so it is the link",
    }
    stack = next((each.stack for each in causes if each.stack), ())
    return lines[kind] + (f"; it stands at {stack[0]}" if stack else "")


def _killed(stand: Stand, was: str) -> str:
    """How a process died, as far as the kernel still knew."""
    if stand.code is None:
        return "died without a word"
    try:
        name = signal.Signals(-stand.code).name
    except ValueError:
        name = f"signal {-stand.code}"
    memory = " (the machine may be out of memory)" if stand.code == -signal.SIGKILL else ""
    return f"{was} killed by {name}{memory}"


def detail_lines(stands: Mapping[int, Stand], causes: set[int], places: Places) -> tuple[str, ...]:
    """Who waits for what, and the stacks, each with the ranks that share it; the causes' first."""
    waiting: dict[str, list[int]] = {}
    for rank, stand in sorted(stands.items()):
        if rank not in causes and stand.condition in (Condition.RUNS, Condition.LOST):
            waiting.setdefault(_waiting_words(stand, places), []).append(rank)
    lines = [f"  {ranks_words(ranks)}: {what}" for what, ranks in waiting.items()]
    stacks: dict[tuple[str, ...], list[int]] = {}
    for rank in sorted(stands, key=lambda rank: (rank not in causes, rank)):
        if stands[rank].stack:
            stacks.setdefault(_call_site(stands[rank].stack), []).append(rank)
    lines += [f"  {ranks_words(ranks)} stood at {' < '.join(stack)}" for stack, ranks in stacks.items()]
    return tuple(lines)


def _call_site(stack: tuple[str, ...]) -> tuple[str, ...]:
    """The innermost frames of a stack, without those inside a wait."""
    outside = [frame for frame in stack if not frame.startswith("parallel/comm/")]
    return tuple((outside or list(stack))[:_FRAMES])


def _waiting_words(stand: Stand, places: Places) -> str:
    where = place_words(stand, places)
    if stand.waits is not None:
        return f"waited in {call_words(stand.waits)}, {where}"
    return where
