"""Checks of `model.moe`, latent attention and the expert mesh `parallel.etp · ep · edp`."""

from __future__ import annotations

from ..errors import Problem
from ..schema import Config
from ..schema_model import MAX_OVERLAP_CHUNKS
from .divisible import indivisible

_MOE = "model.moe"
_ROUTER = "model.moe.router"


def validate_moe(config: Config) -> list[Problem]:
    """Every problem of the resolved sections that follows from the values alone."""
    problems = [*_latent_attention(config), *_prediction(config), *_sharding(config), *_mesh(config)]
    if config.model.moe.experts >= 1:
        problems += [*_sizes(config), *_top_k(config), *_groups(config), *_balance(config), *_capacity(config)]
    return problems


def _latent_attention(config: Config) -> list[Problem]:
    m = config.model
    mla = m.mla
    if mla.kv_rank < 1:
        return []
    problems: list[Problem] = []
    why = f"latent attention (model.mla.kv_rank={mla.kv_rank})"
    if mla.rope_dim % 2:
        problems.append(
            Problem("model.mla.rope_dim", f"must be even, rotary embedding turns pairs; got {mla.rope_dim}")
        )
    if m.head_dim is not None and m.head_dim != mla.nope_dim + mla.rope_dim:
        message = (
            f"{m.head_dim} is not model.mla.nope_dim={mla.nope_dim} + model.mla.rope_dim={mla.rope_dim} = "
            f"{mla.nope_dim + mla.rope_dim}; set model.head_dim=null"
        )
        problems.append(
            Problem("model.head_dim", message, ("model.mla.nope_dim", "model.mla.rope_dim", "model.mla.kv_rank"))
        )
    if m.kv_heads != m.heads:
        message = f"{m.kv_heads}, but {why} has a key for each of model.heads={m.heads}; set model.kv_heads=null"
        problems.append(Problem("model.kv_heads", message, ("model.heads", "model.mla.kv_rank")))
    for key in ("sinks", "qk_norm"):
        if getattr(m, key):
            message = f"{why} has none; set model.{key}=false or model.mla.kv_rank=0"
            problems.append(Problem(f"model.{key}", message, ("model.mla.kv_rank",)))
    return problems


def _prediction(config: Config) -> list[Problem]:
    mtp, pp, vocab = config.model.mtp, config.parallel.pp, config.parallel.pipeline.vocab
    if mtp < 1 or pp == 1 or vocab != "balanced":
        return []
    message = (
        f"balanced, but multi-token prediction (model.mtp={mtp}) needs embedding and head on the last stage; "
        "set parallel.pipeline.vocab=ends"
    )
    return [Problem("parallel.pipeline.vocab", message, ("model.mtp", "parallel.pp"))]


def _sharding(config: Config) -> list[Problem]:
    experts = config.model.moe.experts
    if experts < 1 or config.parallel.data.sharding != "fsdp2":
        return []
    message = (
        f"fsdp2 does not go with experts yet ({_MOE}.experts={experts}); set parallel.data.sharding=fsdp or zero1 and "
        "shard the experts with parallel.ep"
    )
    return [Problem("parallel.data.sharding", message, ("model.moe.experts",))]


def _mesh(config: Config) -> list[Problem]:
    p, m = config.parallel, config.model
    experts, inner = m.moe.experts, p.ep * p.etp
    if inner <= 1 or p.ep < 1:
        return []
    if experts < 1:
        key = "parallel.ep" if p.ep > 1 else "parallel.etp"
        message = (
            f"parallel.ep={p.ep} and parallel.etp={p.etp} split experts, and {_MOE}.experts={experts} are none; "
            f"set {key}=1 or {_MOE}.experts"
        )
        return [Problem(key, message, ("parallel.ep", "parallel.etp", f"{_MOE}.experts"))]
    problems: list[Problem] = []
    # Ranks that the degrees do not divide are another check's problem, and there is no dp.
    if p.dp is not None and (ranks := p.tp * p.cp * p.dp) % inner:
        key = "parallel.ep" if p.ep > 1 else "parallel.etp"
        message = (
            f"parallel.ep={p.ep} x parallel.etp={p.etp} = {inner} does not divide parallel.tp={p.tp} x "
            f"parallel.cp={p.cp} x parallel.dp={p.dp} = {ranks}, the ranks of a pipeline stage; "
            f"set {key} to a divisor of them"
        )
        follows = ("parallel.ep", "parallel.etp", "parallel.tp", "parallel.cp", "parallel.dp")
        problems.append(Problem(key, message, follows))
    problems += indivisible(f"{_MOE}.experts", experts, "parallel.ep", p.ep, "each rank holds equally many")
    return problems + indivisible(f"{_MOE}.ffn", m.moe.ffn, "parallel.etp", p.etp, "it is split over the ranks")


def _sizes(config: Config) -> list[Problem]:
    m, tp = config.model, config.parallel.tp
    moe = m.moe
    problems = indivisible(f"{_MOE}.shared", moe.shared, "parallel.tp", tp, "it is split over the tensor ranks")
    if moe.dense_layers > m.layers:
        message = f"{moe.dense_layers} are more than model.layers={m.layers}; set it to {m.layers} or less"
        problems.append(Problem(f"{_MOE}.dense_layers", message, ("model.layers",)))
    if moe.overlap_chunks != "auto" and not 1 <= moe.overlap_chunks <= MAX_OVERLAP_CHUNKS:
        message = f"must be 1 to {MAX_OVERLAP_CHUNKS} or auto, got {moe.overlap_chunks}"
        problems.append(Problem(f"{_MOE}.overlap_chunks", message))
    return problems


def _top_k(config: Config) -> list[Problem]:
    moe, router = config.model.moe, config.model.moe.router
    choices = moe.experts + router.null_experts
    key = f"{_MOE}.top_k"
    if moe.top_k > choices:
        null = f" + {_ROUTER}.null_experts={router.null_experts} = {choices}" if router.null_experts else ""
        message = f"{moe.top_k} is more than {_MOE}.experts={moe.experts}{null}; set {key}={choices} or less"
        return [Problem(key, message, (f"{_MOE}.experts", f"{_ROUTER}.null_experts"))]
    kept = router.groups_kept
    if router.groups <= 1 or moe.experts % router.groups:
        return []
    reach = kept * (moe.experts // router.groups)
    if moe.top_k <= reach:
        return []
    message = (
        f"{moe.top_k} is more than the {reach} experts of {_ROUTER}.groups_kept={kept} groups of "
        f"{moe.experts // router.groups}; set {key}={reach} or less, or raise {_ROUTER}.groups_kept"
    )
    return [Problem(key, message, (f"{_MOE}.experts", f"{_ROUTER}.groups", f"{_ROUTER}.groups_kept"))]


def _groups(config: Config) -> list[Problem]:
    moe, router = config.model.moe, config.model.moe.router
    if router.groups <= 1:
        return []
    problems: list[Problem] = []
    if router.name != "top_k":
        message = f"{router.groups} groups need {_ROUTER}.name=top_k, got {router.name}; set {_ROUTER}.groups=1"
        problems.append(Problem(f"{_ROUTER}.groups", message, (f"{_ROUTER}.name",)))
    problems += indivisible(f"{_MOE}.experts", moe.experts, f"{_ROUTER}.groups", router.groups, "groups are equal")
    if router.groups_kept is not None and router.groups_kept > router.groups:
        key = f"{_ROUTER}.groups_kept"
        message = (
            f"{router.groups_kept} is more than {_ROUTER}.groups={router.groups}; set {key}={router.groups} or less"
        )
        problems.append(Problem(key, message, (f"{_ROUTER}.groups",)))
    members = moe.experts // router.groups
    if router.group_members > members >= 1 and moe.experts % router.groups == 0:
        key = f"{_ROUTER}.group_members"
        message = (
            f"{router.group_members} is more than a group's {members} ({_MOE}.experts={moe.experts} / "
            f"{_ROUTER}.groups={router.groups}); set {key}={members} or less"
        )
        problems.append(Problem(key, message, (f"{_MOE}.experts", f"{_ROUTER}.groups")))
    return problems


def _balance(config: Config) -> list[Problem]:
    router = config.model.moe.router
    problems: list[Problem] = []
    if router.name == "expert_choice":
        why = f"{_ROUTER}.name=expert_choice balances by itself"
        if router.selection_bias:
            message = f"{why}; set {_ROUTER}.selection_bias=false"
            problems.append(Problem(f"{_ROUTER}.selection_bias", message, (f"{_ROUTER}.name",)))
        if router.aux_loss:
            message = f"{why}, got a loss of {router.aux_loss:g}; set {_ROUTER}.aux_loss=0"
            problems.append(Problem(f"{_ROUTER}.aux_loss", message, (f"{_ROUTER}.name",)))
    if router.name == "sinkhorn" and router.aux_loss:
        message = (
            f"{_ROUTER}.name=sinkhorn balances the selection itself, got a loss of {router.aux_loss:g}; "
            f"set {_ROUTER}.aux_loss=0"
        )
        problems.append(Problem(f"{_ROUTER}.aux_loss", message, (f"{_ROUTER}.name",)))
    if router.null_experts > 0:
        problems += _null_experts(config)
    return problems


def _null_experts(config: Config) -> list[Problem]:
    router, key = config.model.moe.router, f"{_ROUTER}.null_experts"
    if router.name != "top_k":
        message = f"{router.null_experts} need {_ROUTER}.name=top_k, got {router.name}; set {key}=0"
        return [Problem(key, message, (f"{_ROUTER}.name",))]
    if router.groups > 1:
        message = f"{router.null_experts} belong to no group, got {_ROUTER}.groups={router.groups}; set {key}=0"
        return [Problem(key, message, (f"{_ROUTER}.groups",))]
    return []


def _capacity(config: Config) -> list[Problem]:
    moe = config.model.moe
    problems: list[Problem] = []
    key = f"{_MOE}.capacity_factor"
    if moe.capacity_factor is not None and moe.router.name == "sinkhorn":
        message = (
            f"{moe.capacity_factor:g} does not go with {_ROUTER}.name=sinkhorn, whose tokens are balanced already; "
            f"set {key}=null"
        )
        problems.append(Problem(key, message, (f"{_ROUTER}.name",)))
    if not moe.pad:
        return problems
    if moe.capacity_factor is None:
        message = f"{_MOE}.pad=true pads to the capacity, and {key} is null; set {key} or {_MOE}.pad=false"
        problems.append(Problem(f"{_MOE}.pad", message, (key,)))
    elif moe.capacity_scope != "local":
        message = (
            f"{_MOE}.pad=true needs {_MOE}.capacity_scope=local, got {moe.capacity_scope}: only then every rank knows "
            f"how many rows it gets; set {_MOE}.capacity_scope=local"
        )
        problems.append(Problem(f"{_MOE}.pad", message, (f"{_MOE}.capacity_scope",)))
    return problems
