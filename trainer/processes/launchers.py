"""Which rank of how many this process is, as whoever started it says: torchrun, SLURM, Open MPI, MPICH and their like.

Each launcher's facts are translated into torch's variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
MASTER_ADDR, MASTER_PORT). A process that only lives inside an allocation, as an sbatch script does, is no rank.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ...configs.errors import Problem, UserError

TASKS = {
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MVAPICH": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    "PMI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "Flux": ("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", ""),
    "jsrun": ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", ""),
}
"""Launcher: its variables for rank, ranks, rank on this host, ranks on this host."""
_SLURM_STEP = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS")
"""Set in what srun starts, not in a batch script."""
_JOBS = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PBS_JOBID", "LSB_JOBID")
"""What tells two jobs on one host apart."""
_PORTS = range(10000, 30000)
"""Below the ports that Linux hands out by itself (32768 and above)."""
_THIS_HOST = ("localhost", "127.0.0.1", "::1")
_BRACKET = re.compile(r"\[([^\[\]]*)\]")


@dataclass(frozen=True)
class RankPlace:
    """A rank among those of its job; None where the launcher does not tell."""

    source: str
    rank: int
    world: int
    local_rank: int | None = None
    local_world: int | None = None


def place(env: Mapping[str, str]) -> dict[str, str]:
    """torch's variables for this process; empty where it is no rank of a launcher's.

    What the user has set of MASTER_ADDR, MASTER_PORT, LOCAL_RANK and LOCAL_WORLD_SIZE stays.

    Raises:
        UserError: facts that contradict each other, or that do not suffice.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        given = _given(env)
        alone = given.rank if env.get("MASTER_ADDR") in _THIS_HOST else 0
        local_rank = alone if given.local_rank is None else given.local_rank
        return {"LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(given.local_world or local_rank + 1)}
    found = _other(env)
    if found is None and "PMIX_RANK" in env:
        raise UserError(
            f"PMIX_RANK={env['PMIX_RANK']}, but nothing says of how many; start the ranks with torchrun, srun or "
            "mpirun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        )
    if found is None or found.world == 1:
        return {}
    made = {"RANK": str(found.rank), "WORLD_SIZE": str(found.world)} | _meeting_point(env, found)
    local_rank, local_world = _local(env, found)
    local = {"LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(local_world)}
    return made | {name: env.get(name, value) for name, value in local.items()}


def _given(env: Mapping[str, str]) -> RankPlace:
    """What RANK and WORLD_SIZE say, compared with what others do."""
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if name not in env:
            raise UserError(Problem(name, f"is not set, but {other}={env[other]} is; set both, or unset {other}"))
    given = _checked(env, "RANK and WORLD_SIZE", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "TORCHELASTIC_RUN_ID" in env:
        return given  # torchrun itself may be a task of another launcher
    other = _other(env)
    # A task may start several ranks: then the world is a multiple of the tasks, and the ranks of a task are neighbours.
    if other is not None and (given.world % other.world or given.rank * other.world // given.world != other.rank):
        raise UserError(
            Problem(
                "RANK",
                f"RANK={given.rank} of WORLD_SIZE={given.world} contradicts {other.source}, where this is task "
                f"{other.rank} of {other.world}; unset RANK and WORLD_SIZE to follow {other.source}",
            )
        )
    return given


def _other(env: Mapping[str, str]) -> RankPlace | None:
    """What launchers other than torchrun say."""
    task, step = _tasks(env), _slurm(env)
    # mpirun starts one task of a step on each host; srun with PMI sets both alike, and SLURM tells more.
    return step if task is None or (step and (step.rank, step.world) == (task.rank, task.world)) else task


def _tasks(env: Mapping[str, str]) -> RankPlace | None:
    """What the launchers of `TASKS` say.

    Raises:
        UserError: two of them say different things.
    """
    found = [_checked(env, name, *keys) for name, keys in TASKS.items() if keys[0] in env or keys[1] in env]
    for other in found[1:]:
        first = found[0]
        if (other.rank, other.world) != (first.rank, first.world):
            raise UserError(
                f"{first.source} says rank {first.rank} of {first.world}, {other.source} says rank {other.rank} of "
                f"{other.world}; unset the variables of one, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
            )
    return found[0] if found else None


def _slurm(env: Mapping[str, str]) -> RankPlace | None:
    """The task of a SLURM step that this process is."""
    if not any(name in env for name in _SLURM_STEP):
        if env.get("SLURM_PROCID", "0") != "0":
            raise UserError(
                f"SLURM_PROCID={env['SLURM_PROCID']} but no SLURM_STEP_ID: this is a task that srun did not start; "
                "start the ranks with srun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
            )
        return None
    size = next((name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS") if name in env), "")
    if not size and "SLURM_PROCID" not in env:
        return None
    return _checked(env, "SLURM", "SLURM_PROCID", size or "SLURM_NTASKS", "SLURM_LOCALID", "")


def _checked(env: Mapping[str, str], source: str, rank: str, size: str, local_rank: str, local_size: str) -> RankPlace:
    for name, other in ((rank, size), (size, rank)):
        if name not in env:
            raise UserError(f"{source}: {name} is not set, but {other}={env.get(other)} is; start the job again")
    place = RankPlace(
        source,
        _number(env, rank),
        _number(env, size),
        _number(env, local_rank) if local_rank in env else None,
        _number(env, local_size) if local_size in env else None,
    )
    if place.rank >= place.world:
        raise UserError(f"{source}: {rank}={place.rank} must be below {size}={place.world}; start the job again")
    if place.local_world is not None and not 0 < place.local_world <= place.world:
        raise UserError(f"{source}: {local_size}={place.local_world} must be from 1 to {size}={place.world}")
    limit, above = (place.local_world, local_size) if place.local_world is not None else (place.world, size)
    if place.local_rank is not None and place.local_rank >= limit:
        raise UserError(f"{source}: {local_rank}={place.local_rank} must be below {above}={limit}")
    return place


def _number(env: Mapping[str, str], name: str) -> int:
    value = env[name].strip()
    if not value.isascii() or not value.isdecimal() or len(value) > 9:
        raise UserError(f"{name}={value or '(empty)'} is not a number of ranks; set it right, or unset it")
    return int(value)


def _local(env: Mapping[str, str], found: RankPlace) -> tuple[int, int]:
    """This process's number among those on its host, and how many those are."""
    rank, world = found.local_rank, found.local_world
    if rank is None and "LOCAL_RANK" in env:
        rank = _number(env, "LOCAL_RANK")
    if world is None and found.source == "SLURM":
        world = _slurm_local_world(env)
    if _one_host(env, found):
        rank, world = found.rank if rank is None else rank, found.world
    if rank is None:
        message = f"is not set, and {found.source} does not say which process of its host this is; set LOCAL_RANK"
        raise UserError(Problem("LOCAL_RANK", message))
    return rank, max(world or 1, rank + 1)


def _slurm_local_world(env: Mapping[str, str]) -> int | None:
    """From `4(x2),3`: tasks of the first node, the second …"""
    text = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or env.get("SLURM_NTASKS_PER_NODE")
    counts: list[int] = []
    for part in (text or "").split(","):
        match = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", part.strip())
        if match is None:
            return None
        counts += [int(match[1])] * int(match[2] or 1)
    node = env.get("SLURM_NODEID", "0")
    return counts[min(int(node), len(counts) - 1)] if node.isdecimal() else None


def _one_host(env: Mapping[str, str], found: RankPlace) -> bool:
    if env.get("MASTER_ADDR") in _THIS_HOST:
        return True
    nodes = env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES") or env.get("SLURM_JOB_NUM_NODES")
    if found.local_world is not None:
        return found.local_world == found.world
    return found.source == "SLURM" and (nodes or str(len(list(hosts(_node_list(env)))))) in ("0", "1")


def _meeting_point(env: Mapping[str, str], found: RankPlace) -> dict[str, str]:
    """Where rank 0 waits for the others: on the first host, at a port that the job's number gives."""
    address = env.get("MASTER_ADDR")
    if address is None:
        address = next(hosts(_node_list(env)), None) if found.source == "SLURM" else None
    if address is None and _one_host(env, found):
        address = "127.0.0.1"
    if address is None:
        raise UserError(
            Problem(
                "MASTER_ADDR",
                f"is not set, and {found.source} does not say where rank 0 of {found.world} runs; export MASTER_ADDR="
                "(the host of rank 0), or start the ranks with torchrun",
            )
        )
    port = env.get("MASTER_PORT")
    if port is None:
        job = " ".join(env.get(name, "") for name in _JOBS)
        if not job.strip():
            job = str(os.getppid())  # the launcher's own process: the same for all ranks of a host
            if not _one_host(env, found):
                raise UserError(
                    Problem(
                        "MASTER_PORT", f"is not set, and {found.source} gives the job no number; export MASTER_PORT"
                    )
                )
        port = str(_PORTS[zlib.crc32(job.encode()) % len(_PORTS)])
    return {"MASTER_ADDR": address, "MASTER_PORT": port}


def _node_list(env: Mapping[str, str]) -> str:
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    return next((env[name] for name in names if env.get(name)), "")


def hosts(node_list: str) -> Iterator[str]:
    """The hosts of a SLURM node list, `login,n[001-003,7]x[1-2]`, in its order.

    Raises:
        UserError: it is no such list.
    """
    for part in re.split(r",(?![^\[\]]*\])", node_list):
        if part.strip():
            yield from _expanded(part.strip(), node_list)


def _expanded(part: str, node_list: str) -> Iterator[str]:
    match = _BRACKET.search(part)
    if match is None:
        if not re.fullmatch(r"[A-Za-z0-9._:-]+", part):
            raise UserError(Problem("MASTER_ADDR", f"no host in the node list {node_list!r}; export MASTER_ADDR"))
        yield part
        return
    for piece in match[1].split(","):
        low, dash, high = piece.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise UserError(Problem("MASTER_ADDR", f"no host in the node list {node_list!r}; export MASTER_ADDR"))
        for number in range(int(low), int(high if dash else low) + 1):
            yield from _expanded(f"{part[: match.start()]}{number:0{len(low)}d}{part[match.end() :]}", node_list)
