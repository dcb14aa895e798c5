"""Host memory that masters and moments on a disk take: Pentad beside DeepSpeed's ZeRO-Infinity, the same parameters.

    python benchmarks/optimizer_disk.py --folder /tmp --peer-python ~/venv-with-deepspeed/bin/python

Each side is a process of its own that makes the same bf16 parameters, updates them three times by AdamW with masters
and moments on the disk, and watches its own anonymous memory (what is no page of a file). What is printed is the peak
above the moment before gradients, masters and moments came about. ZeRO-Infinity runs twice: as it is by default, and
with subgroups of our size. It needs deepspeed with its asynchronous I/O (libaio).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SIDE = 1024
"""Parameters are matrices of so many rows and columns."""
STEPS = 3


def anonymous() -> int:
    """Bytes of this process's memory that are no pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon", "RssShmem")))


class Watch:
    """The peak of `anonymous` from `start` on."""

    def start(self) -> None:
        self._base = self._peak = anonymous()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(0.001):
            self._peak = max(self._peak, anonymous())

    def end(self) -> int:
        """Bytes of the peak above the start."""
        self._over.set()
        self._thread.join()
        return self._peak - self._base


def pentad(count: int, folder: Path, subgroup_mib: float) -> dict[str, Any]:
    """Our side: buckets of 16 million parameters, as a rank of zero1 has them."""
    from pentad.configs.schema import AdamWConfig, MemoryConfig
    from pentad.parallel.comm.disk import Disk
    from pentad.parallel.replicas.protocol import OptimizerShard
    from pentad.trainer.optim.adamw_kernels import sum_of_squares
    from pentad.trainer.optim.disk_place import DiskStatePlace
    from pentad.trainer.optim.optimizer import UpdateScalars
    from pentad.trainer.optim.states import make_optimizer

    sizes = [SIDE * SIDE * min(16, count - first) for first in range(0, count, 16)]
    params = [torch.randn(size).mul_(0.02).bfloat16() for size in sizes]
    watch = Watch()
    watch.start()
    grads = [torch.randn(size) for size in sizes]
    place = DiskStatePlace(Disk.open(folder), pinned=False)
    memory = MemoryConfig(offload_optimizer="disk", optimizer_subgroup_mib=subgroup_mib)
    optimizer = make_optimizer(AdamWConfig(), torch.device("cpu"), place, memory)
    units = []
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        master = place.allocate(param.numel(), torch.float32).copy_(param)
        units.append(OptimizerShard(f"bucket{i}", master, grad, param, True, True))
        optimizer.prepare(units[-1], None)
    seconds = []
    for step in range(STEPS):
        began = time.monotonic()
        norm = torch.stack([sum_of_squares(grad) for grad in grads]).sum()
        now = UpdateScalars(1e-3, 1 / norm.sqrt(), (~torch.isfinite(norm)).float(), torch.tensor(float(step + 1)))
        for unit in units:
            optimizer.step([unit], now)
        optimizer.settle()
        seconds.append(time.monotonic() - began)
    found = {"peak": watch.end(), "step_s": min(seconds), "pool": place.pool_bytes}
    optimizer.close()
    place.close()
    return found


class Weights(nn.Module):
    """Parameters, and a loss that every one is part of."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(SIDE, SIDE).mul_(0.02).bfloat16()) for _ in range(count)
        )

    def forward(self, scale: Tensor) -> Tensor:
        """The scaled sum of all parameters' sums, a scalar."""
        return torch.stack([weight.sum() for weight in self.weights]).float().sum() * scale


def deepspeed(count: int, folder: Path, subgroup: int | None) -> dict[str, Any]:
    """The peer's side: ZeRO stage 3 with the optimizer on NVMe."""
    facts = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}
    os.environ.update(facts)
    import deepspeed as peer  # pyright: ignore[reportMissingImports]

    peer.init_distributed("gloo")
    model, watch = Weights(count), Watch()
    watch.start()
    zero: dict[str, Any] = {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "nvme_path": str(folder), "pin_memory": False},
    }
    if subgroup is not None:
        zero["sub_group_size"] = subgroup
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": zero, "aio": {}}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config["zero_allow_untested_optimizer"] = config["zero_force_ds_cpu_optimizer"] = False
    config["zero_allow_untested_optimizer"] = True
    engine, *_ = peer.initialize(model=model, optimizer=optimizer, config=config)
    seconds = []
    for _ in range(STEPS):
        engine.backward(engine(torch.ones(())))
        began = time.monotonic()
        engine.step()
        seconds.append(time.monotonic() - began)
    return {"peak": watch.end(), "step_s": min(seconds)}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--matrices", type=int, default=64, help="of a million parameters each")
    parser.add_argument("--folder", type=Path, default=Path("/tmp"))
    parser.add_argument("--subgroup-mib", type=float, default=64.0)
    parser.add_argument("--peer-python", help="a Python that has deepspeed; none: our side alone")
    parser.add_argument("--side", choices=["pentad", "deepspeed"], help=argparse.SUPPRESS)
    parser.add_argument("--subgroup", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side is not None:
        found = (
            pentad(args.matrices, args.folder, args.subgroup_mib)
            if args.side == "pentad"
            else deepspeed(args.matrices, args.folder, args.subgroup)
        )
        print(json.dumps(found))
        return
    sides = {"Pentad": [sys.executable, "--side", "pentad"]}
    if args.peer_python:
        same = int(args.subgroup_mib * 2**20) // 12
        sides["ZeRO-Infinity"] = [args.peer_python, "--side", "deepspeed"]
        sides["ZeRO-Infinity, our subgroups"] = [args.peer_python, "--side", "deepspeed", "--subgroup", str(same)]
    rows = {}
    for name, (python, *rest) in sides.items():
        given = [
            "--matrices",
            str(args.matrices),
            "--folder",
            str(args.folder),
            "--subgroup-mib",
            str(args.subgroup_mib),
        ]
        done = subprocess.run([python, __file__, *given, *rest], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-3000:]}")
        rows[name] = json.loads(done.stdout.strip().splitlines()[-1])
    gradients = 4 * args.matrices * SIDE * SIDE
    print(f"{args.matrices} million parameters; fp32 gradients alone are {gradients / 2**20:.0f} MiB")
    for name, row in rows.items():
        share = "" if name == "Pentad" else f", ours is {100 * rows['Pentad']['peak'] / row['peak']:.0f} % of it"
        print(f"{name:30} peak {row['peak'] / 2**20:7.0f} MiB of the host, updates {row['step_s']:.2f} s{share}")


if __name__ == "__main__":
    main()
