"""All checkpoints of a job as its step loop meets them: those that all ranks see, and those that each node keeps."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ....configs.errors import UserError
from ....configs.schema import CheckpointConfig, Config
from ....parallel.comm.collectives import all_reduce
from ....parallel.comm.mesh import Axis, Mesh
from ....parallel.global_tensor import GlobalTensor
from ...run_folder import RunFile, checkpoint_folder, run_folder
from ..checkpointer import Checkpointer, CheckpointError
from ..retention import Retention
from .local import NodeFolders, run_number
from .search import Needed, newest_verified


class Tiers:
    """Every rank makes one and calls its methods in the same order.

    Args:
        shared: of the checkpoints that all ranks see.
        local: of those that each node keeps for itself; none: there are no such.
    """

    def __init__(self, shared: Checkpointer, local: Checkpointer | None = None) -> None:
        self.shared, self.local = shared, local
        self.all = (shared,) if local is None else (shared, local)

    def of(self, path: Path) -> Checkpointer:
        """Who reads a checkpoint."""
        return self.local if self.local is not None and path.parent == self.local.directory else self.shared

    def look_for(self, step: int) -> None:
        """Finds out whether this very run has saved a step before a fault."""
        for each in self.all:
            each.look_for(step)

    def find_resume(self, resume: str | Path, needed: Needed) -> Path | None:
        """As of `Checkpointer`; `latest` is the newest of all.

        Args:
            resume: `latest` or the path of one checkpoint.
            needed: what this rank is to read of it.
        """
        if self.local is None or str(resume) != "latest":
            return self.shared.find_resume(resume)
        found = newest_verified([each.tier for each in self.all], needed)
        return found[1] if found is not None else None

    def every(self, cfg: CheckpointConfig) -> list[tuple[Checkpointer, int]]:
        """Each with the steps between its saves; 0: none but the last."""
        return list(zip(self.all, (cfg.every, cfg.local.every), strict=False))

    def prepare(self, cfg: CheckpointConfig, tensors: Callable[[], Mapping[str, GlobalTensor]]) -> None:
        """What the first saves between steps need is made before them."""
        for each, every in self.every(cfg):
            if every:
                each.prepare(tensors())

    def unheard(self) -> list[dict[str, Any]]:
        """Events of saves that failed or were passed over since it was asked last."""
        return [event for each in self.all for event in each.telling.unheard()]

    def close(self) -> None:
        """Waits and ends the writing threads. What failed has been told."""
        for each in self.all:
            each.close()

    def finish(self, step: int) -> None:
        """Returns when the last save is there. What the nodes keep for themselves is not wanted any more then.

        Raises:
            CheckpointError: it is not, with what that means for a run that has come to `step`.
        """
        try:
            self.shared.wait()
        except CheckpointError as error:
            done = f"training came to step {step}, and its last save failed"
            raise CheckpointError(f"{done}: {error}; checkpoint.resume=latest goes on from the one before") from error
        if self.local is not None and self.shared.newest == step:
            self.local.retire()


def still_written(checkpointer: Checkpointer, world: Axis, device: torch.device) -> bool:
    """Whether any rank still writes the last save. All ranks ask at the same step, and hear the same.

    Args:
        checkpointer: of this rank.
        world: axis over all ranks.
        device: for the answer.
    """
    busy = checkpointer.busy
    if busy is None:
        return False
    ranks = torch.tensor([float(busy)], dtype=torch.float64, device=device)
    return bool(all_reduce(ranks, world).wait().item())


def open_tiers(cfg: Config, mesh: Mesh, on_event: Callable[[dict[str, Any]], None]) -> Tiers:
    """Of a job on this rank, in a mesh.

    Args:
        cfg: the job.
        mesh: of this rank.
        on_event: called on rank 0, see `Checkpointer`.

    Raises:
        UserError: the run's number cannot be read or kept.
    """
    local = cfg.checkpoint.local

    def made(directory: Path, group: Any, keep: Retention, nodes: NodeFolders | None) -> Checkpointer:
        return Checkpointer(
            directory,
            group=group,
            rank=mesh.rank,
            world=mesh.degrees.world,
            keep=keep,
            asynchronous=cfg.checkpoint.asynchronous,
            on_event=on_event,
            abort=mesh.abort,
            recorder=mesh.recorder,
            nodes=nodes,
        )

    shared = made(checkpoint_folder(cfg), mesh.checkpoint_group, Retention.of(cfg.checkpoint), None)
    if local.dir is None:
        return Tiers(shared)
    nodes = _node_folders(cfg, mesh)
    directory = nodes.folder(Path(local.dir), mesh.rank)
    return Tiers(shared, made(directory, mesh.local_saves_group, Retention(local.keep), nodes))


def _node_folders(cfg: Config, mesh: Mesh) -> NodeFolders:
    """The same on all ranks; the first one sees the run's folder."""
    number: str | UserError | None = None
    if mesh.is_first:
        try:
            number = run_number(run_folder(cfg) / RunFile.NUMBER)
        except UserError as error:
            number = error
    found = mesh.gather_objects((number, socket.gethostname()))
    first = found[0][0]
    if isinstance(first, UserError):
        raise UserError(*first.problems)
    return NodeFolders(str(first), tuple(host for _, host in found))
