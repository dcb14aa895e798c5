"""Whether a GPU multiplies in 8 bits as it should: known before the first step."""

from __future__ import annotations

import torch

from ...configs.errors import Problem, UserError
from ...models.linear import Linear
from ...models.parallelize import GATES
from ...models.transformer import Transformer
from ...parallel.comm.axis import Axis
from ...parallel.fp8 import fp8_products

_WAY_OUT = "set train.fp8=none"


def check_fp8(scaling: str, model: Transformer, device: torch.device, dtype: torch.dtype) -> None:
    """Compares the products of a GPU with those of a CPU on small matrices; on a CPU there is nothing to check.

    Raises:
        UserError: the GPU, or its libraries, cannot do what `train.fp8` says, or not with the model's sizes.
    """
    if device.type != "cuda":
        return
    if dtype != torch.bfloat16:
        raise UserError(Problem("train.fp8", f"is for bf16 on a GPU; {_WAY_OUT}"))
    for name, linear in model.named_modules():
        if isinstance(linear, Linear) and not name.endswith(GATES) and any(side % 16 for side in linear.weight.shape):
            shape = " × ".join(map(str, linear.weight.shape))
            raise UserError(Problem("train.fp8", f"{name} is {shape}, of no multiples of 16; {_WAY_OUT}"))
    try:
        difference = _difference(scaling, device)
    except RuntimeError as error:  # of torch, when there is no such product
        message = f"{scaling} does not run on {torch.cuda.get_device_name(device)} ({str(error).partition(chr(10))[0]})"
        raise UserError(Problem("train.fp8", f"{message}; {_WAY_OUT}")) from error
    if not difference < 0.01:
        raise UserError(Problem("train.fp8", f"{scaling} is wrong on this GPU by {difference:.2g}; {_WAY_OUT}"))


def _difference(scaling: str, device: torch.device) -> float:
    """The largest difference of a projection's results and gradients between device and CPU, over their largest."""
    generator = torch.Generator().manual_seed(0)
    x, weight, dy = (
        torch.randn(shape, generator=generator).bfloat16() for shape in ((256, 384), (512, 384), (256, 512))
    )
    products, found = fp8_products(scaling, Axis.single("tokens")), []
    for where in (device, torch.device("cpu")):
        a, b, c = (each.to(where) for each in (x, weight, dy))
        (y,), told = products.forward(a, [b], [None], None)
        dx, dys = products.backward([c], [b], None, told, True)
        (dw,) = products.weight_gradients([b], dys, a, told)
        found.append([each.double().cpu() for each in (y, dx, dw) if each is not None])
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True))
