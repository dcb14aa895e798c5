"""What the `memory` section demands of the rest of a job."""

from __future__ import annotations

from ..errors import Problem
from ..schema import Config


def validate_memory(config: Config) -> list[Problem]:
    """Every problem of the section, in the order of its keys."""
    wanted, sharding = config.memory.offload_activations, config.parallel.data.sharding
    key, problems = "memory.offload_activations", []
    if isinstance(wanted, float) and not 0 < wanted <= 1:
        problems.append(Problem(key, f"{wanted:g} is no share of the activations; set none, all, auto or 0 to 1"))
    if wanted != "none" and sharding == "fsdp":
        message = (
            "fsdp frees the gathered parameters that a forward pass saves, so activations cannot be kept elsewhere; "
            "set none, or parallel.data.sharding=zero1"
        )
        problems.append(Problem(key, message))
    group = config.memory.group
    if group is not None and group < 1:
        problems.append(Problem("memory.group", f"must be at least 1 layer, got {group}"))
    if group is not None and sharding == "fsdp":
        message = (
            f"{group}: fsdp gathers parameters around the whole model's forward pass, which part-stages do not have; "
            "leave it out, or set parallel.data.sharding=zero1"
        )
        problems.append(Problem("memory.group", message))
    return [*problems, *_optimizer(config)]


def _optimizer(config: Config) -> list[Problem]:
    memory, problems = config.memory, []
    if memory.optimizer_stride != "auto" and memory.optimizer_stride < 0:
        message = f"{memory.optimizer_stride} is no number of subgroups; set auto, 0 (all on the host) or more"
        problems.append(Problem("memory.optimizer_stride", message))
    if memory.optimizer_subgroup_mib <= 0:
        message = f"{memory.optimizer_subgroup_mib:g} MiB hold no subgroup; set more than 0, as 64"
        problems.append(Problem("memory.optimizer_subgroup_mib", message))
    return problems
