"""DeepSpeed's configuration of a job: from `parallel.data.deepspeed`, and from the user's own JSON, which is read
strictly. What both it and a key of ours decide must be the same; what ours alone decides it may leave to `auto`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import Problem, UserError, nearest
from ..fields import short, value_of
from ..schema import AdamWConfig, Config, SgdConfig
from ..strict_json import JsonError, expect_object, parse_json, read_bytes

SECTION = "parallel.data.deepspeed"
KEY = f"{SECTION}.config"
AUTO = "auto"
_DEFAULT_STAGE = 2
_MAX_BYTES = 1 << 20
_ZERO = "zero_optimization"
_OFFLOADS = ("offload_optimizer", "offload_param")

_PASSED_ON = (
    "communication_data_type", "comms_logger", "dump_state", "memory_breakdown", "steps_per_print",
    "wall_clock_breakdown",
)  # fmt: skip
"""What is DeepSpeed's own business."""
_PASSED_ON_ZERO = (
    "allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "ignore_unused_parameters",
    "max_live_parameters", "max_reuse_distance", "model_persistence_threshold", "overlap_comm",
    "param_persistence_threshold", "prefetch_bucket_size", "reduce_bucket_size", "reduce_scatter",
    "stage3_gather_16bit_weights_on_model_save", "stage3_max_live_parameters",
    "stage3_max_reuse_distance", "stage3_model_persistence_threshold", "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size", "sub_group_size",
)  # fmt: skip
_PASSED_ON_OFFLOAD = ("device", "pin_memory")
_WITHOUT_EFFECT = ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")
"""The update is ours, whatever they say."""
_INSTEAD = {
    "activation_checkpointing": "memory.recompute",
    "aio": "memory.offload_disk with parallel.data.sharding=zero1",
    "amp": "train.dtype=bf16",
    "checkpoint": "checkpoint.*",
    "csv_monitor": "log.*",
    "data_efficiency": "data.*",
    "elasticity": "any layout resumes any checkpoint: checkpoint.resume",
    "expert_parallel": "parallel.ep with parallel.data.sharding=zero1",
    "flops_profiler": "log.profile, log.modules",
    "gradient_predivide_factor": "gradients are sums here, divided once by the number of tokens",
    "pipeline": "parallel.pp with parallel.data.sharding=zero1",
    "prescale_gradients": "gradients are sums here, divided once by the number of tokens",
    "scheduler": "optim.schedule.*",
    "tensor_parallel": "parallel.tp",
    "tensorboard": "log.tensorboard",
    "wandb": "log.wandb",
}
"""What a section of theirs is here."""


def read_settings(config: Config) -> tuple[dict[str, Any], list[Problem]]:
    """The user's JSON, empty without one, and what is wrong with it by itself."""
    file = config.parallel.data.deepspeed.config
    if file is None or not os.path.exists(file):
        return {}, []  # which `check_files` says
    try:
        found = expect_object(parse_json(read_bytes(Path(file), max_bytes=_MAX_BYTES)), "the configuration")
        for section in (_ZERO, "bf16", "fp16", "optimizer", "scheduler"):
            expect_object(found.get(section, {}), section)
        for section in _OFFLOADS:
            expect_object(found.get(_ZERO, {}).get(section) or {}, f"{_ZERO}.{section}")
        expect_object(found.get("optimizer", {}).get("params", {}), "optimizer.params")
    except OSError as error:
        return {}, [Problem(KEY, f"{file} cannot be read: {error.strerror}")]
    except JsonError as error:
        return {}, [Problem(KEY, f"{file}: {error}")]
    return found, []


def zero_stage(config: Config) -> int:
    """The ZeRO stage."""
    wanted = config.parallel.data.deepspeed.stage
    found = read_settings(config)[0].get(_ZERO, {}).get("stage", AUTO)
    return wanted or (found if found in (1, 2, 3) else _DEFAULT_STAGE)


def zero_offload(config: Config) -> str:
    """What lies on the host: none, optimizer or all."""
    wanted, zero = config.parallel.data.deepspeed.offload, read_settings(config)[0].get(_ZERO, {})
    there = [(zero.get(each) or {}).get("device", "none") == "cpu" for each in _OFFLOADS]
    return wanted or ("all" if there[1] else "optimizer" if there[0] else "none")


def engine_config(config: Config) -> dict[str, Any]:
    """What DeepSpeed's engine is given.

    Raises:
        UserError: the user's JSON cannot be read.
    """
    found, problems = read_settings(config)
    if problems:
        raise UserError(*problems)
    stage, offload, width = zero_stage(config), zero_offload(config), 2 if config.train.dtype == "bf16" else 4
    bucket = max(1, int(config.parallel.data.bucket_mib * 2**20) // width // 2) * 2  # bf16 wants an even number
    given = {key: value for key, value in found.get(_ZERO, {}).items() if key in _PASSED_ON_ZERO and value != AUTO}
    zero = {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket, **given, "stage": stage}
    for section, there in zip(_OFFLOADS, (offload != "none", offload == "all"), strict=True):
        if there:
            zero[section] = {**(found.get(_ZERO, {}).get(section) or {}), "device": "cpu"}
    if config.model.moe.experts:
        # Between a router and its experts go no tensors that DeepSpeed would see: it gathers the whole part at once.
        zero["leaf_module"] = {"classes": [], "names": [], "name_suffixes": ["moe"]}
    passed = {key: found[key] for key in _PASSED_ON if found.get(key, AUTO) != AUTO}
    return {
        "communication_data_type": "fp32",
        **passed,
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        # Ours says which microbatch is a step's last one; DeepSpeed would divide by their number.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": config.train.dtype == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        **({"gradient_allreduce_op": "sum"} if stage < 3 else {}),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        _ZERO: zero,
    }


def json_problems(config: Config) -> list[Problem]:
    """What is wrong with the user's JSON, by itself and beside the keys of the job."""
    found, problems = read_settings(config)
    return [*problems, *_unknown(config, found), *_differing(config, found)]


def _unknown(config: Config, found: dict[str, Any]) -> Iterator[Problem]:
    """What is not passed on."""
    file, zero = config.parallel.data.deepspeed.config, found.get(_ZERO, {})
    known = {*_PASSED_ON, *_WITHOUT_EFFECT, *(path.partition(".")[0] for path, _, _ in _shared(config)), "fp16", _ZERO}
    for key, value in found.items():
        if key not in known and not _says_nothing(value):
            instead = _INSTEAD.get(key)
            hint = nearest(key, known)
            more = f"; here it is {instead}" if instead else f"; did you mean {hint}?" if hint else ""
            yield Problem(KEY, f"{file} has {key}, which is not passed on to DeepSpeed; leave it out{more}")
    known = ("stage", *_OFFLOADS, *_PASSED_ON_ZERO)
    inside = [(f"{_ZERO}.{key}", key in known or _says_nothing(value)) for key, value in zero.items()]
    for section in _OFFLOADS:
        inside += [(f"{_ZERO}.{section}.{key}", key in _PASSED_ON_OFFLOAD) for key in zero.get(section) or {}]
    for path, passed in inside:
        if not passed:
            yield Problem(KEY, f"{file} has {path}, which is not passed on to DeepSpeed; leave it out")
    for section in _OFFLOADS:
        device = (zero.get(section) or {}).get("device", "none")
        if device not in ("none", "cpu"):
            message = f"{file} has {_ZERO}.{section}.device={short(device)}, where checkpoints cannot reach; set cpu"
            yield Problem(KEY, message)


def _says_nothing(value: Any) -> bool:
    """Whether a section is switched off, or leaves everything to somebody else."""
    if isinstance(value, dict):
        return value.get("enabled") is False or all(k == "type" or _says_nothing(v) for k, v in value.items())
    return value in (AUTO, None, False)


def _differing(config: Config, found: dict[str, Any]) -> Iterator[Problem]:
    """What says something else than a key of the job."""
    file = config.parallel.data.deepspeed.config
    if (found.get("fp16") or {}).get("enabled", False) not in (False, AUTO):
        yield Problem(
            KEY, f"{file} has fp16.enabled, and there is no loss scaling; set train.dtype=bf16", ("train.dtype",)
        )
    for path, key, ours in _shared(config):
        theirs: Any = found
        for part in path.split("."):
            theirs = theirs.get(part, AUTO) if isinstance(theirs, dict) else AUTO
        theirs = theirs.lower() if isinstance(theirs, str) else theirs
        if (
            theirs in (AUTO, None)
            or theirs == ours
            or (path == "optimizer.type" and (theirs, ours) == ("adam", "adamw"))
        ):
            continue
        message = (
            f"{file} has {path}={short(theirs)}, but the job has {short(ours)}; set {key} to it, or leave it out there"
        )
        yield Problem(KEY, message, (key,))


def _shared(config: Config) -> list[tuple[str, str, Any]]:
    """(theirs, ours, its value) of what both may say."""
    t, optim, data = config.train, config.optim, config.parallel.data.deepspeed
    unit = t.micro_batch * (config.parallel.dp or 1)
    found: list[tuple[str, str, Any]] = [
        ("train_batch_size", "train.global_batch", t.global_batch),
        ("train_micro_batch_size_per_gpu", "train.micro_batch", t.micro_batch),
        ("gradient_accumulation_steps", "train.global_batch", t.global_batch // unit if unit > 0 else 0),
        ("gradient_clipping", "optim.clip", optim.clip),
        ("bf16.enabled", "train.dtype", t.dtype == "bf16"),
        ("optimizer.type", "optim.name", optim.name),
        ("optimizer.params.lr", "optim.lr", optim.lr),
        ("optimizer.params.weight_decay", "optim.weight_decay", value_of(config, "optim.weight_decay")),
    ]
    if isinstance(optim, AdamWConfig):
        found.append(("optimizer.params.betas", "optim.beta1", [optim.beta1, optim.beta2]))
        found.append(("optimizer.params.eps", "optim.eps", optim.eps))
    if isinstance(optim, SgdConfig):
        found.append(("optimizer.params.momentum", "optim.momentum", optim.momentum))
    if data.stage is not None:
        found.append((f"{_ZERO}.stage", f"{SECTION}.stage", data.stage))
    return found
