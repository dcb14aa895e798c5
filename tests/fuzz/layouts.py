"""Random layouts of a job over 1 to 8 ranks, and whatever else may differ between runs of the same training."""

from __future__ import annotations

from collections.abc import Mapping

from pentad.configs.tables.context_methods import CONTEXT_METHODS
from pentad.configs.tables.layer_parts import LAYER_PARTS, TOKEN_WISE
from pentad.configs.tables.schedules import SCHEDULES
from tests.fuzz.draws import Draws, Keys, common_divisors

WORLDS = {1: 0.4, 2: 2, 3: 0.5, 4: 3, 5: 0.2, 6: 0.8, 7: 0.1, 8: 3}


def draw_layout(draws: Draws, model: Mapping[str, object]) -> tuple[int, Keys]:
    """(world size, keys) of a layout that may be one, for a job with these keys: `check` decides."""
    world = draws.pick(WORLDS)
    degrees = draws.factors(world, {"tp": 1, "pp": 1.1, "cp": 1, "dp": 1})
    keys: Keys = {f"parallel.{axis}": size for axis, size in degrees.items()}
    experts = int(str(model.get("model.moe.experts", 0)))
    if experts:
        keys |= _experts(draws, degrees, experts, int(str(model["model.moe.ffn"])))
    if degrees["pp"] > 1 or draws.maybe(0.1):  # without a pipeline the section has no effect
        keys |= _pipeline(draws, degrees["pp"], int(str(model["model.layers"])))
    if degrees["cp"] > 1:
        keys |= _context(draws, hybrid=model.get("model.attention_every", 1) != 1)
    whole = degrees["pp"] == 1 and not experts
    rounded = model.get("train.dtype", "fp64") != "fp64"
    theirs = {"fsdp2": 2 if whole else 0, "deepspeed": 3 if whole and rounded else 0}
    sharding = keys["parallel.data.sharding"] = draws.pick(dict.fromkeys(_POINTS, 1) | theirs)
    if sharding == "hsdp":
        keys["hardware.ranks_per_node"] = draws.choice([2, 4, 8])
    if sharding in _POINTS and draws.maybe(0.5):
        keys |= _spread(draws, degrees["dp"] * degrees["cp"])
    keys["parallel.data.bucket_mib"] = draws.pick({0.0001: 1, 0.001: 1, 0.01: 1, 0.1: 0.5, 32: 1})
    if degrees["tp"] > 1 and draws.maybe(0.4):
        keys["parallel.tensor.overlap"] = "gemm"
    if draws.maybe(0.3):
        del keys["parallel.dp"]  # derived
    keys |= _recompute(draws, model)
    if sharding not in ("fsdp2", "deepspeed"):
        keys["memory.offload_activations"] = draws.pick({"none": 2, "all": 1, 0.5: 0.5, "auto": 0.5})
        if draws.maybe(0.4):
            keys["memory.group"] = draws.choice([1, 1, 2, 3])
    keys |= _engine(draws) if sharding == "deepspeed" else _optimizer(draws)
    keys["checkpoint.asynchronous"] = draws.maybe(0.5)
    keys |= _guards(draws, sums=sharding not in ("fsdp2", "deepspeed"))
    keys["data.prefetch"] = draws.choice([0, 1, 2, 4])
    if keys.get("memory.offload_activations", "none") != "none" and draws.maybe(0.5):
        keys["memory.host_gib"] = draws.choice([1e-6, 1e-5, 1e-4])  # of kilobytes
        keys["memory.offload_disk"] = "/tmp"
    return world, keys


_POINTS = "ddp", "zero1", "zero2", "fsdp", "hsdp"
_SPREAD = "params", "grads", "states"


def _spread(draws: Draws, replicas: int) -> Keys:
    states = draws.choice([*common_divisors(replicas, replicas), "node", "all"])
    grads = draws.choice([None, 1, *common_divisors(replicas, replicas), states])
    params = draws.choice([None, 1, *common_divisors(replicas, replicas), grads])
    nodes = {"hardware.ranks_per_node": draws.choice([2, 4, 8])} if "node" in (states, grads, params) else {}
    return {f"parallel.data.{key}": over for key, over in zip(_SPREAD, (params, grads, states), strict=True)} | nodes


def _guards(draws: Draws, *, sums: bool) -> Keys:
    """None of them changes a bit of the training; what one finds here is a false alarm, and ends the run."""
    keys: Keys = {"recompute": draws.maybe(0.3), "canary": draws.maybe(0.2), "spikes": draws.maybe(0.8)}
    if keys["spikes"] and sums:
        keys["on_spike"] = draws.pick({"tell": 2, "keep": 1, "skip": 1, "stop": 1})
    keys |= {"replicas_every": draws.pick({0: 2, 1: 1, 2: 1}), "checksums": sums and draws.maybe(0.4)}
    return {f"faults.numerics.{key}": value for key, value in keys.items()}


def _engine(draws: Draws) -> Keys:
    stage = draws.choice([1, 2, 3])
    offload = draws.pick({"none": 2, "optimizer": 1, "all": 1 if stage == 3 else 0})
    return {"parallel.data.deepspeed.stage": stage, "parallel.data.deepspeed.offload": offload}


def _optimizer(draws: Draws) -> Keys:
    place = draws.pick({"none": 3, "host": 1, "disk": 0.5, "auto": 0.2})
    keys: Keys = {"memory.offload_optimizer": place}
    if place != "none":
        keys["memory.optimizer_stride"] = draws.choice(["auto", 0, 1, 2, 3])
        keys |= {"memory.offload_disk": "/tmp"} if place == "disk" else {}
        keys["memory.optimizer_subgroup_mib"] = draws.choice([0.001, 0.1, 64])
        keys |= {"hardware.memory_gib": draws.choice([0.002, 0.01, 1])} if place == "auto" else {}
    return keys


def _recompute(draws: Draws, model: Mapping[str, object]) -> Keys:
    keys: Keys = {"recompute": draws.pick({"none": 2, "full": 1, "selective": 1.5, "auto": 1})}
    if keys["recompute"] == "selective":
        missing = {"latent": "model.mla.kv_rank" not in model, "moe": not model.get("model.moe.experts")}
        parts = [part for part in LAYER_PARTS if not missing.get(part) and draws.maybe(0.6)]
        keys["recompute_parts"] = parts or ["norm"]
    if keys["recompute"] in ("full", "selective") and draws.maybe(0.3):
        keys |= {"recompute_every": draws.choice([1, 2, 3]), "recompute_layers": draws.choice([None, 1, 2])}
    if TOKEN_WISE.intersection(keys.get("recompute_parts", TOKEN_WISE)) and keys["recompute"] in ("selective", "auto"):
        keys["token_share"] = draws.pick({"none": 2, 0.3: 0.5, 0.7: 0.5, "auto": 1})
    planned = keys["recompute"] == "auto" or keys.get("token_share") == "auto"
    limit = {"hardware.memory_gib": draws.choice([0.001, 0.002, 0.005, 1])} if planned else {}
    return {f"memory.{key}": value for key, value in keys.items()} | limit


def _experts(draws: Draws, degrees: Mapping[str, int], experts: int, ffn: int) -> Keys:
    ranks = degrees["tp"] * degrees["cp"] * degrees["dp"]
    ep = draws.choice(common_divisors(ranks, experts))
    if draws.maybe(0.5):
        ep = common_divisors(ranks, experts)[-1]
    etp = draws.choice(common_divisors(ranks // ep, ffn))
    keys: Keys = {"parallel.ep": ep, "parallel.etp": etp}
    keys["model.moe.dispatcher"] = draws.pick({"all_to_all": 3, "all_gather": 1})
    keys["model.moe.overlap_chunks"] = draws.pick({1: 4, 2: 1, 3: 0.5, "auto": 0.5})
    keys["model.moe.compute"] = draws.pick({"auto": 5, "loop": 1, "bmm": 0.5, "grouped_mm": 0.5})
    return keys


def _pipeline(draws: Draws, pp: int, layers: int) -> Keys:
    schedule = draws.choice(list(SCHEDULES))
    fixed = SCHEDULES[schedule].chunks
    chunks = draws.choice([2, 2, 3, 1]) if fixed is None else fixed
    keys: Keys = {"schedule": schedule}
    if fixed is None or draws.maybe(0.3):
        keys["chunks"] = chunks
    if SCHEDULES[schedule].balanced and draws.maybe(0.5):
        keys |= {"vocab": "balanced", "vocab_barriers": draws.choice([1, 2])}
    if schedule == "gis" and draws.maybe(0.4):
        keys["group"] = draws.randint(-(-pp // 2), pp)
    if schedule == "interleaved" and draws.maybe(0.4):
        keys["group"] = draws.randint(pp, pp + 2)
    if draws.maybe(0.5):
        keys["layers"] = draws.parts(layers, pp * chunks)
    return {f"parallel.pipeline.{key}": value for key, value in keys.items()}


def _context(draws: Draws, *, hybrid: bool) -> Keys:
    keys: Keys = {"method": draws.choice(list(CONTEXT_METHODS))}
    if not hybrid and draws.maybe(0.6):
        keys["placement"] = draws.choice(["zigzag", "contiguous", "by_length"])
    method = CONTEXT_METHODS[keys["method"]]
    if method.duplex and draws.maybe(0.3):
        keys["duplex"] = True
    if method.exchanges == "inner" and draws.maybe(0.4):
        keys["inner"] = draws.choice([1, 2])
    return {f"parallel.context.{key}": value for key, value in keys.items()}
