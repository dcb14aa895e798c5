"""From a config and the launcher's facts to a rank that is ready to train."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..configs.errors import UserError
from ..configs.reading.deepspeed import engine_config
from ..configs.reading.spread import SpreadDegrees, dense_spread, expert_spread, is_flat
from ..configs.schema import Config
from ..models.mla import LatentAttention
from ..models.parallelize import build_model, initial_values, set_overlap_chunks
from ..models.sequences import Inputs
from ..models.transformer import Transformer
from ..parallel.comm.collectives import all_gather
from ..parallel.comm.mesh import Degrees, Mesh
from ..parallel.comm.unmet import UnmetMesh
from ..parallel.gradients import WeightGradients, slot_of
from ..parallel.record import ring
from ..parallel.replicas.deepspeed import DeepSpeedReplicas
from ..parallel.replicas.flat import FlatReplicas
from ..parallel.replicas.protocol import OtherSlices, Replicas, ShardSlice, adopt, expect_uses
from ..parallel.replicas.spread import spread_lines
from ..parallel.sharding_rules import ReplicaFamily, Sharding
from .devices.fp8 import check_fp8
from .devices.kernels import use_kernels
from .optim.places import StatePlace
from .pipeline.programs import Pipeline

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Ranks:
    """This process among the job's, as torchrun (or any launcher that sets its variables) says."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    run_id: str

    @staticmethod
    def from_environment(env: Mapping[str, str] = os.environ) -> Ranks:
        """One process alone where no launcher has set anything."""
        rank, world = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        local = int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1))
        run_id = f"{env.get('TORCHELASTIC_RUN_ID', 'alone')}-{env.get('MASTER_PORT', os.getpid())}"
        return Ranks(rank, world, *local, run_id)


def prepare_device(cfg: Config, ranks: Ranks) -> torch.device:
    """Chooses the device and sets process-wide torch state.

    Raises:
        UserError: train.device=cuda and there is no GPU for this rank.
    """
    # Softmax gradients far in the tail are denormal numbers, which slow an fp32 GEMM down 27-fold on a CPU.
    torch.set_flush_denormal(True)
    if cfg.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS demands, not a switch of ours
        torch.use_deterministic_algorithms(True)
    wanted = cfg.train.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.device_count() <= ranks.local_rank:
        raise UserError(
            f"train.device=cuda: local rank {ranks.local_rank} needs a GPU and there are {torch.cuda.device_count()}; "
            "set train.device=cpu or start fewer ranks per node"
        )
    device = torch.device("cuda", ranks.local_rank)
    torch.cuda.set_device(device)
    return device


def degrees_of(cfg: Config) -> Degrees:
    """The sizes of the mesh's axes."""
    p, kv = cfg.parallel, cfg.model.kv_heads
    return Degrees(tp=p.tp, pp=p.pp, cp=p.cp, dp=p.dp, ep=p.ep, etp=p.etp, tp_replica=max(1, p.tp // kv))


def make_recorder(cfg: Config, ranks: Ranks) -> ring.Recorder:
    """This rank's record."""
    stem, entries = record_stem(cfg, ranks), cfg.faults.record_entries
    return ring.create(stem, rank=ranks.rank, world=ranks.world, entries=entries)


def record_stem(cfg: Config, ranks: Ranks) -> str:
    """What the names of the job's rings have in common."""
    return f"{cfg.name}-{ranks.run_id}"


def mesh_of(
    cfg: Config,
    *,
    store: dist.Store | None,
    rank: int,
    device: str,
    recorder: ring.Recorder,
    epoch: int = 0,
    node: str = "",
) -> Mesh:
    """The mesh that the job's layout and pipeline need; arguments as of `Mesh`."""
    pipeline, context = Pipeline.of(cfg), cfg.parallel.context
    return Mesh(
        degrees_of(cfg),
        store=store,
        rank=rank,
        device=device,
        recorder=recorder,
        epoch=epoch,
        timeout_s=cfg.faults.timeout_s,
        channels=pipeline.channels,
        vocab=pipeline.split.balanced,
        context=1 if context.inner is None else context.inner,
        ends=_ends(cfg, pipeline),
        lines=_lines(cfg),
        node=node,
        local_saves=cfg.checkpoint.local.dir is not None,
    )


def unmet_mesh_of(cfg: Config, rank: int) -> UnmetMesh:
    """The axes of a rank of that mesh, for one process that works out what the rank would hold."""
    pipeline = Pipeline.of(cfg)
    ends, lines = _ends(cfg, pipeline), _lines(cfg)
    return UnmetMesh(degrees_of(cfg), rank, vocab=pipeline.split.balanced, ends=ends, lines=lines)


def spreads_of(cfg: Config) -> dict[ReplicaFamily, SpreadDegrees]:
    """How flat buckets of each family are spread."""
    return {"dense": dense_spread(cfg), "expert": expert_spread(cfg)}


def _lines(cfg: Config) -> dict[str, list[tuple[int, ...]]]:
    """The axes that the spread of flat buckets needs."""
    if not is_flat(cfg):
        return {}
    spreads = spreads_of(cfg)
    if not cfg.model.moe.experts:
        del spreads["expert"]
    return spread_lines(degrees_of(cfg), spreads)


def _ends(cfg: Config, pipeline: Pipeline) -> tuple[int, int] | None:
    """The ranks of the pipeline's ends, where both have a table of one vocabulary."""
    return pipeline.ends if (cfg.model.tied or cfg.model.mtp) and not pipeline.split.balanced else None


@dataclass(frozen=True)
class Parts:
    """This rank's part of the model, its data parallelism, and the pipeline that both belong to."""

    model: Transformer
    where: dict[str, Sharding]
    replicas: Replicas
    device: torch.device
    pipeline: Pipeline
    stores: dict[int, WeightGradients]
    """Deferred weight gradients of each of this rank's stages."""
    dtype: torch.dtype
    """In which the model holds its parameters."""

    @property
    def engine(self) -> Callable[[Inputs], Tensor] | None:
        """What is called in place of the whole model, where data parallelism prepares the backward pass in there."""
        return self.replicas.engine if isinstance(self.replicas, DeepSpeedReplicas) else None

    @property
    def buffers(self) -> dict[str, Tensor]:
        """What the model keeps beside its parameters, by global name."""
        names = self.model.state_dict().keys()
        return {name: buffer for name, buffer in self.model.named_buffers() if name in names}

    def load(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Sets parameters and buffers from (name, value of this rank's slice); other ranks' layers are passed over."""
        buffers = self.buffers

        def parameters() -> Iterator[tuple[str, Tensor]]:
            for name, value in values:
                if name in buffers:
                    buffers[name].copy_(value)
                elif name in self.where:
                    yield name, value

        self.replicas.load(parameters())


@dataclass(frozen=True)
class KeptModel:
    """What outlives a mesh of a rank's part of the model; the next one's part takes it over, without a second copy.

    Args:
        dtype: of the parameters.
        where: sharding of each parameter.
        slices: what each unit of the optimizer holds.
        params: parameters that lie in memory of the replicas, by name.
        memory: of the replicas (`Replicas.keep`).
        buffers: what the model keeps beside its parameters.
    """

    dtype: torch.dtype
    where: dict[str, Sharding]
    slices: tuple[ShardSlice, ...]
    params: dict[str, Tensor]
    memory: dict[str, Tensor]
    buffers: dict[str, Tensor]

    @staticmethod
    def of(parts: Parts) -> KeptModel:
        """Of a model that does nothing any more."""
        flat = isinstance(parts.replicas, FlatReplicas)
        params = {name: param.data for name, param in parts.model.named_parameters()} if flat else {}
        slices, memory = tuple(parts.replicas.pieces()), parts.replicas.keep()
        return KeptModel(parts.dtype, parts.where, slices, params, memory, parts.buffers)

    def fill(self, parts: Parts) -> None:
        """Ends the taking over.

        Raises:
            OtherSlices: the new part is not of the same slices.
        """
        if tuple(parts.replicas.pieces()) != self.slices or parts.buffers.keys() != self.buffers.keys():
            raise OtherSlices("the optimizer's units hold other parts of the parameters")
        for name, buffer in parts.buffers.items():
            buffer.copy_(adopt(self.buffers, name, buffer.shape, buffer.dtype, buffer.device))


def make_model(
    cfg: Config,
    mesh: Mesh,
    device: torch.device,
    kept: KeptModel | None = None,
    place: StatePlace | None = None,
    *,
    draws: bool = True,
) -> Parts:
    """Builds, cuts and initialises the model, then applies data parallelism.

    Args:
        cfg: the job.
        mesh: of this rank.
        device: where its part is.
        kept: of a former mesh; then nothing is drawn.
        place: of masters; none: the device.
        draws: gives the parameters their first values, where none are kept.

    Raises:
        OtherSlices: this rank's part is of other slices than `kept`.
    """
    dtype, pipeline = DTYPES[cfg.train.dtype], Pipeline.of(cfg)
    # One replica alone has nothing to shard.
    fsdp = cfg.parallel.data.sharding == "fsdp2" and mesh.axis("data").size > 1
    # FSDP2 keeps masters as parameters and casts when it gathers; flat buckets keep masters beside the parameters.
    held = torch.float32 if fsdp and dtype == torch.bfloat16 else dtype
    stages = pipeline.stages_of(mesh.axis("pp").rank)
    model, where = build_model(
        cfg.model,
        mesh,
        device=device,
        dtype=held,
        part=pipeline.split.part(stages),
        balanced=pipeline.split.balanced,
        remade=pipeline.remade,
        context=cfg.parallel.context,
        memory=kept.params if kept is not None else {},
        bare=is_flat(cfg),
        fp8=cfg.train.fp8,
        overlap=cfg.parallel.tensor.overlap,
    )
    if kept is not None and (kept.dtype, kept.where) != (held, where):
        raise OtherSlices("the parameters are cut in another way")
    memory = None if kept is None else kept.memory
    replicas = _replicas(cfg, model, where, mesh, dtype, memory, place, fsdp=fsdp)
    use_kernels(cfg, model, device, dtype)
    if cfg.train.fp8 != "none":
        check_fp8(cfg.train.fp8, model, device, dtype)
    if cfg.model.moe.experts and cfg.model.moe.overlap_chunks != "auto":
        set_overlap_chunks(model, cfg.model.moe.overlap_chunks)
    parts = Parts(model, where, replicas, device, pipeline, _stores(model, pipeline, stages), held)
    if kept is not None:
        kept.fill(parts)
    elif draws:
        draw(parts, cfg)
    return parts


def draw(parts: Parts, cfg: Config) -> None:
    """Gives parameters and masters the values that they have before the first step."""
    parts.replicas.load(initial_values(parts.model, parts.where, cfg.train.seed))


def _replicas(
    cfg: Config,
    model: Transformer,
    where: dict[str, Sharding],
    mesh: Mesh,
    dtype: torch.dtype,
    memory: dict[str, Tensor] | None,
    place: StatePlace | None,
    *,
    fsdp: bool,
) -> Replicas:
    """The model's data parallelism, which takes over `memory` of another one, where there is some."""
    if fsdp:
        return _fsdp(model, where, mesh, dtype, memory)
    if cfg.parallel.data.sharding == "deepspeed":
        if memory is not None:
            raise OtherSlices("DeepSpeed's engine takes over no memory")
        return DeepSpeedReplicas(model, where, mesh, engine_config(cfg))
    replicas = FlatReplicas(
        model,
        where,
        mesh,
        spreads=spreads_of(cfg),
        bucket_mib=cfg.parallel.data.bucket_mib,
        exact=cfg.train.deterministic == "elastic",
        stage_of=Pipeline.of(cfg).split.stage_of,
        kept=memory,
        masters=None if place is None else place.allocate,
    )
    _expect_uses(model, mesh)
    return replicas


def _fsdp(
    model: Transformer, where: dict[str, Sharding], mesh: Mesh, dtype: torch.dtype, memory: dict[str, Tensor] | None
) -> Replicas:
    # Imported here: torch's FSDP2 takes as long as torch itself, and every rank's start would pay for it.
    from ..parallel.replicas.fsdp import FsdpReplicas

    return FsdpReplicas(model, model.layers.values(), where, mesh, dtype, memory)


def _expect_uses(model: Transformer, mesh: Mesh) -> None:
    """The embedding's and the head's tables are used by every prediction module too, a tied one by both ends; what
    expands gathered latents, for each context rank's."""
    part, depth = model.part, len(model.mtp)
    embeds = depth + 1 if part.embeds else depth
    predicts = depth + 1 if part.predicts else 0
    if model.head is not None:
        expect_uses(model.head_weight, predicts)
    if model.embed is not None:
        expect_uses(model.embed_weight, embeds + predicts if model.cfg.tied else embeds)
    for module in model.modules():
        if isinstance(module, LatentAttention) and module.latent_core is not None:
            expect_uses(module.kv_up.weight, mesh.axis("cp").size)


def _stores(model: Transformer, pipeline: Pipeline, stages: tuple[int, ...]) -> dict[int, WeightGradients]:
    """One store per stage, which its parameters' slots know."""
    stores = {stage: WeightGradients() for stage in stages}
    for stage, store in stores.items():
        for layer in pipeline.split.layers[stage]:
            _defer(model.layers[str(layer)], store)
    last = len(pipeline.split.layers) - 1
    if last in stores:
        _defer(model.mtp, stores[last])
    return stores


def _defer(module: nn.Module, store: WeightGradients) -> None:
    for param in module.parameters():
        slot = slot_of(param)
        if slot is not None:
            slot.store = store


def buckets_per_rank(replicas: Replicas, mesh: Mesh) -> tuple[int, ...]:
    """How many buckets each rank of the pipeline axis updates."""
    pp = mesh.axis("pp")
    device = torch.device("cpu") if mesh.device == "cpu" else torch.device("cuda", torch.cuda.current_device())
    return tuple(all_gather(torch.tensor([replicas.buckets], device=device), pp).wait().tolist())
