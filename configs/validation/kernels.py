"""Checks of the ways in which something is computed: what each can do, for types, sizes and devices. No torch.

The running job asks the same functions, with the sizes that it has at hand. What depends on the machine, its devices
and its packages, `trainer.devices.visible` looks at.
"""

from __future__ import annotations

from ..errors import Problem
from ..schema import Config
from ..schema_model import MoeConfig

_COMPUTE, _DISPATCHER = "model.moe.compute", "model.moe.dispatcher"
_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
_GROUPED_BYTES = 16
"""grouped_mm wants the rows of its operands to be multiples of so many bytes."""


def validate_kernels(config: Config) -> list[Problem]:
    """Every problem of the resolved sections that follows from the values alone."""
    problems = [*_apex(config), *_norms(config), *_triton(config)]
    moe, p = config.model.moe, config.parallel
    # Sizes that are not whole are other checks' problems.
    if moe.experts < 1 or min(p.ep, p.etp, p.tp, p.cp) < 1 or moe.experts % p.ep or moe.ffn < 1:
        return problems
    return [*problems, *_experts(config), *_deepep(config)]


def grouped_mm_problem(dtype: str, out: int, inner: int) -> Problem | None:
    """Why grouped_mm cannot multiply by matrices (out, inner) of a type (`train.dtype`), if it cannot."""
    if dtype == "fp64":
        message = "grouped_mm has no fp64: set it to loop or auto, or set train.dtype to fp32"
        return Problem(_COMPUTE, message, ("train.dtype",))
    step = _GROUPED_BYTES // _BYTES[dtype]
    if out % step == 0 and inner % step == 0:
        return None
    message = (
        f"grouped_mm needs widths that are multiples of {step} in this precision, the experts' matrices are"
        f" {out} × {inner}: set it to loop or auto, or change model.hidden or model.moe.ffn"
    )
    return Problem(_COMPUTE, message, ("model.hidden", "model.ffn", "model.moe.ffn", "parallel.etp", "train.dtype"))


def bmm_problem(rows: str) -> Problem:
    """Experts have unequal numbers of rows."""
    message = (
        f"bmm needs equally many rows for every expert, {rows}: set it to auto, or set model.moe.pad and"
        " model.moe.capacity_factor"
    )
    return Problem(_COMPUTE, message, ("model.moe.pad", "model.moe.capacity_factor", "model.moe.router.name"))


def deepep_problem(dtype: str, etp: int) -> Problem | None:
    """Why DeepEP cannot carry tokens of a type, if it cannot."""
    if etp > 1:
        return Problem(_DISPATCHER, f"deepep needs parallel.etp=1, got {etp}; set all_to_all", ("parallel.etp",))
    if dtype != "bf16":
        message = f"deepep moves bfloat16, the model has {dtype}; set train.dtype=bf16"
        return Problem(_DISPATCHER, message, ("train.dtype",))
    return None


def _experts(config: Config) -> list[Problem]:
    model, p = config.model, config.parallel
    moe = model.moe
    if moe.compute == "grouped_mm":
        problem = grouped_mm_problem(config.train.dtype, moe.ffn // p.etp, model.hidden)
        return [] if problem is None else [problem]
    if moe.compute == "bmm" and not _rows_are_equal(config):
        return [bmm_problem(_why_unequal(moe, p.ep))]
    return []


def _rows_are_equal(config: Config) -> bool:
    """Whether all experts of a rank get equally many rows, whatever the tokens are."""
    moe, p = config.model.moe, config.parallel
    if moe.experts == p.ep:
        return True  # one expert on each rank
    if moe.dispatcher == "deepep" and p.ep > 1:
        return False  # DeepEP has no padding, and neither have its ranks whole microbatches
    if moe.router.name == "expert_choice":
        # Each expert takes its share of a microbatch, all of which has to meet on its ranks at once.
        whole = p.ep * p.etp % (p.tp * p.cp) == 0
        return whole and (moe.overlap_chunks == 1 or moe.dispatcher != "all_to_all")
    return moe.pad and moe.dispatcher != "all_gather"


def _why_unequal(moe: MoeConfig, ep: int) -> str:
    if moe.router.name == "expert_choice":
        return "and so do experts that choose only where one dispatch carries a whole microbatch"
    if moe.pad:
        return f"and {_DISPATCHER}={moe.dispatcher} does not pad (all_to_all does)"
    return f"and a rank's {moe.experts // ep} of {_DISPATCHER}={moe.dispatcher} without model.moe.pad differ"


def _deepep(config: Config) -> list[Problem]:
    """Where a rank has all experts, nothing is carried."""
    train, moe = config.train, config.model.moe
    if moe.dispatcher != "deepep" or config.parallel.ep == 1:
        return []
    problem = deepep_problem(train.dtype, config.parallel.etp)
    if problem is None and train.device == "cpu":
        message = "deepep needs CUDA devices, and train.device=cpu; set all_to_all"
        problem = Problem(_DISPATCHER, message, ("train.device",))
    return [] if problem is None else [problem]


def _apex(config: Config) -> list[Problem]:
    if getattr(config.optim, "impl", "auto") != "apex":
        return []
    if config.train.device == "cpu":
        message = "apex has kernels for GPUs only, and train.device=cpu; set optim.impl=fused"
        return [Problem("optim.impl", message, ("train.device",))]
    if config.train.dtype == "fp64":
        message = "apex computes in fp32, and train.dtype=fp64; set optim.impl=fused"
        return [Problem("optim.impl", message, ("train.dtype",))]
    return []


def _triton(config: Config) -> list[Problem]:
    if config.train.kernels != "triton":
        return []
    if config.train.device == "cpu":
        message = "Triton's kernels are for GPUs, and train.device=cpu; set train.kernels=torch"
        return [Problem("train.kernels", message, ("train.device",))]
    if config.train.dtype != "bf16":
        message = f"Triton's kernels are for bf16, and train.dtype={config.train.dtype}; set train.kernels=torch"
        return [Problem("train.kernels", message, ("train.dtype",))]
    return []


def _norms(config: Config) -> list[Problem]:
    if config.model.norm_impl != "apex" or config.train.device != "cpu":
        return []
    message = "apex has kernels for GPUs only, and train.device=cpu; set model.norm_impl=torch"
    return [Problem("model.norm_impl", message, ("train.device",))]
