"""Every wait can be left within 100 ms of an abort: each place that may block stands here, with why it can be left.

What can block at all comes from a few modules. A file that imports none of them waits through handles only, whose
`wait` goes through the abort; in the others every call that looks like a wait must be in the table below.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("configs", "parallel", "models", "trainer", "launch")
PRIMITIVES = (
    *("threading", "_thread", "queue", "time", "select", "socket", "subprocess", "multiprocessing", "concurrent"),
    *("asyncio", "fcntl", "torch.distributed"),
)
"""Modules through which a thread can come to wait for something that may never happen."""
BLOCKS = {
    *("wait", "wait_for", "acquire", "synchronize", "communicate", "recv", "accept", "sleep", "result", "waitpid"),
    *("barrier", "monitored_barrier", "all_gather_object", "broadcast_object_list", "init_process_group", "new_group"),
    *("split_group", "init_device_mesh", "wait_tensor", "destroy_process_group", "TCPStore", "elastic_launch"),
    *("flock", "lockf", "create_connection"),
}
WITH = {
    "get": ("queue", "store", "jobs"),
    "put": ("queue", "jobs", "out"),
    "poll": ("poll", "select"),
    "add": ("store",),
}
"""Calls that block on such receivers; elsewhere they are something else."""

HANDLE = "a handle's: through the abort"
ABORT = "asks the abort, at least every 20 ms"
BESIDE = "in a thread of its own, which is left behind: whoever needs it waits through the abort"
NOBODY = "a daemon thread's own wait, for which nobody waits without the abort"
NEVER = "does not block: the queue has no bound"
SHORT = "bounded, and shorter than 100 ms"
DEVICE = "the device's own work; what it may wait for of other ranks is ended with the communicators"
FILES = "own work on this host's files or processes, no wait for a rank"
START = "before there is a mesh: ends with the meeting's own signs and time-out"
CLOSING = "of a mesh that is left: its sockets are cut, and the watcher ends a process that stays"
LAUNCHER = "not a rank's process"
WAITS = {
    "parallel/comm/collectives.py": {
        "": HANDLE,
        "_wait_host": ABORT + "; torch's wait follows the completion",
        "_wait_cuda": "makes the stream wait, the host goes on",
    },
    "parallel/comm/host_tree.py": {
        "HostLevel": "as its `wait` does, a team's or `wait_blocking`",
        "wait_blocking": BESIDE,
    },
    "parallel/comm/lane.py": {
        "Pending": ABORT,
        "Lane.submit": NEVER,
        "Lane.close": ABORT,
        "Lane._serve": NOBODY,
    },
    "parallel/comm/link_probe.py": {"": HANDLE, "_done": DEVICE},
    "parallel/comm/mesh.py": {
        "Mesh._make": BESIDE,
        "Mesh._make_axes": BESIDE,
        "Mesh._cut": BESIDE,
        "Mesh.close": CLOSING,
        "_connect": BESIDE,
    },
    "parallel/comm/processes.py": {"Process.alive": SHORT},
    "parallel/comm/shared_memory.py": {
        "LocalAxis.progress": SHORT,
        "LocalAxis.wait": ABORT,
        "Exchange.finish": ABORT,
    },
    "parallel/comm/shared_memory_connect.py": {"connect": BESIDE, "_allow": BESIDE},
    "parallel/comm/waiting.py": {
        "Abort": ABORT,
        "Transfer.watch": NOBODY,
        "Transfer.wait": ABORT,
        "Waiter.add": NEVER,
        "Waiter.close": NEVER,
        "Waiter._run": NOBODY,
    },
    "parallel/record/device_clock.py": {"": DEVICE},
    "parallel/record/files.py": {"sweep": FILES},
    "parallel/record/slots.py": {"allocate": FILES},
    "parallel/record/vitals.py": {"Heart.close": SHORT, "Heart._run": NOBODY},
    "parallel/replicas/deepspeed_comm.py": {"": HANDLE},
    "parallel/replicas/fsdp.py": {"": HANDLE},
    "trainer/checkpoint/checkpointer.py": {"Checkpointer._join": ABORT},
    "trainer/checkpoint/tiers/tiers.py": {"Tiers.finish": ABORT, "still_written": HANDLE},
    "trainer/data/cache.py": {"_locked": BESIDE},
    "trainer/data/encode.py": {"": BESIDE},
    "trainer/data/loader.py": {
        "Loader.close": "5 s at most, and not at all after an abort",
        "Loader._take": ABORT,
        "_put": NOBODY,
    },
    "trainer/data/unfinished.py": {"": FILES},
    "trainer/job/telling.py": {"index_record": "the key is there: this rank has set it"},
    "trainer/metrics/peak.py": {"measure_cpu_peak": ABORT},
    "trainer/metrics/sinks/prometheus.py": {
        "PrometheusSink.__init__": "when a run has ended, for an answer that is being given: 5 s at most",
    },
    "trainer/metrics/products.py": {"ceiling_tflops": ABORT, "_seconds_of.done": DEVICE},
    "trainer/optim/offload.py": {"": HANDLE, "OffloadedStates._calibrated": DEVICE},
    "trainer/overlap.py": {"": HANDLE, "OverlapTuner._synchronize": DEVICE},
    "trainer/pipeline/rates.py": {"agreed_rates": HANDLE, "_seconds": DEVICE},
    "trainer/processes/meeting.py": {"": START},
    "trainer/processes/orphans.py": {"": NOBODY},
    "trainer/processes/run_lock.py": {"FolderLock._beat": NOBODY, "_flock": FILES},
    "trainer/processes/start.py": {"soon": "the last thing of a rank that fails, or for the watcher to be there"},
    "trainer/processes/watch.py": {
        "between_nodes": "the key is there: rank 0 set it before the ranks came together",
        "_port": "for the watcher that starts with the rank: 30 s at most",
        "_own_host": "for the store, which is there: 5 s at most",
    },
    "trainer/processes/threads.py": {
        "map_threads": FILES,
        "Beside.run": NEVER,
        "Beside.join": ABORT,
        "Beside.close": NEVER,
        "_serve": NOBODY,
    },
    "trainer/recovery/keeper.py": {"": HANDLE},
    "trainer/recovery/plan.py": {
        "Membership.wait": "between two meshes, for the watcher, which ends it in any case",
        "Membership.store": "looks, and waits for nothing",
    },
    "trainer/recovery/rejoining.py": {"": "as of the plan"},
    "trainer/session.py": {"_model": HANDLE},
    "trainer/setup.py": {"buckets_per_rank": HANDLE},
    "trainer/trainer.py": {"": HANDLE},
    "launch/slurm/queue.py": {"": LAUNCHER},
    "launch/slurm/snapshot.py": {"": LAUNCHER},
    "launch/supervise/agent.py": {"": LAUNCHER},
    "launch/supervise/fork_server.py": {"": LAUNCHER},
    "launch/supervise/guarded.py": {"": LAUNCHER},
    "launch/supervise/node_ranks.py": {"": LAUNCHER},
    "launch/supervise/nodes/pretended.py": {"": LAUNCHER},
    "launch/supervise/nodes/store_process.py": {"": LAUNCHER},
    "launch/supervise/nodes/watch_link.py": {"": LAUNCHER},
    "launch/supervise/recovery.py": {"": LAUNCHER},
    "launch/supervise/rehearsal_worker.py": {"": "a hang that is wanted, and ended by the watcher"},
    "launch/supervise/supervisor.py": {"": LAUNCHER},
    "launch/supervise/watched.py": {"": LAUNCHER},
    "launch/supervise/watcher.py": {"": LAUNCHER},
    "launch/verbs/diagnose.py": {"": LAUNCHER},
    "launch/verbs/rehearse.py": {"": LAUNCHER},
    "launch/verbs/slurm.py": {"": LAUNCHER},
}
"""File, then function or class (empty: all others of the file): why its waits can be left."""


def _modules(tree: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def _blocks(call: ast.Call) -> bool:
    function = call.func
    if isinstance(function, ast.Name):
        return function.id in BLOCKS
    if not isinstance(function, ast.Attribute):
        return False
    receiver = ast.unparse(function.value)
    last = receiver.split(".")[-1].strip("_")
    if function.attr == "join":  # of a thread or process; texts and paths are joined of something
        return not call.args or last in ("thread", "process", "writer", "greeting")
    if function.attr == "run":
        return receiver == "subprocess"
    return function.attr in BLOCKS or last in WITH.get(function.attr, ())


def waits(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(function, call) of what may block in a file that can block at all."""
    if not any(name == each or name.startswith(f"{each}.") for name in _modules(tree) for each in PRIMITIVES):
        return

    def inside(node: ast.AST, where: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            deeper = where
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                deeper = (*where, child.name)
            elif isinstance(child, ast.Call) and _blocks(child):
                yield ".".join(where), ast.unparse(child.func)
            yield from inside(child, deeper)

    yield from inside(tree, ())


def _reason(file: str, where: str) -> str | None:
    """Why a wait can be left: of the function, what it is inside, or the rest of the file."""
    table, names = WAITS.get(file, {}), where.split(".")
    inner_first = (".".join(names[:count]) for count in range(len(names), 0, -1))
    return next((table[name] for name in inner_first if name in table), table.get(""))


@cache
def _all() -> tuple[tuple[str, str, str], ...]:
    """(file, function, call) of everything that may block."""
    files = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return tuple(
        (str(path.relative_to(ROOT)), where, call)
        for path in files
        for where, call in waits(ast.parse(path.read_text()))
    )


def test_every_wait_can_be_left_and_says_why() -> None:
    unlisted = [each for each in _all() if _reason(*each[:2]) is None]
    assert not unlisted, "let it go through the abort (waiting.Abort), or say in WAITS why it can be left"


def test_the_table_names_no_wait_that_is_gone() -> None:
    used = set()
    for file, where, _ in _all():
        table, names = WAITS[file], where.split(".")
        inner_first = (".".join(names[:count]) for count in range(len(names), 0, -1))
        used.add((file, next((name for name in inner_first if name in table), "")))
    assert {(file, where) for file, table in WAITS.items() for where in table} == used


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import threading\ndef f(event):\n    event.wait()", [("f", "event.wait")]),
        ("import queue\nclass A:\n    def f(self):\n        self._queue.get()", [("A.f", "self._queue.get")]),
        ("import time\ndef f():\n    while True:\n        time.sleep(1)", [("f", "time.sleep")]),
        ("import torch.distributed as dist\ndef f(g):\n    dist.barrier(g)", [("f", "dist.barrier")]),
        ("from threading import Thread\ndef f(t: Thread):\n    t.join()", [("f", "t.join")]),
        ("from .collectives import send\ndef f(x):\n    send(x).wait()", []),
        ("import time\ndef f(d):\n    return ', '.join(d.get('a'))", []),
    ],
)
def test_what_may_block_is_found(text: str, found: list[tuple[str, str]]) -> None:
    assert list(waits(ast.parse(text))) == found
