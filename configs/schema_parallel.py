"""The `parallel`, `memory` and `faults` sections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from .tables.context_methods import CONTEXT_METHODS
from .tables.derived import DERIVED, Derived
from .tables.named import Named
from .tables.schedules import PROGRAM_SUFFIX, SCHEDULES


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """What DeepSpeed's engine does; unused with another parallel.data.sharding."""

    stage: Literal[1, 2, 3] | None = None
    """ZeRO stage: 1 shards optimizer states, 2 gradients too, 3 parameters too; none: that of `config`, else 2."""
    offload: Literal["none", "optimizer", "all"] | None = None
    """optimizer: masters and moments lie on the host and are updated there; all (stage 3): parameters lie there too;
    none: what `config` says, else nothing."""
    config: str | None = None
    """Your own DeepSpeed configuration (JSON), which the keys of the job must agree with; `auto` there leaves it to
    them."""


@dataclass(frozen=True, kw_only=True)
class DataParallelConfig:
    """How replicas share parameters, gradients and optimizer states."""

    sharding: Literal["ddp", "zero1", "zero2", "fsdp", "hsdp", "fsdp2", "deepspeed"] = "zero1"
    """ddp: everything replicated; zero1: optimizer states sharded; zero2: gradients too; fsdp: parameters too; hsdp:
    all three over the ranks of a node; fsdp2: torch's own FSDP2; deepspeed: what DeepSpeed's engine shards."""
    params: int | Literal["node", "all"] | None = None
    """Over how many neighbouring ranks of dp x cp the parameters of layers are spread: a (part-)stage's are gathered
    for its passes only (`memory.group`: 1 layer unless it says more). Gradients are spread over a multiple of them. 1:
    whole all the time; none: what sharding names."""
    grads: int | Literal["node", "all"] | None = None
    """Over how many neighbouring ranks of dp x cp gradient sums are spread, as `states`, which are spread over a
    multiple of them: each microbatch's gradients are scattered at once. 1: whole until the update; none: what sharding
    names."""
    states: int | Literal["node", "all"] | None = None
    """Over how many neighbouring ranks of dp x cp masters and moments are spread, those of experts over as many of
    theirs as make as many copies; node: those of one node; all; 1: every rank has all; none: what sharding names."""
    bucket_mib: float = 32.0
    """Size of a gradient bucket in MiB of parameters; one bucket is one collective."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """DeepSpeed's engine."""


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """How the layers and microbatches pass through the pipeline ranks; unused with parallel.pp=1."""

    schedule: Derived[Annotated[str, Named(SCHEDULES, file=PROGRAM_SUFFIX)]] = DERIVED
    """Order of forward and backward passes, or a program's file (docs/pipeline.md); derived: gis with several chunks,
    else 1f1b."""
    chunks: Derived[int] = DERIVED
    """Stages per rank; derived: what the schedule needs, 2 where it leaves the choice (interleaved, gis)."""
    vocab: Literal["ends", "balanced"] = "ends"
    """ends: embedding on the first stage, head and loss on the last; balanced: shared by all pipeline ranks."""
    vocab_barriers: Literal[1, 2] = 1
    """balanced: collectives between the head and the backward pass; 1 keeps one microbatch less, 2 multiplies less."""
    group: int | None = None
    """interleaved, gis: microbatches that pass a chunk before the next one; derived: parallel.pp (others: none)."""
    layers: Literal["auto"] | tuple[int, ...] = "auto"
    """Layers of each stage in order, 0 for an empty one; auto: the split with the least work on the busiest rank."""


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """How attention spans the context ranks, which share each sequence; unused with parallel.cp=1."""

    method: Annotated[str, Named(CONTEXT_METHODS)] = "auto"
    """Who sends what (docs/context.md)."""
    duplex: bool = False
    """ring: half of the key-value heads travel each way, so that both directions of a link carry them."""
    inner: int | None = None
    """usp: ranks that exchange heads, the others pass keys on; derived: the most that the key-value heads allow."""
    placement: Derived[Literal["zigzag", "by_length", "contiguous"]] = DERIVED
    """Which tokens a rank has; derived: zigzag, which evens out causal work (linear attention: contiguous).
    by_length: even too, and packed documents on as few ranks as their lengths need."""


@dataclass(frozen=True, kw_only=True)
class TensorConfig:
    """How tensor parallel ranks work together; unused with parallel.tp=1."""

    overlap: Literal["none", "gemm"] = "none"
    """gemm: what a product needs of other ranks, and what it makes for them, travels in pieces beside it."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Degrees of parallelism; their product is the number of ranks."""

    tp: int = 1
    """Tensor parallel ranks (with sequence parallelism)."""
    pp: int = 1
    """Pipeline parallel ranks; the layers are split over them."""
    cp: int = 1
    """Context parallel ranks."""
    ep: int = 1
    """Expert parallel ranks."""
    etp: int = 1
    """Tensor parallel ranks inside an expert."""
    dp: Derived[int] = DERIVED
    """Data parallel ranks; derived: world size / (tp · pp · cp). `pentad train` alone takes 1."""
    tensor: TensorConfig = field(default_factory=TensorConfig)
    """Tensor parallelism."""
    data: DataParallelConfig = field(default_factory=DataParallelConfig)
    """Data parallelism."""
    context: ContextConfig = field(default_factory=ContextConfig)
    """Context parallelism."""
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    """Pipeline parallelism."""

    @property
    def model_ranks(self) -> int:
        """Ranks that share one replica of the model: tp · pp · cp."""
        return self.tp * self.pp * self.cp

    @property
    def ranks(self) -> int:
        """All ranks: tp · pp · cp · dp."""
        return self.model_ranks * self.dp

    @property
    def pipeline_in_use(self) -> PipelineConfig:
        """`pipeline`; of a single pipeline rank one stage with all layers, whatever the section says."""
        return self.pipeline if self.pp > 1 else PipelineConfig(schedule="1f1b", chunks=1)


RecomputePlan = tuple[tuple[int, Literal["full"] | tuple[str, ...], float], ...]
"""(layer, parts that are made again, share of tokens of which they are kept) of layers that do not keep everything."""


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What is kept in memory between the forward and the backward pass."""

    recompute: Literal["none", "full", "selective", "auto"] = "none"
    """full: a layer keeps its input only and is run again in the backward pass; selective: parts of it are; auto: of
    each layer what costs least time, so that the job fits into hardware.memory_gib."""
    recompute_parts: tuple[str, ...] = ("norm", "activation")
    """selective: any of norm, activation, attention, latent, ffn, moe (docs/memory.md)."""
    recompute_every: int = 1
    """full, selective: of every so many layers, the first one."""
    recompute_layers: int | None = None
    """full, selective: so many of these layers of each stage at most, its first ones; null: all."""
    token_share: Literal["none", "auto"] | float = "none"
    """selective, auto: a share of each sequence's tokens (0.4), its first ones, of which the parts are kept, or
    offloaded, after all; the rest is made again token by token. auto: the largest that fits and whose copies hide."""
    offload_activations: Literal["none", "all", "auto"] | float = "none"
    """What the backward pass needs is on the host until then: nothing of it, all, a share of each rank's (0.5), the
    longest-lived first, or (auto) what costs no time."""
    host_gib: float | None = None
    """GiB of the host that a rank's offloaded activations may take; none: as much as they need."""
    offload_disk: str | None = None
    """Folder on a disk of the node, for what the host may not hold of them (host_gib), the longest-lived first, and for
    masters and moments (offload_optimizer=disk): files of each rank, gone when the run ends; none: no disk."""
    group: int | None = None
    """Layers of a part-stage: a rank's stage passes in parts, each forward and backward an operation of its own, and
    what each keeps is offloaded apart; none: a stage is one part."""
    offload_optimizer: Literal["none", "host", "disk", "auto"] = "none"
    """host: masters and moments lie on the host and are updated in subgroups, most of them there; disk: they lie in
    memory.offload_disk, and the host has a few subgroups at a time; auto: host, where the job does not fit into
    hardware.memory_gib without."""
    optimizer_stride: Literal["auto"] | int = "auto"
    """offload_optimizer: every so many subgroups one is updated on the device; 0: all on the host; 1: all on the
    device; auto: what is measured to be fastest, and with train.deterministic 1."""
    optimizer_subgroup_mib: float = 64.0
    """offload_optimizer: MiB of masters and moments that are updated at once."""
    plan: RecomputePlan | None = field(default=None, metadata={"key": False})
    """recompute=auto or token_share=auto: what was chosen for each layer (`trainer.memory.plan`); none: nothing yet."""

    @property
    def recompute_is_planned(self) -> bool:
        """Whether what layers make again follows from the memory that they have (`plan`)."""
        return self.recompute == "auto" or (self.recompute == "selective" and self.token_share == "auto")


@dataclass(frozen=True, kw_only=True)
class NumericsConfig:
    """Guards against bits that change by themselves (silent data corruption): docs/numerics.md."""

    replicas_every: int = 0
    """Steps between comparisons of the parameters that several ranks hold copies of; 0: never."""
    checksums: bool = False
    """Checksums of every gradient from when it is final until it is sent, and of parameters, masters and moments from
    one update to the next."""
    spikes: bool = True
    """Say so, with the samples of the batch, when loss or gradient norm is far above the steps before."""
    on_spike: Literal["tell", "keep", "skip", "rewind", "stop"] = "tell"
    """spikes: tell: nothing else. The others hold such a step back, run it again on the same microbatches, and on other
    ranks, and train with what a second run finds normal; a spike that repeats is trained with all the same (keep), left
    out (skip), left out after going back to the newest checkpoint's state (rewind), or the end of the run (stop)."""
    recompute: bool = False
    """Compare what is made again in backward with what the forward pass made, to the bit; needs kernels that are
    deterministic."""
    canary: bool = False
    """Before training, and after resuming, one step of a small model on every rank, whose bits all ranks on equal
    devices must have in common."""


@dataclass(frozen=True, kw_only=True)
class FaultsConfig:
    """Guards against bad steps and hangs."""

    max_bad_steps: int = 10
    """Consecutive steps skipped for a NaN or infinite gradient before the run stops."""
    timeout_s: float = 600.0
    """Seconds that a collective may wait before the run stops with an error."""
    stop_code: int = 0
    """Exit code of a run that a signal has stopped before its last step, and that has saved: by it a batch script knows
    that the job is to go on later, as that of `pentad slurm` does with 75."""
    record_entries: int = 65536
    """Entries of each rank's record ring."""
    probe_at_start: bool = False
    """Try out the matrix products of all ranks and the links between them before training, and name who falls short."""
    watch: bool = True
    """One process per node watches the ranks: when one dies, hangs or goes astray it says which and why, and ends the
    job at once."""
    alive_s: Derived[float] = DERIVED
    """Seconds without a sign of life before a rank counts as stopped or frozen; derived: timeout_s / 60, at least 5."""
    hang_s: Derived[float] = DERIVED
    """Seconds without progress in a step or its data, at least, before a rank counts as hung; 5 times what 99 % of the
    run's own pauses took, where that is more; derived: timeout_s / 10, at least 10."""
    pause_s: Derived[float] = DERIVED
    """The same in the first step, in an evaluation or a save; derived: timeout_s / 2."""
    recover: bool = False
    """Go on without an end of the job when ranks die, hang or fail: others take their places, and nothing that was
    committed is lost."""
    spares: int = 0
    """recover: processes per node that are ready to take a lost rank's place at once."""
    ladder: tuple[Literal["spare", "respawn", "shrink", "resplit", "layouts"], ...] = (
        "spare",
        "respawn",
        "shrink",
        "resplit",
        "layouts",
    )
    """recover: what is tried when processes are lost, in this order. spare: ready ones take their places; respawn: new
    ones are started and waited for; shrink: data parallelism has the largest size that those left allow; resplit: the
    layers are split over fewer pipeline ranks; layouts."""
    layouts: tuple[str, ...] = ()
    """recover: layouts to fall to, in this order, each as overrides of `parallel` are written, `pp=2 tp=1`; without dp
    it is the largest that those left allow."""
    grow: bool = True
    """recover: start processes beside a job in a smaller layout, and take them in between two steps."""
    numerics: NumericsConfig = field(default_factory=NumericsConfig)
    """Guards against bits that change by themselves."""
