"""The parts that a rank's step is divided into, and the row of numbers that holds them."""

from __future__ import annotations

from enum import StrEnum


class TimePart(StrEnum):
    """Where a rank's time went. The step's own thread is always in exactly one of them."""

    COMPUTE = "compute"
    """Forward and backward passes, without what they wait for."""
    RECOMPUTE = "recompute"
    """Parts of forward passes that are made again."""
    BUBBLE = "bubble"
    """Waiting for what another stage of the pipeline has not made yet."""
    TP = "tp"
    CP = "cp"
    EP = "ep"
    PP = "pp"
    DP = "dp"
    VOCABULARY = "vocabulary"
    """These: communication over the axis that the step waits for, after the last rank has come to it."""
    STRAGGLER = "straggler"
    """Waiting until the last rank comes to a collective."""
    OFFLOAD = "offload"
    """Waiting for copies between device, host and disk, and starting them."""
    OPTIMIZER = "optimizer"
    """The gradient's norm and the update."""
    DATA = "data"
    """Waiting for the loader."""
    CHECKPOINT = "checkpoint"
    """What saving takes of the step's thread."""
    SNAPSHOT = "snapshot"
    """Copying the state to where it outlives the process."""
    GC = "gc"
    """Python's collections of garbage."""
    CONTENTION = "contention"
    """On a CPU: a pass or an update in which the thread did not run, though it waited for nothing."""
    REPORT = "report"
    """Reading the step's numbers, and writing them down."""
    OTHER = "other"
    """The rest of the step."""


TIME_PARTS = tuple(TimePart)
AXES = (TimePart.TP, TimePart.CP, TimePart.EP, TimePart.PP, TimePart.DP, TimePart.VOCABULARY)
"""Parts that are communication."""
AT = {part: index for index, part in enumerate(TIME_PARTS)}
"""Place of each part in a row; `AXES` stand side by side."""
NOT_OWN = tuple(
    AT[part] for part in (TimePart.DATA, TimePart.CHECKPOINT, TimePart.SNAPSHOT, TimePart.GC, TimePart.REPORT)
)
"""Places of what a rank is busy with and does not count as its own."""

# What follows the parts in a row.
BLIND = len(TIME_PARTS)
"""Of each of `AXES`: what of the communication nobody knows how much of it was waiting for the last rank."""
WAITS = BLIND + len(AXES)
"""Of each of `AXES`: all waiting."""
STEP = WAITS + len(AXES)
"""The step's number, from 1."""
SECONDS = STEP + 1
"""The step's length on this rank."""
OWN = SECONDS + 1
"""Without waiting, data, checkpoints, collections and reports: what the rank itself was busy with."""
CPU = OWN + 1
"""CPU time of the step's thread in the operations."""
PAIRS = CPU + 1
"""Attention pairs of the rank's own microbatches."""
QUEUED = PAIRS + 1
"""How long the step's thread could run and had no core; 0 where the kernel does not tell."""
LINK_RANK = QUEUED + 1
"""The rank out of whose memory this one copied longest in the step, counting copies of 0.2 ms and more; -1: none."""
LINK_S = LINK_RANK + 1
"""How long."""
DURATIONS = LINK_S + 1
"""From here on: the mean length of each of the rank's kinds of operation, as `durations_of` lists them, without what
they wait for other stages."""

_AXIS = {
    "tp": TimePart.TP, "tp_shard": TimePart.TP, "tp_replica": TimePart.TP, "tokens": TimePart.TP,
    "cp": TimePart.CP, "cp_back": TimePart.CP, "cp_scan": TimePart.CP, "cp_inner": TimePart.CP, "cp_outer": TimePart.CP,
    "cp_outer_back": TimePart.CP,
    "ep": TimePart.EP, "etp": TimePart.EP,
    "pp": TimePart.PP, "ends": TimePart.PP,
    "dp": TimePart.DP, "data": TimePart.DP, "edp": TimePart.DP, "world": TimePart.DP,
    "data_states": TimePart.DP, "data_copies": TimePart.DP, "edp_states": TimePart.DP, "edp_copies": TimePart.DP,
    "data_params": TimePart.DP, "data_holders": TimePart.DP, "edp_params": TimePart.DP, "edp_holders": TimePart.DP,
    "data_grads": TimePart.DP, "data_between": TimePart.DP, "edp_grads": TimePart.DP, "edp_between": TimePart.DP,
    "vocab_embed": TimePart.VOCABULARY, "vocab_head": TimePart.VOCABULARY,
}  # fmt: skip


def part_of_axis(name: str) -> TimePart:
    """The part that communication over an axis of the mesh belongs to; the gradient's norm over the world counts as
    dp."""
    return TimePart.PP if name.startswith("channel ") else _AXIS.get(name, TimePart.OTHER)
