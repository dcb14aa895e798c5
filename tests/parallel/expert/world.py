"""Experts over several ranks, and a loop over tokens that computes the same in one process."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pentad.configs.schema import MoeConfig
from pentad.models.moe import Experts
from pentad.parallel.comm.mesh import Degrees, Mesh
from pentad.parallel.expert.biases import without_bias
from pentad.parallel.record.ring import Recorder
from tests.distributed import job_store
from tests.training import TINY

E, K, N, H, INNER = 8, 3, 7, 8, 12
IDS = ("dropless", "dropped", "one expert", "one rank sends nothing", "nothing")


def open_mesh(rank: int, ep: int, etp: int, recorder: Recorder | None = None) -> Mesh:
    """The expert mesh of a worker."""
    recorder = recorder or Recorder(None, rank=rank, world=ep * etp, entries=512)
    degrees = Degrees(dp=ep * etp, ep=ep, etp=etp)
    return Mesh(degrees, store=job_store(), rank=rank, device="cpu", recorder=recorder, timeout_s=60)


@dataclass
class Tokens:
    """What one rank dispatches, and the gradient of its result."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    dy: Tensor


def tokens_of(rank: int, ids: str) -> Tokens:
    """N tokens of K different experts each, some of which may be none."""
    draws = torch.Generator().manual_seed(100 + rank)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    x, dy, weights = random(N, H), random(N, H), random(N, K).abs()
    experts = torch.stack([torch.randperm(E, generator=draws)[:K] for _ in range(N)])
    if ids == "dropped":
        experts[torch.rand(N, K, generator=draws) < 0.4] = -1
    elif ids == "one expert":
        experts[:], experts[:, 1] = -1, 5
    elif ids == "nothing" or (ids == "one rank sends nothing" and rank == 0):
        experts[:] = -1
    return Tokens(x, experts, weights.masked_fill(experts < 0, 0.0), dy)


def parameters() -> dict[str, Tensor]:
    """All experts' matrices and biases."""
    cfg = replace(TINY, hidden=H, moe=MoeConfig(experts=E, top_k=K, ffn=INNER, bias=True))
    draws = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(param.shape, generator=draws, dtype=torch.float64) / 3
        for name, param in Experts(cfg).named_parameters()
    }


def experts_of(mesh: Mesh) -> Experts:
    """This rank's slices of all experts."""
    ep, etp = mesh.axis("ep"), mesh.axis("etp")
    cfg = replace(TINY, hidden=H, moe=MoeConfig(experts=E, top_k=K, ffn=INNER, bias=True, compute="loop"))
    module = Experts(cfg)
    for name, value in parameters().items():
        owner, leaf = name.split(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(cut(name, value, ep.rank, ep.size, etp.rank, etp.size)))
    if etp.rank:
        module.down.apply_weights = without_bias(module.down.apply_weights)
    return module


def cut(name: str, value: Tensor, ep: int, eps: int, etp: int, etps: int) -> Tensor:
    """A rank's slice of a parameter or of its gradient."""
    value = value.chunk(eps)[ep]
    if name == "down.bias":
        return value.clone()
    return value.chunk(etps, 2 if name == "down.weight" else 1)[etp].clone()


@dataclass
class Result:
    """Outputs (n, h) of a rank and the gradients of everything."""

    y: Tensor
    dx: Tensor
    dweights: Tensor
    params: dict[str, Tensor]

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [self.y, self.dx, self.dweights, *self.params.values()]


def loop(ranks: list[Tokens]) -> tuple[list[Result], dict[str, Tensor]]:
    """Every token by itself through each of its experts: results by rank, and the parameters' whole gradients."""
    params = {name: value.requires_grad_() for name, value in parameters().items()}

    def expert(e: int, x: Tensor) -> Tensor:
        def project(name: str, z: Tensor) -> Tensor:
            return params[f"{name}.weight"][e] @ z + params[f"{name}.bias"][e]

        return project("down", F.silu(project("gate", x)) * project("up", x))

    results, total = [], torch.zeros((), dtype=torch.float64)
    leaves = []
    for tokens in ranks:
        x, weights = tokens.x.clone().requires_grad_(), tokens.weights.clone().requires_grad_()
        y = torch.zeros_like(x)
        for t in range(N):
            for k in range(K):
                if tokens.ids[t, k] >= 0:
                    y[t] = y[t] + weights[t, k] * expert(int(tokens.ids[t, k]), x[t])
        total = (
            total + (y * tokens.dy).sum() + 0 * sum(p.sum() for p in params.values()) + 0 * (x.sum() + weights.sum())
        )
        leaves.append((x, weights, y))
    total.backward()
    for x, weights, y in leaves:
        assert x.grad is not None and weights.grad is not None
        results.append(Result(y.detach(), x.grad, weights.grad, {}))
    return results, {name: p.grad for name, p in params.items() if p.grad is not None}
