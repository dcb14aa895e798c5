"""What each method keeps for backward, and the most it holds beside that while it works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pentad.parallel.context.gather import AllGather
from pentad.parallel.context.local import Core
from pentad.parallel.context.merge import precise
from pentad.parallel.context.one_device import attention
from pentad.parallel.context.ring import Ring
from pentad.parallel.context.rows import Mask, Spread
from pentad.parallel.context.tokenring import TokenRing
from pentad.parallel.context.ulysses import Ulysses
from pentad.parallel.context.usp import Usp
from pentad.parallel.mesh import Degrees, Mesh
from pentad.parallel.record import Recorder
from tests.distributed import job_store, run_distributed

from .cases import Case, inputs, saved_bytes, spread, take


class Held(TorchDispatchMode):
    """Bytes of all storages that operations inside made and that are alive; `peak` is the most so far."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._given: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                ref = StorageWeakRef(x.untyped_storage())
                self._alive[ref.cdata] = ref, x.untyped_storage().nbytes()
        self.peak = max(self.peak, self.now())
        return found

    def now(self) -> int:
        self._alive = {key: pair for key, pair in self._alive.items() if not pair[0].expired()}
        return sum(nbytes for _, nbytes in self._alive.values())


class Results:
    """Makes tensors of a kernel's results, and nothing else: what is measured beside them is the method's."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
        lse = torch.zeros(q.shape[0], q.shape[2], q.shape[1], dtype=precise(q.dtype))
        return q.new_zeros(*q.shape[:3], v.shape[3]), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.zeros(x.shape, dtype=lse.dtype) for x in (q, k, v))
        return dq, dk, dv


def core_of(name: str, mesh: Mesh) -> Core:
    axis, back, local = mesh.axis("cp"), mesh.axis("cp_back"), Results()
    match name:
        case "allgather":
            return AllGather(axis, local)
        case "ulysses":
            return Ulysses(axis, local)
        case "ring":
            return Ring(axis, back, local)
        case "tokenring":
            return TokenRing(axis, back, local)
        case _:
            return Usp(mesh.axis("cp_inner"), Ring(mesh.axis("cp_outer"), mesh.axis("cp_outer_back"), local))


def measured(rank: int, world: int, names: list[str], case: Case, inner: int):
    recorder = Recorder(None, rank=rank, world=world)
    mesh = Mesh(
        Degrees(cp=world), store=job_store(), rank=rank, device="cpu", recorder=recorder, timeout_s=60, context=inner
    )
    res = {}
    for name in names:
        core, dealt = core_of(name, mesh), spread(case, world, rank)
        given = inputs(case)
        saved = saved_bytes(case, core, dealt)
        leaves = [take(x, dealt.mine).requires_grad_() for x in (given.q, given.k, given.v)]
        dout = take(given.dout, dealt.mine)
        with Held() as held:
            out = core(*leaves, dealt, None, case.scale)
            f, fe = held.peak, held.now()
        with Held() as held:
            g = torch.autograd.grad(out, leaves, dout)
        res[name] = (saved, f, fe, held.peak, held.now())
    mesh.close()
    return res


if __name__ == "__main__":
    from dataclasses import replace

    c = Case("x", batch=1, heads=8, kv_heads=4, key=16, value=16, dtype=torch.float32, length=1024)
    for P in (2, 4):
        s = 1024 // P
        kv = 2 * s * 4 * 16 * 4
        qo = s * 8 * 16 * 4
        lse = s * 8 * 4
        for deal in ("zigzag", "contiguous"):
            r = run_distributed(
                measured,
                P,
                ["allgather", "ulysses", "ring", "tokenring", "usp"],
                replace(c, dealing=deal),
                P // 2 if P > 2 else 1,
                group=False,
            )
            print(P, deal, "kv", kv, "qo", qo, "lse", lse)
            for n in r[0]:
                print("  ", n, [[round(x[n][i] / kv, 2) for x in r] for i in range(5)])
