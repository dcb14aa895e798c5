"""Every configuration section, as frozen dataclasses.

The string under a field documents it: `pentad show --keys` prints it with the field's type and default, so it names
the unit and what the default does. `Derived` keys may be left out: `resolve` in `resolve.py` fills them in, and
nothing after loading meets one without a value. Where a `None` is the value, the docstring says what it means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import Problem
from .schema_data import (
    DATASETS,
    BinData,
    BlendData,
    DataConfig,
    JsonlData,
    ParquetData,
    StdlibData,
    TextData,
    TokenizerConfig,
)
from .schema_model import LinearAttentionConfig, MlaConfig, ModelConfig, MoeConfig, RopeConfig, RouterConfig
from .schema_parallel import (
    ContextConfig,
    DataParallelConfig,
    DeepSpeedConfig,
    FaultsConfig,
    MemoryConfig,
    NumericsConfig,
    ParallelConfig,
    PipelineConfig,
    TensorConfig,
)
from .tables.derived import DERIVED, Derived

__all__ = [
    "DATASETS",
    "OPTIMIZERS",
    "SCHEDULES",
    "AdamWConfig",
    "BinData",
    "BlendData",
    "CheckpointConfig",
    "Config",
    "ConstantSchedule",
    "ContextConfig",
    "CosineSchedule",
    "DataConfig",
    "DataParallelConfig",
    "DeepSpeedConfig",
    "EvalConfig",
    "FaultsConfig",
    "HardwareConfig",
    "JsonlData",
    "LinearAttentionConfig",
    "LinearSchedule",
    "LogConfig",
    "MemoryConfig",
    "MlaConfig",
    "ModelConfig",
    "MoeConfig",
    "NumericsConfig",
    "OptimConfig",
    "Origin",
    "ParallelConfig",
    "ParquetData",
    "PipelineConfig",
    "RopeConfig",
    "RouterConfig",
    "ScheduleConfig",
    "SgdConfig",
    "StdlibData",
    "TensorConfig",
    "TextData",
    "TokenizerConfig",
    "TrainConfig",
    "WsdSchedule",
]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The length, shape and numbers of the run."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    global_batch: int = 8
    """Sequences per optimizer step, over all ranks."""
    micro_batch: int = 1
    """Sequences per forward pass of one rank."""
    seq_len: int = 512
    """Tokens per sequence."""
    seed: int = 0
    """Seed of initialisation, data order and dropout."""
    dtype: Literal["bf16", "fp32", "fp64"] = "bf16"
    """bf16: bf16 parameters with fp32 masters, states and gradient sums; fp32 and fp64: everything in that type."""
    deterministic: bool | Literal["elastic"] = False
    """true: only deterministic kernels; the same run twice is then equal bit for bit. elastic: at any parallel.dp, too;
    16 bytes more for every gradient, and four times as many of them on their way (docs/data_parallel.md)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Of RMSNorm, SwiGLU, rotary embedding and cross-entropy in bf16. auto: Triton's on a GPU where Triton is there,
    torch's elsewhere."""
    fp8: Literal["none", "tensor", "row", "block"] = "none"
    """Products of linears in 8 bits, with a scale for each tensor, each row, or blocks of 128 (docs/fp8.md); on a CPU
    the same numbers, emulated."""


@dataclass(frozen=True, kw_only=True)
class ConstantSchedule:
    """Learning rate constant after the warm-up."""

    name: Literal["constant"] = "constant"
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""


@dataclass(frozen=True, kw_only=True)
class LinearSchedule(ConstantSchedule):
    """Linear decay, which would reach min_ratio · lr one step after the last."""

    name: Literal["linear"] = "linear"
    min_ratio: float = 0.0
    """Learning rate that the decay goes to, one step after the last, as a fraction of optim.lr."""


@dataclass(frozen=True, kw_only=True)
class CosineSchedule(ConstantSchedule):
    """Half a cosine, which would reach min_ratio · lr one step after the last."""

    name: Literal["cosine"] = "cosine"
    min_ratio: float = 0.1
    """Learning rate that the decay goes to, one step after the last, as a fraction of optim.lr."""


@dataclass(frozen=True, kw_only=True)
class WsdSchedule(ConstantSchedule):
    """Warm-up, stable, decay: constant until decay_steps before the end, then linear, towards min_ratio · lr."""

    name: Literal["wsd"] = "wsd"
    decay_steps: int = 100
    """Steps of the final decay."""
    min_ratio: float = 0.0
    """Learning rate that the decay goes to, one step after the last, as a fraction of optim.lr."""


ScheduleConfig = ConstantSchedule
SCHEDULES: dict[str, type] = {
    kind.name: kind for kind in (ConstantSchedule, LinearSchedule, CosineSchedule, WsdSchedule)
}
"""By the name that optim.schedule.name selects."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """What every optimizer has."""

    name: str
    lr: float = 3e-4
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; vectors (norms, biases) have none."""
    clip: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    schedule: ConstantSchedule = field(default_factory=CosineSchedule)
    """Learning rate over the steps."""


@dataclass(frozen=True, kw_only=True)
class AdamWConfig(OptimConfig):
    """AdamW (Loshchilov and Hutter, 2019)."""

    name: Literal["adamw"] = "adamw"
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    impl: Literal["auto", "fused", "foreach", "apex"] = "auto"
    """auto: apex's kernel, checked at the start, where it is installed and there is a GPU; else torch's fused one."""
    states: Literal["fp32", "bf16", "int8", "int4"] = "fp32"
    """How moments are kept: fp32 (fp64 where parameters are), bf16, or in codes of 8 or 4 bits with scales."""
    states_above: int = 4096
    """optim.states=int8, int4: elements of a matrix above which its moments are coded; vectors never are."""


@dataclass(frozen=True, kw_only=True)
class SgdConfig(OptimConfig):
    """Plain stochastic gradient descent."""

    name: Literal["sgd"] = "sgd"
    momentum: float = 0.0
    """Momentum; 0 keeps no state."""


CODED_STATES = ("int8", "int4")
"""The values of optim.states that are codes with scales."""
OPTIMIZERS: dict[str, type] = {kind.name: kind for kind in (AdamWConfig, SgdConfig)}
"""By the name that optim.name selects."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on the held-out split."""

    every: int = 0
    """Steps between evaluations; 0: none."""
    steps: int = 4
    """Global batches per evaluation."""
    prompts: tuple[str, ...] = ()
    """Texts that every evaluation continues with the likeliest tokens: on the console, in events.jsonl and trackers."""
    prompt_tokens: int = 32
    """Tokens after each prompt, at most; each costs a forward pass over train.micro_batch sequences."""


@dataclass(frozen=True, kw_only=True)
class LocalCheckpointConfig:
    """Checkpoints that each node keeps of its own ranks, beside those that all see."""

    dir: str | None = None
    """Folder in memory or on a disk of the node, such as /dev/shm/pentad; none: there are no such checkpoints."""
    every: int = 0
    """Steps between them."""
    keep: int = 1
    """Newest ones kept."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and resuming."""

    every: int = 0
    """Steps between checkpoints; 0: only the one at the end."""
    keep: int = 2
    """Newest checkpoints kept; 0: all."""
    keep_every: int = 0
    """Those of steps that are multiples of it are kept for ever; 0: none for this reason."""
    keep_best: int = 0
    """How many of those with the lowest held-out loss after their own step are kept, too."""
    dir: Derived[str] = DERIVED
    """Folder of the checkpoints; derived: RUN/checkpoints."""
    resume: str | None = None
    """`latest` (start afresh if there is none) or the path of one checkpoint."""
    init: str | None = None
    """Weights only, at step 0, from a checkpoint or a Hugging Face folder."""
    upcycle: bool = False
    """checkpoint.init holds the dense model: the experts start as parts of its feed-forward networks."""
    asynchronous: bool = True
    """Write in the background, training on."""
    final: bool = True
    """Save after the last step."""
    local: LocalCheckpointConfig = field(default_factory=LocalCheckpointConfig)
    """Checkpoints of each node."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run reports."""

    every: int = 1
    """Steps between console lines; metrics.jsonl has every step."""
    wandb: bool = False
    """Weights & Biases, offline where there is no API key."""
    wandb_project: str = "pentad"
    """Project of the W&B run."""
    tensorboard: bool = False
    """TensorBoard event files in RUN/tensorboard."""
    prometheus: str | None = None
    """The newest step's metrics for Prometheus: a port on the host of rank 0, where /metrics answers, or a file
    FILE.prom for the textfile collector of node-exporter; none: neither."""
    profile: tuple[int, ...] = ()
    """Steps to trace with the torch profiler into RUN/profile."""
    modules: tuple[int, ...] = ()
    """Steps in whose record the time of each module is; `pentad profile` sets it."""
    memory: bool = False
    """Record the bytes on the device after every operation of a step, for `pentad schedule RUN`; on a CPU every tensor
    is counted, which makes steps slower."""


@dataclass(frozen=True, kw_only=True)
class HardwareConfig:
    """What the devices can do."""

    preset: str | None = None
    """Name of a device in presets/hardware."""
    peak_tflops: float | None = None
    """Peak dense TFLOP/s of one device in train.dtype; none: by device name, on a CPU measured at start-up."""
    peak_fp8_tflops: float | None = None
    """The same in 8 bits, for `mfu_fp8` with train.fp8; none: by device name, on a CPU unknown."""
    memory_gib: float | None = None
    """Memory of one device, for `pentad check`; none: not compared."""
    ranks_per_node: int | None = None
    """Ranks of a node, for what is spread over those of one (parallel.data.states=node); none: nobody asks."""
    host_gib_s: float | None = None
    """GiB/s that copies between a device and its host reach, each way; none: measured at start-up where activations
    are offloaded."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """How a configuration came about, for what is said about it; no part of it, so that it never makes two unequal."""

    written: Mapping[str, Any] = field(default_factory=dict)
    """Dotted keys whose values come from outside (`${oc.env:…}`), as they were written."""
    secrets: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """(value, interpolation) of each part that came from outside."""
    given: tuple[str, ...] = ()
    """Dotted keys that the user wrote, and no preset alone."""
    otherwise: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The values that dotted keys would have if the user had written none, before `resolve`."""
    imports: tuple[str, ...] = ()
    """Modules that were imported for it (`--import`)."""
    notes: tuple[Problem, ...] = ()
    """What was changed on the way, and why."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole job."""

    name: str = "run"
    """Name of the run."""
    runs_dir: str = "runs"
    """Folder that holds the run's folder, runs_dir/name."""
    model: ModelConfig
    """The model."""
    parallel: ParallelConfig
    """Layout over ranks."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """What is kept for the backward pass."""
    train: TrainConfig
    """Steps and batches."""
    optim: OptimConfig
    """Optimizer; optim.name selects which."""
    data: DataConfig
    """Text; data.name selects which."""
    eval: EvalConfig
    """Evaluation."""
    checkpoint: CheckpointConfig
    """Checkpoints."""
    log: LogConfig
    """Metrics and their sinks."""
    faults: FaultsConfig
    """Guards."""
    hardware: HardwareConfig
    """Devices."""
    origin: Origin = field(default_factory=Origin, compare=False, repr=False, metadata={"key": False})
    """How it came about; no key."""
