"""What a job asks SLURM for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...configs import Problem, UserError

_TIME = re.compile(r"(\d{1,3}-)?\d{1,5}(:\d{1,2}){0,2}")
"""What sbatch reads as a time: minutes, minutes:seconds, hours:minutes:seconds, days-hours …"""


@dataclass(frozen=True, kw_only=True)
class SlurmRequest:
    """What a job asks for; each field is an option of `pentad slurm`.

    Raises:
        UserError: what cannot be asked for, all at once.
    """

    nodes: int
    gpus_per_node: int = 0
    ranks_per_node: int | None = None
    """None: one for each GPU."""
    cpus_per_rank: int | None = None
    """None: what the cluster gives a task."""
    time: str | None = None
    """Limit of one start of the job, as sbatch writes times; none: the partition's."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    notice: int = 300
    """Seconds before the limit at which the ranks are told to save and to leave."""
    container: str | None = None
    """An image: FILE.sif runs under Apptainer, others under pyxis (srun's --container-image)."""
    setup: tuple[str, ...] = ()
    """Lines of the shell before the ranks start, on the first node."""
    sbatch: tuple[str, ...] = ()
    """More options of sbatch, as `--constraint=h200`."""

    def __post_init__(self) -> None:
        problems = [
            Problem(name, f"{value}: at least {least}")
            for name, value, least in (
                ("--nodes", self.nodes, 1),
                ("--gpus-per-node", self.gpus_per_node, 0),
                ("--ranks-per-node", self.ranks_per_node, 1),
                ("--cpus-per-rank", self.cpus_per_rank, 1),
                ("--notice", self.notice, 0),
            )
            if value is not None and value < least
        ]
        if self.ranks_per_node is None and not self.gpus_per_node:
            problems.append(Problem("--ranks-per-node", "is not given, and neither is --gpus-per-node; give one"))
        if self.time is not None and not _TIME.fullmatch(self.time):
            problems.append(Problem("--time", f"{self.time} is no time of sbatch; write HOURS:MINUTES:SECONDS"))
        for option in self.sbatch:
            if not option.startswith("--") or "\n" in option:
                problems.append(Problem("--sbatch", f"{option!r} is no option; write --sbatch=--NAME=VALUE"))
        if problems:
            raise UserError(*problems)

    @property
    def tasks(self) -> int:
        """Ranks of a node."""
        return self.ranks_per_node or self.gpus_per_node

    @property
    def world(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.tasks
