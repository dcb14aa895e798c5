"""torch's DDP under `torchrun --max-restarts`, with a checkpoint after every step, as cheap as it can be."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from peers.beating import batch_of, beat, tiny_model


def main() -> None:
    dist.init_process_group("gloo")
    rank, saved = dist.get_rank(), Path(os.environ["BEATS"]).with_name("state.pt")
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    first = 0
    if saved.exists():
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    wrapped = DistributedDataParallel(model)
    for step in range(first + 1, 1_000_000):
        batch = batch_of(step, rank)
        wrapped(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        beat(rank, step)
        if rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, saved.with_suffix(".new"))
            saved.with_suffix(".new").replace(saved)


if __name__ == "__main__":
    main()
