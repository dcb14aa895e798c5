"""Which kernels a model's elementwise parts get, torch's, apex's or Triton's, through the seams that models have."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from ...configs.errors import Problem, UserError
from ...configs.schema import Config
from ...models import functional
from ...models.attention import Attention
from ...models.feed_forward import FeedForward
from ...models.mla import LatentAttention
from ...models.moe import Experts, Moe
from ...models.norms import LayerNorm, RmsNorm
from ...models.routing.router import RouterKernels
from ...models.transformer import Transformer
from ...parallel.expert.routing import RouteForm
from ...parallel.expert.row_kernels import RowKernels
from ...parallel.kernels.fused_norms import apex_norms
from ...parallel.vocab import VocabHead, VocabShard, cross_entropy, fused_cross_entropy
from ..metrics.notices import warn
from .visible import has_apex_norms

_WAY_OUT = "set train.kernels=torch"


def use_kernels(cfg: Config, model: Transformer, device: torch.device, dtype: torch.dtype) -> None:
    """Gives the model's norms, gates, rotations and head the kernels that `train.kernels` and `model.norm_impl` name.

    Raises:
        UserError: they are not there, or do not compute what they should.
    """
    triton = uses_triton(cfg, device)
    if triton:
        problem = triton_problem(device)
        if problem is None:
            _use_triton(model)
        elif cfg.train.kernels == "auto":
            triton = False
            warn(f"{problem}: torch's kernels are used; {_WAY_OUT} says that this is meant")
        else:
            raise UserError(Problem("train.kernels", f"{problem}; {_WAY_OUT}"))
    if _uses_apex(cfg, device, triton):
        _use_apex(model, device, dtype)


def uses_triton(cfg: Config, device: torch.device) -> bool:
    """Whether the model's elementwise parts are computed by kernels in Triton.

    Raises:
        UserError: they are asked for, and Triton is not installed.
    """
    wanted, there = cfg.train.kernels, importlib.util.find_spec("triton") is not None
    if wanted == "triton" and not there:
        raise UserError(Problem("train.kernels", f"Triton is not installed; {_WAY_OUT}"))
    if wanted == "auto":
        return device.type == "cuda" and cfg.train.dtype == "bf16" and there
    return wanted == "triton"


def _uses_apex(cfg: Config, device: torch.device, triton: bool) -> bool:
    wanted = cfg.model.norm_impl
    if wanted == "auto":
        return device.type == "cuda" and has_apex_norms() and not (triton and cfg.model.norm == "rms")
    return wanted == "apex"


def _use_apex(model: Transformer, device: torch.device, dtype: torch.dtype) -> None:
    if not has_apex_norms():
        raise UserError(Problem("model.norm_impl", "apex is not installed with its CUDA extensions; set torch"))
    kernels = apex_norms(device, dtype)
    for module in model.modules():
        if isinstance(module, RmsNorm):
            module.kernel = kernels.rms
        elif isinstance(module, LayerNorm):
            module.kernel = kernels.layer


def _use_triton(model: Transformer) -> None:
    from ...parallel.kernels.triton.counting_sort import triton_sort_by_expert
    from ...parallel.kernels.triton.gates import triton_swiglu
    from ...parallel.kernels.triton.norms import triton_rms_norm
    from ...parallel.kernels.triton.rotary import triton_rotate
    from ...parallel.kernels.triton.routing import triton_route, triton_route_settle, triton_route_totals
    from ...parallel.kernels.triton.rows import triton_combine, triton_spread

    rows = RowKernels(triton_spread, triton_combine, triton_sort_by_expert)
    router = RouterKernels(triton_route, triton_route_totals, triton_route_settle)
    for module in model.modules():
        if isinstance(module, RmsNorm):
            module.kernel = triton_rms_norm
        elif isinstance(module, (FeedForward, Experts)) and module.activation is functional.swiglu:
            module.activation = triton_swiglu
        elif isinstance(module, (Attention, LatentAttention)):
            module.rotate = triton_rotate
        elif isinstance(module, Moe):
            module.dispatch.rows, module.router.kernels = rows, router
    if isinstance(model.head_op, VocabHead):
        model.head_op.cross_entropy = fused_cross_entropy


def triton_problem(device: torch.device) -> str | None:
    """What is wrong with Triton's kernels there, compared with torch's in fp64 on a few rows; none: nothing.

    A kernel that cannot be compiled, or is slightly wrong, is better known before the first step.
    """
    try:
        found = _differences(device)
    except Exception as error:  # of Triton, its compiler or the driver: any kind
        return f"Triton's kernels do not run on {device} ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    worst = max(found, key=lambda name: found[name])
    return None if found[worst] < 0.02 else f"Triton's kernel of {worst} is wrong on {device} by {found[worst]:.2g}"


def _differences(device: torch.device) -> dict[str, float]:
    """By kernel: the largest difference of its results and gradients, relative to the largest value."""
    from ...parallel.kernels.triton.gates import triton_swiglu
    from ...parallel.kernels.triton.norms import triton_rms_norm
    from ...parallel.kernels.triton.rotary import triton_rotate

    draws = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws).to(torch.bfloat16).to(device)

    x, weight, heads = make(6, 96), make(96), make(2, 5, 3, 32)
    angle = torch.randn(1, 5, 1, 16, generator=draws).to(device)
    cos, sin = angle.cos(), angle.sin()
    pairs = {
        "RMSNorm": (triton_rms_norm, functional.rms_norm, (x, weight), (1e-5,)),
        "SwiGLU": (triton_swiglu, functional.swiglu, (x, make(6, 96)), ()),
        "rotary embedding": (triton_rotate, functional.rotate, (heads,), (cos, sin)),
    }
    found = {}
    for name, (ours, theirs, given, rest) in pairs.items():
        results = []
        for function, dtype in ((ours, torch.bfloat16), (theirs, torch.float64)):
            inputs = [each.detach().to(dtype).requires_grad_() for each in given]
            more = [each.to(dtype) if isinstance(each, Tensor) and dtype == torch.float64 else each for each in rest]
            y = function(*inputs, *more)
            results.append([y.detach(), *torch.autograd.grad(y, inputs, y.detach())])
        found[name] = _worst(*results)
    found["rows of experts"] = _rows_difference(device, make(40, 96))
    found["router"] = _router_difference(make(40, 12).float())
    logits, labels = make(7, 130), torch.tensor([0, 129, 5, -1, 64, 7, 99], device=device)
    shard = VocabShard.whole(130)
    ours = fused_cross_entropy(logits.clone(), labels, 0.25, shard, True)
    theirs = cross_entropy(logits.double(), labels, 0.25, shard, True)
    found["cross-entropy"] = _worst(ours, theirs)
    return found


def _rows_difference(device: torch.device, x: Tensor) -> float:
    """Of tokens (n, h) that go to two experts each and come back, some of them to none."""
    from ...parallel.kernels.triton.counting_sort import triton_sort_by_expert
    from ...parallel.kernels.triton.rows import triton_combine, triton_spread

    ids = torch.randint(-1, 5, (len(x), 2), generator=torch.Generator().manual_seed(1)).to(device)
    results = []
    for kernels, dtype in (
        (RowKernels(triton_spread, triton_combine, triton_sort_by_expert), x.dtype),
        (RowKernels(), torch.float64),
    ):
        order, places, ends = kernels.sort(ids, 5)
        inputs = [
            x.to(dtype).requires_grad_(),
            (ids + 2).to(torch.promote_types(dtype, torch.float32)).requires_grad_(),
        ]
        rows = kernels.spread(inputs[0], order // 2, places)
        y = kernels.combine(rows * rows, places, inputs[1])
        results.append([order, places, ends, y.detach(), *torch.autograd.grad(y, inputs, x.to(dtype))])
    return _worst(*results)


def _router_difference(logits: Tensor) -> float:
    """Of weights of logits (n, C), their gradient with that of the losses, and what is counted."""
    from ...parallel.kernels.triton.routing import triton_route, triton_route_settle, triton_route_totals

    (n, size), choices = logits.shape, logits.topk(3, -1).indices
    tally, loads = logits.new_zeros(8 + size, dtype=torch.float64), logits.new_empty(size)
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    weights, partial = triton_route(ours, choices, loads, None, RouteForm(True, True, 1.0, aux=0.1, z=0.01))
    totals = triton_route_totals(partial)
    triton_route_settle(totals, totals[:size], loads, tally, n, 1.0, 1.0)
    expected = torch.softmax(theirs.gather(-1, choices), -1)
    z = torch.logsumexp(theirs, -1).square().sum()
    counts = torch.zeros_like(theirs).scatter_(-1, choices, 1.0).sum(0).detach()
    balance = (torch.softmax(theirs, -1).sum(0) * (counts / counts.sum())).sum()
    grads = torch.autograd.grad(weights, ours, weights.detach())
    (grad,) = torch.autograd.grad((expected, 0.1 * balance + 0.01 * z), theirs, (expected.detach(), torch.ones_like(z)))
    sums = torch.stack((balance, z)).detach()
    return _worst([weights.detach(), *grads, tally[6:8]], [expected.detach(), grad, sums])


def _worst(ours: object, theirs: object) -> float:
    assert isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple))
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))
