"""The devices of this machine, and what a job asks of them: looked at without torch as long as there are none."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ...configs.errors import Problem
from ...configs.schema import Config

_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


def visible_gpus() -> int:
    """How many GPUs this process could use."""
    if not any(Path(driver).exists() for driver in _DRIVERS):  # importing torch to be told "none" takes seconds
        return 0
    import torch

    return torch.cuda.device_count()


def has_apex() -> bool:
    """Whether NVIDIA apex is there, with the compiled part that the optimizer needs."""
    return all(importlib.util.find_spec(name) is not None for name in ("apex", "amp_C"))


def has_apex_norms() -> bool:
    """Whether NVIDIA apex is there, with the compiled part that norms need."""
    return all(importlib.util.find_spec(name) is not None for name in ("apex", "fused_layer_norm_cuda"))


def missing_devices(cfg: Config) -> list[Problem]:
    """What the job asks for and this machine, or what is installed on it, does not have.

    How many GPUs there are is not asked: a job may be started over several machines.
    """
    wants_apex = getattr(cfg.optim, "impl", "auto") == "apex"
    wants_deepep = cfg.model.moe.experts > 0 and cfg.model.moe.dispatcher == "deepep" and cfg.parallel.ep > 1
    wants_norms, wants_triton = cfg.model.norm_impl == "apex", cfg.train.kernels == "triton"
    if cfg.faults.recover and cfg.train.device == "auto" and visible_gpus():
        message = "true is for CPUs so far, and GPUs are visible; set train.device=cpu, or faults.recover=false"
        return [Problem("faults.recover", message, ("train.device",))]
    wants = wants_apex or wants_norms or wants_triton or wants_deepep
    if cfg.train.device == "cpu" or not (cfg.train.device == "cuda" or wants):
        return []
    problems = []
    gpus = visible_gpus()
    if not gpus and cfg.train.device == "cuda":
        problems.append(Problem("train.device", "cuda, and no GPU is visible here; set train.device=auto or cpu"))
    if wants_apex and not (gpus and has_apex()):
        what = "NVIDIA apex built with its CUDA extensions" if gpus else "a GPU, and none is visible here"
        problems.append(Problem("optim.impl", f"apex needs {what}; set optim.impl=fused"))
    if wants_norms and not (gpus and has_apex_norms()):
        what = "NVIDIA apex built with its CUDA extensions" if gpus else "a GPU, and none is visible here"
        problems.append(Problem("model.norm_impl", f"apex needs {what}; set model.norm_impl=torch"))
    if wants_triton and not (gpus and importlib.util.find_spec("triton") is not None):
        what = "the package triton" if gpus else "a GPU, and none is visible here"
        problems.append(Problem("train.kernels", f"triton needs {what}; set train.kernels=torch"))
    if wants_deepep and not (gpus and importlib.util.find_spec("deep_ep") is not None):
        what = "the package deep_ep" if gpus else "CUDA devices, and none is visible here"
        problems.append(Problem("model.moe.dispatcher", f"deepep needs {what}; set all_to_all"))
    return problems
