"""Applies tensor parallelism, recompute and the pipeline's cut to a model from outside, in one ordered function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import nn

from ..configs.schema import ContextConfig, ModelConfig
from ..parallel.comm.collectives import all_gather_autograd, all_reduce
from ..parallel.comm.mesh import Axis, Mesh
from ..parallel.context.all_scan import AllScan
from ..parallel.context.make import make_core, make_latent_core
from ..parallel.expert.biases import without_bias
from ..parallel.expert.dispatch import AllToAll
from ..parallel.expert.make import make_dispatcher
from ..parallel.expert.tokens import TokenPool
from ..parallel.fp8 import Fp8Experts, fp8_products
from ..parallel.gradients import slot_of
from ..parallel.grouped_projection import Local
from ..parallel.kernels.device import check_local_attention, local_attention
from ..parallel.projection import PLAIN, LocalProjection
from ..parallel.sharding_rules import Axes, ColumnWise, Plan, RowWise, Rule, Sharding, place_parameter
from ..parallel.tensor import ColumnProjection, RowProjection
from ..parallel.vocab import VocabEmbedding, VocabHead, VocabShard
from .attention import Attention
from .costs.kept import Choice
from .costs.parts import Part
from .linear import Linear
from .linear_attention import LinearAttention
from .mla import LatentAttention
from .moe import Experts, Moe
from .recompute import RunLayers
from .sharding import plan_of
from .transformer import Transformer
from .weights.initialise import initial

_SOFTMAX = (Attention, LatentAttention)
GATES = (".shared_gate", ".decay_down", ".decay_up")
"""Ends of the names of linears that are small and decide about others' shares: never in 8 bits."""


def _head_widths(attention: Attention | LatentAttention) -> tuple[int, int]:
    return (attention.head_dim, attention.head_dim) if isinstance(attention, Attention) else attention.widths


def rule_of(plan: Plan, name: str) -> Rule:
    """The plan's rule for one parameter.

    Raises:
        KeyError: the plan does not cover the parameter.
    """
    for pattern, rule in plan:
        if fnmatchcase(name, pattern):
            return rule
    raise KeyError(f"the sharding plan has no rule for {name}")


def shardings(model: Transformer, mesh: Mesh, *, balanced: bool = False) -> dict[str, Sharding]:
    """Where each parameter of the (meta) model lives on this rank, by global name."""
    plan = plan_of(model.cfg)
    vocab = mesh.axis("vocab_head" if balanced else "tp")
    axes = Axes(
        mesh.axis("tp"), mesh.axis("tp_shard"), mesh.axis("tp_replica"), vocab, mesh.axis("ep"), mesh.axis("etp")
    )
    where = {
        name: place_parameter(rule_of(plan, name), name, tuple(param.shape), axes)
        for name, param in model.named_parameters()
    }
    # A table that both ends of a pipeline use has two copies, whose gradients are summed.
    if mesh.axis("ends").size > 1 and "embed.weight" in where:
        where["embed.weight"] = replace(where["embed.weight"], partial="ends")
    return where


def build_model(
    cfg: ModelConfig,
    mesh: Mesh,
    *,
    device: torch.device,
    dtype: torch.dtype,
    part: Part | None = None,
    balanced: bool = False,
    remade: Mapping[int, Choice] | None = None,
    context: ContextConfig | None = None,
    memory: Mapping[str, torch.Tensor] | None = None,
    bare: bool = False,
    fp8: str = "none",
    overlap: str = "none",
) -> tuple[Transformer, dict[str, Sharding]]:
    """This rank's part of the model, uninitialised, and where each of its parameters lives.

    The order: build on meta, cut, allocate, replace the seams. Data parallelism comes after (`parallel.replicas`).

    Args:
        part: what this rank's stages hold; none: everything.
        balanced: embedding and head are cut over the tensor and pipeline ranks, which the pipeline's program runs.
        remade: what layers make again in backward, by index; none: nothing.
        context: how attention spans the context ranks; none: they are one.
        memory: of parameters that exist already, by name; none is made for these.
        bare: the others get none either: whoever takes the model over gives them some.
        fp8: as `train.fp8`.
        overlap: as `parallel.tensor.overlap`.
    """
    with torch.device("meta"):
        model = Transformer(cfg, part)
    where = shardings(model, mesh, balanced=balanced)
    if remade:
        model.run_layer = RunLayers(remade)
    for name, sharding in where.items():
        owner, leaf = _owner(model, name)
        local = (memory or {}).get(name)
        if local is None:
            local = torch.empty(sharding.placement.local_shape, device=device, dtype=dtype)
            if bare:
                local.untyped_storage().resize_(0)
        setattr(owner, leaf, nn.Parameter(local))
    for name, buffer in model.named_buffers():
        owner, leaf = _owner(model, name)
        setattr(owner, leaf, torch.zeros(buffer.shape, device=device, dtype=buffer.dtype))
    _replace_projections(model, mesh, fp8, pieces=overlap == "gemm")
    if mesh.axis("tp").size > 1:
        _replace_seams(model, mesh)
    _replace_dispatchers(model, mesh)
    if device.type == "cuda":
        for width, value in {_head_widths(module) for module in model.modules() if isinstance(module, _SOFTMAX)}:
            check_local_attention(local_attention(device), device, dtype, width, value)
    if context is not None and mesh.axis("cp").size > 1:
        _replace_cores(model, mesh, context, device)
    return model, where


def _replace_projections(model: Transformer, mesh: Mesh, fp8: str, *, pieces: bool) -> None:
    """How each linear is cut, and multiplied: gates in the model's precision, the others as `train.fp8` says."""
    tp, etp, plan = mesh.axis("tp"), mesh.axis("etp"), plan_of(model.cfg)
    eight_bit = PLAIN if fp8 == "none" else fp8_products(fp8, mesh.axis("tokens"))
    for name, linear in _linears(model):
        products = PLAIN if name.endswith(GATES) else eight_bit
        rule = rule_of(plan, f"{name}.weight")
        if tp.size > 1 and isinstance(rule, RowWise):
            linear.apply_weights = RowProjection(tp, products, pieces=pieces)
        elif tp.size > 1 and isinstance(rule, ColumnWise):
            linear.apply_weights = ColumnProjection(tp, products, pieces=pieces)
        elif products is not PLAIN:
            linear.apply_weights = LocalProjection(products)
    if fp8 == "none":
        return
    for experts in (module for module in model.modules() if isinstance(module, Experts)):
        wide, narrow = (Local(model.cfg.moe.compute, Fp8Experts(*axes)) for axes in ((None, etp), (etp, None)))
        experts.down.apply_weights = narrow
        for linear in (experts.gate, experts.up):
            if linear is not None:
                linear.apply_weights = wide


def _replace_seams(model: Transformer, mesh: Mesh) -> None:
    tp = mesh.axis("tp")
    for module in model.modules():
        if isinstance(module, LatentAttention):
            module.gather_tokens = partial(all_gather_autograd, axis=tp)
        elif isinstance(module, Attention) and module.norm_heads_together and module.q_norm and module.k_norm:
            # The ranks of tp_shard have the key heads once, however many ranks share one.
            module.q_norm.total = partial(_sum_over, tp)
            module.k_norm.total = partial(_sum_over, mesh.axis("tp_shard"))
    shard = VocabShard.of(tp, model.cfg.vocab, model.cfg.used_vocab)
    model.embedding_op, model.head_op = VocabEmbedding(shard), VocabHead(shard)


def _sum_over(axis: Axis, x: torch.Tensor) -> torch.Tensor:
    return all_reduce(x.contiguous(), axis).wait()


def _replace_dispatchers(model: Transformer, mesh: Mesh) -> None:
    """The experts' ranks are those of the expert mesh, whatever the dense one is."""
    if not model.cfg.moe.experts:
        return
    etp, tokens = mesh.axis("etp"), TokenPool(mesh.axis("tokens"))
    dispatcher = make_dispatcher(model.cfg.moe, mesh.axis("ep"), etp)
    for module in model.modules():
        if isinstance(module, Moe):
            module.dispatch = dispatcher
            module.router.tokens, module.router.fixed_width = tokens, dispatcher.fixed_width
            if etp.rank > 0:
                module.experts.down.apply_weights = without_bias(module.experts.down.apply_weights)


def _replace_cores(model: Transformer, mesh: Mesh, context: ContextConfig, device: torch.device) -> None:
    """Attention spans the context ranks; linear attention hands its state from one to the next."""
    local = local_attention(device)
    core, latent_core = make_core(context, mesh, local), make_latent_core(context, mesh, local)
    scan: AllScan | None = None
    for module in model.modules():
        if isinstance(module, _SOFTMAX):
            module.core = core
            if isinstance(module, LatentAttention):
                module.latent_core = latent_core
        elif isinstance(module, LinearAttention):
            scan = scan or AllScan(mesh.axis("cp_scan"), mesh.axis("cp_back"), device)
            module.neighbours = scan


def close(model: Transformer) -> None:
    """Ends what runs beside the model's compute; call before the mesh is closed."""
    for module in model.modules():
        if isinstance(module, LinearAttention) and isinstance(module.neighbours, AllScan):
            module.neighbours.close()
            return


def set_overlap_chunks(model: Transformer, chunks: int) -> None:
    """From the next step on, tokens travel to their experts in so many chunks (`model.moe.overlap_chunks`).

    The experts run once a chunk, and so often their gradients are added to before they are final. Call it between
    steps, on all ranks, with data parallelism applied. Other dispatchers than all_to_all have no chunks.
    """
    for module in model.modules():
        if isinstance(module, Moe) and isinstance(module.dispatch, AllToAll):
            module.dispatch.chunks = chunks
            for param in module.experts.parameters():
                slot = slot_of(param)
                if slot is not None:
                    slot.uses = chunks


def _linears(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Linear))


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def initial_values(model: Transformer, where: dict[str, Sharding], seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, fp32 initial value of this rank's slice), one at a time."""
    for name, sharding in where.items():
        yield name, initial(name, sharding.placement, model.cfg, seed)
