"""torchft: every rank is a replica group of its own, which a lighthouse knows; the state comes from a peer."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import TCPStore
from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo  # type: ignore[import-not-found]

from peers.beating import batch_of, beat, tiny_model


def main() -> None:
    rank = int(os.environ["REPLICA"])
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    model = tiny_model()
    inner = torch.optim.AdamW(model.parameters(), fused=True)

    def load(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        inner.load_state_dict(state["optimizer"])

    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=10)),
        load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "optimizer": inner.state_dict()},
        min_replica_size=2,
        replica_id=f"replica_{rank}",
        rank=0,
        world_size=1,
        timeout=timedelta(seconds=10),
    )
    wrapped, optimizer = DistributedDataParallel(manager, model), Optimizer(manager, inner)
    while True:
        batch = batch_of(manager.current_step(), rank)
        optimizer.zero_grad()
        wrapped(input_ids=batch, labels=batch).loss.backward()
        before = manager.current_step()
        optimizer.step()
        if manager.current_step() > before:
            beat(rank, manager.current_step())


if __name__ == "__main__":
    main()
