"""What the `memory` section demands of the rest of a job."""

from __future__ import annotations

from math import inf

from ..errors import Problem, nearest
from ..reading.hints import meant
from ..schema import CODED_STATES, AdamWConfig, Config
from ..tables.layer_parts import FOREIGN_PARTS, LAYER_PARTS, TOKEN_WISE


def validate_memory(config: Config) -> list[Problem]:
    """Every problem of the section, in the order of its keys."""
    wanted, sharding = config.memory.offload_activations, config.parallel.data.sharding
    key, problems = "memory.offload_activations", _parts(config) if config.memory.recompute == "selective" else []
    problems += _token_share(config) if config.memory.recompute in ("selective", "auto") else []
    if config.memory.recompute == "auto" and config.hardware.memory_gib is None:
        message = "auto, but the memory of a device is not known; set hardware.memory_gib or hardware.preset"
        problems.append(Problem("memory.recompute", message, ("hardware.memory_gib",)))
    if isinstance(wanted, float) and not 0 < wanted <= 1:
        problems.append(Problem(key, f"{wanted:g} is no share of the activations; set none, all, auto or 0 to 1"))
    if wanted != "none" and sharding == "fsdp2":
        message = (
            "fsdp2 frees the gathered parameters that a forward pass saves, so activations cannot be kept elsewhere; "
            "set none, or parallel.data.sharding=zero1"
        )
        problems.append(Problem(key, message))
    group = config.memory.group
    if group is not None and group < 1:
        problems.append(Problem("memory.group", f"must be at least 1 layer, got {group}"))
    if group is not None and sharding == "fsdp2":
        message = (
            f"{group}: fsdp2 gathers parameters around the whole model's forward pass, which part-stages do not have; "
            "leave it out, or set parallel.data.sharding=zero1"
        )
        problems.append(Problem("memory.group", message))
    return [*problems, *_optimizer(config)]


def _optimizer(config: Config) -> list[Problem]:
    memory, problems = config.memory, []
    if memory.optimizer_stride != "auto" and memory.optimizer_stride < 0:
        message = f"{memory.optimizer_stride} is no number of subgroups; set auto, 0 (all on the host) or more"
        problems.append(Problem("memory.optimizer_stride", message))
    if memory.offload_optimizer == "auto" and config.hardware.memory_gib is None:
        message = "auto, but the memory of a device is not known; set hardware.memory_gib, hardware.preset, or host"
        problems.append(Problem("memory.offload_optimizer", message, ("hardware.memory_gib",)))
    if memory.offload_optimizer == "disk" and memory.offload_disk is None:
        message = "memory.offload_optimizer=disk needs a folder on a disk of the node; set memory.offload_disk"
        problems.append(Problem("memory.offload_disk", message, ("memory.offload_optimizer",)))
    if not 0 < memory.optimizer_subgroup_mib < inf:
        message = f"{memory.optimizer_subgroup_mib:g} MiB are no size of a subgroup; set more than 0, as 64"
        problems.append(Problem("memory.optimizer_subgroup_mib", message))
    return [*problems, *_states(config)]


def _states(config: Config) -> list[Problem]:
    optim, problems = config.optim, []
    if not isinstance(optim, AdamWConfig):
        return problems
    if optim.states_above < 0:
        problems.append(Problem("optim.states_above", f"{optim.states_above} is no number of elements; set 0 or more"))
    if optim.states not in CODED_STATES:
        return problems
    if config.parallel.data.sharding == "fsdp2":
        message = (
            f"{optim.states} needs rows and columns of whole parameters, which fsdp2 does not tell of; set bf16, or "
        )
        problems.append(Problem("optim.states", message + "parallel.data.sharding=zero1"))
    if config.memory.offload_optimizer != "none":
        message = f"{optim.states} moments stay on the device; set memory.offload_optimizer=none, or optim.states=bf16"
        problems.append(Problem("optim.states", message))
    return problems


def _parts(config: Config) -> list[Problem]:
    """What is wrong with the parts that are to be made again."""
    key, parts = "memory.recompute_parts", config.memory.recompute_parts
    if not parts:
        return [Problem(key, f"is empty; set some of {', '.join(LAYER_PARTS)}, or memory.recompute=none")]
    problems = [Problem(key, _unknown(part)) for part in parts if part not in LAYER_PARTS]
    m = config.model
    if "latent" in parts and not m.mla.kv_rank:
        message = "latent, but the model has no latent attention (model.mla.kv_rank=0); leave it out"
        problems.append(Problem(key, message, ("model.mla.kv_rank",)))
    if "moe" in parts and not m.moe.experts:
        message = "moe, but the model has no experts (model.moe.experts=0); leave it out"
        problems.append(Problem(key, message, ("model.moe.experts",)))
    return problems


def _token_share(config: Config) -> list[Problem]:
    """What is wrong with the share of tokens of which parts are kept."""
    memory, key = config.memory, "memory.token_share"
    share, parts = memory.token_share, memory.recompute_parts
    if share == "none":
        return []
    if isinstance(share, float) and not 0 < share < 1:
        instead = "memory.recompute=none keeps everything" if share == 1 else "none keeps nothing of what is made again"
        return [Problem(key, f"{share:g} is no share between 0 and 1; set one as 0.5, or auto ({instead})")]
    problems = []
    if memory.recompute == "selective" and parts and {*parts} <= {*LAYER_PARTS} - TOKEN_WISE:
        message = (
            f"{share}, but the rows of {' and '.join(parts)} are in the order of experts, not of tokens, and "
            f"all made again; leave it out, or add some of {', '.join(p for p in LAYER_PARTS if p in TOKEN_WISE)} to "
            "memory.recompute_parts"
        )
        problems.append(Problem(key, message, ("memory.recompute_parts",)))
    unknown = config.hardware.memory_gib is None and memory.recompute == "selective"
    if share == "auto" and unknown and memory.offload_activations == "none":
        message = "auto, but the memory of a device is not known; set hardware.memory_gib, hardware.preset or a share"
        problems.append(Problem(key, message, ("hardware.memory_gib",)))
    return problems


def _unknown(part: str) -> str:
    if part in ("head", "core_attn", "attention_core"):
        kept = {"head": "the head keeps no logits, only the gradient that it makes in its forward pass"}.get(
            part, "attention's core keeps its output and log-sum-exp, and makes its scores again in any case"
        )
        return f"{part}: {kept}; leave it out"
    near = FOREIGN_PARTS.get(part) or nearest(part, LAYER_PARTS)
    return f"{part} is no part of a layer that can be made again; one of {', '.join(LAYER_PARTS)}{meant(near)}"
