"""Where DeepSpeed's engine has this rank's masters and reduced gradients.

ZeRO 1 and 2 flatten all parameters of a group and cut the whole into a piece per rank; a parameter knows its part of
this rank's piece (`_hp_mapping`). bf16 with ZeRO 1 has an engine of its own, whose gradients every rank has whole.
ZeRO 3 cuts each parameter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class HeldPart:
    """Elements [start, start + n) of a parameter that this rank updates.

    Args:
        start: the first.
        flat: the tensor that DeepSpeed gives to the optimizer.
        at: where in it.
        value: the masters (n,), a view of it.
    """

    start: int
    flat: Tensor
    at: int
    value: Tensor


def held_part(optimizer: Any, param: nn.Parameter) -> HeldPart | None:
    """This rank's part of a parameter; none: it has none.

    Args:
        optimizer: of the engine.
        param: of the model.
    """
    if hasattr(param, "ds_id"):
        group, at, size = optimizer.grad_position[optimizer.get_param_id(param)]
        whole = int(param.ds_numel)  # pyright: ignore[reportAttributeAccessIssue]
        start = min(_rank(param) * size, whole)
        count = min(size, whole - start)
        flat = optimizer.fp32_partitioned_groups_flat[group]
        return HeldPart(start, flat, at, flat.detach()[at : at + count]) if count else None
    mapping: Any = param._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
    if mapping is None:
        return None
    group = mapping.param_group_index
    held = getattr(optimizer, "single_partition_of_fp32_groups", None)
    flat = (optimizer.fp32_groups_flat_partition if held is None else held)[group]
    return HeldPart(
        mapping.lp_fragment_address.start, flat, mapping.hp_fragment_address.start, mapping.hp_fragment.detach()
    )


def gradient_of(optimizer: Any, param: nn.Parameter, count: int) -> Tensor:
    """The reduced gradient (count,) of this rank's part of a parameter, in place; (0,) between steps."""
    none = torch.empty(0)
    if hasattr(param, "ds_id"):
        group, at, _ = optimizer.grad_position[optimizer.get_param_id(param)]
        if optimizer.offload_optimizer:
            grad = optimizer.fp32_partitioned_groups_flat[group].grad
            return none if grad is None else grad.detach()[at : at + count]
        if not optimizer.averaged_gradients.get(group):
            return none
        return optimizer._get_fp32_grad_state_partition(param, False)[0].detach().view(-1)[:count]
    mapping: Any = param._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
    held = mapping.offload_gradient_dict if mapping.use_offload else mapping.gradient_dict
    if not held or held.get(mapping.param_group_index) is None:
        return none
    grad = held[mapping.param_group_index][param._index_in_param_group].detach().view(-1)  # pyright: ignore[reportAttributeAccessIssue]
    if grad.numel() != count:  # bf16 with ZeRO 1: the whole parameter's
        grad = grad[mapping.lp_fragment_address.start :][:count]
    return grad


def _rank(param: nn.Parameter) -> int:
    return torch.distributed.get_rank(param.ds_process_group)  # pyright: ignore[reportAttributeAccessIssue]


def follow_masters(optimizer: Any) -> None:
    """Makes the model's parameters, on all ranks, those of the masters."""
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.update_lp_params()
        return
    with torch.no_grad():
        optimizer._partition_all_parameters()  # as in its step: small ones are whole, and would stay what they are
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
