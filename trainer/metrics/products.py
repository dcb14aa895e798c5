"""What a device reaches in the model's own matrix products: the ceiling of its forward and backward passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ...configs.schema import Config, ModelConfig
from ...models.costs.parameters import active_experts, matrices_of


@dataclass(frozen=True)
class Product:
    """(rows, inner) times (inner, columns), so often in a microbatch."""

    rows: int
    inner: int
    columns: int
    count: float

    @property
    def flops(self) -> float:
        """Of one."""
        return 2.0 * self.rows * self.inner * self.columns


def products_of(cfg: Config) -> list[Product]:
    """The weights' products of a forward pass of one microbatch on one rank, of the whole model.

    Args:
        cfg: resolved.
    """
    p, model = cfg.parallel, cfg.model
    rows = max(1, cfg.train.micro_batch * cfg.train.seq_len // p.cp)
    h, matrices, routed = model.hidden, matrices_of(model), len(model.moe_layers)
    found = [*_attention(model, rows, p.tp), Product(rows, h, max(1, model.used_vocab // p.tp), 1 + model.mtp)]
    if model.layers > routed:
        found.append(Product(rows, h, max(1, model.ffn // p.tp), matrices * (model.layers - routed)))
    if routed:
        here = max(1, model.moe.experts // p.ep)
        share = max(1, round(rows * active_experts(model) / p.tp / here))
        found.append(Product(share, h, max(1, model.moe.ffn // p.etp), matrices * here * routed))
        if model.moe.shared:
            found.append(Product(rows, h, max(1, model.moe.shared // p.tp), matrices * routed))
    return found


def _attention(model: ModelConfig, rows: int, tp: int) -> list[Product]:
    width = model.heads * (model.head_dim or model.hidden // model.heads)
    kv = (model.kv_heads or model.heads) * (model.head_dim or model.hidden // model.heads)
    layers = model.layers + model.mtp
    return [
        Product(rows, model.hidden, max(1, width // tp), 2 * layers),
        Product(rows, model.hidden, max(1, kv // tp), 2 * layers),
    ]


def ceiling_tflops(
    products: Sequence[Product],
    device: torch.device,
    dtype: torch.dtype,
    *,
    seconds: float = 0.02,
    barrier: Callable[[], object] = lambda: None,
) -> float:
    """TFLOP/s in products of these shapes, each by how often it occurs, while the node's other ranks do the same.

    Args:
        products: of the model.
        device, dtype: of the rank.
        seconds: for each shape.
        barrier: waits for all ranks of the node, which all call this.
    """
    barrier()
    needed = 0.0
    for product in products:
        a = torch.ones(product.rows, product.inner, dtype=dtype, device=device)
        b = torch.ones(product.columns, product.inner, dtype=dtype, device=device)
        out = torch.empty(product.rows, product.columns, dtype=dtype, device=device)
        needed += product.count * _seconds_of(lambda a=a, b=b, out=out: torch.mm(a, b.t(), out=out), device, seconds)
    barrier()
    return sum(product.count * product.flops for product in products) / needed / 1e12


def _seconds_of(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The mean of repeated runs after a first one."""

    def done() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    work()
    begin, count = done(), 0
    while True:
        for _ in range(8):
            work()
        count += 8
        passed = done() - begin
        if passed >= seconds:
            return passed / count
