"""Random models: the families, and models that mix what the families have."""

from __future__ import annotations

from tests.fuzz.draws import Draws, Keys, common_divisors

FAMILIES = {
    "llama": 2.5,
    "mistral": 1.5,
    "qwen2": 1.5,
    "qwen3": 1.5,
    "gpt2": 2.5,
    "mixtral": 1.5,
    "qwen2_moe": 1.5,
    "qwen3_moe": 1.5,
    "olmoe": 1,
    "deepseek_v2": 1.5,
    "deepseek_v3": 2,
    "gpt_oss": 1.5,
    "hybrid": 2.5,
    "mixed": 3,
}
"""`hybrid` has linear attention in most layers; `mixed` has anything."""
WITH_EXPERTS = {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss"}


def draw_model(draws: Draws, *, upcycled: bool = False) -> tuple[str, Keys]:
    """(family of the tally, keys of the `model` section).

    Args:
        upcycled: it has experts that can be made of the same model without.
    """
    families = FAMILIES if not upcycled else {f: w for f, w in FAMILIES.items() if f in WITH_EXPERTS | {"mixed"}}
    family = draws.pick(families)
    model: Keys = {"family": "llama" if family in ("hybrid", "mixed") else family}
    heads = draws.pick({4: 6, 8: 2, 6: 2, 2: 0.5})
    model["heads"] = heads
    model["hidden"] = heads * 8
    model["layers"] = draws.pick({1: 0.5, 2: 2, 3: 2, 4: 3, 5: 1, 6: 1, 8: 1})
    model["ffn"] = draws.pick({32: 2, 48: 2, 64: 1, 96: 1})
    model["init_std"] = draws.pick({0.1: 3, 0.02: 1})
    if family != "gpt2" and not family.startswith("deepseek"):
        model["kv_heads"] = draws.choice(common_divisors(heads))
        if family not in ("olmoe",) and draws.maybe(0.2):
            model["head_dim"] = draws.choice([4, 16])
    model |= _attention(draws, family)
    if family in WITH_EXPERTS or upcycled or (family in ("hybrid", "mixed") and draws.maybe(0.35)):
        model |= _experts(draws, family, model["layers"])
    if upcycled:
        model |= _upcycled(draws, model)
    if family.startswith("deepseek") or (family == "mixed" and draws.maybe(0.3)):
        model["mtp"] = draws.pick({0: 2, 1: 2, 2: 1})
    if draws.maybe(0.15):
        model["dropout"] = 0.1
    if family in ("llama", "qwen2", "qwen3", "mixed", "hybrid") and draws.maybe(0.3):
        model["tied"] = True
    return family, {f"model.{key}": value for key, value in model.items()}


def _attention(draws: Draws, family: str) -> Keys:
    if family.startswith("deepseek"):
        return {
            "mla.kv_rank": draws.choice([8, 16]),
            "mla.q_rank": draws.choice([None, 12]),
            "mla.nope_dim": draws.choice([4, 8]),
            "mla.rope_dim": draws.choice([4, 8]),
            "mla.value_dim": draws.choice([4, 8]),
        } | _rope(draws)
    keys: Keys = {} if family == "gpt2" else _rope(draws)
    if family in ("mistral", "mixtral", "qwen3_moe", "gpt_oss") or draws.maybe(0.2):
        keys["window"] = draws.pick({None: 1, 3: 1, 5: 1, 8: 1, 100: 0.3})
    if family == "hybrid":
        keys |= {
            "attention_every": draws.choice([2, 3, 4]),
            "linear.key_dim": draws.choice([4, 8]),
            "linear.value_dim": draws.choice([4, 8]),
            "linear.gate_rank": 4,
            "linear.chunk": draws.choice([1, 4, 8, 16, 64]),
        }
    if family in ("mixed", "hybrid"):
        keys |= {
            "norm": draws.pick({"rms": 3, "layer": 1}),
            "activation": draws.pick({"swiglu": 2, "swiglu_clipped": 1, "gelu": 1, "gelu_tanh": 1}),
            "position": draws.pick({"rope": 4, "learned": 1}),
            "sinks": draws.maybe(0.3),
            "qkv_bias": draws.maybe(0.3),
            "out_bias": draws.maybe(0.3),
            "ffn_bias": draws.maybe(0.3),
            "qk_norm": draws.maybe(0.3),
            "window_every": draws.choice([1, 2, 3]),
        }
        keys["qk_norm_whole"] = keys["qk_norm"] and draws.maybe(0.5)
    return keys


def _rope(draws: Draws) -> Keys:
    scaling = draws.pick({"none": 4, "linear": 1, "llama3": 1, "yarn": 1})
    if scaling == "none":
        return {}
    return {"rope.scaling": scaling, "rope.factor": 2.0, "rope.original_positions": 16}


def _experts(draws: Draws, family: str, layers: int) -> Keys:
    experts = draws.pick({4: 4, 8: 3, 6: 1, 3: 0.5, 16: 0.5})
    moe: Keys = {
        "experts": experts,
        "top_k": draws.pick({1: 1, 2: 4, 3: 1}),
        "ffn": draws.choice([16, 32, 48]),
        "weigh": draws.choice(["before", "after"]),
    }
    if family in ("qwen2_moe", "deepseek_v2", "deepseek_v3") or draws.maybe(0.2):
        moe["shared"] = moe["ffn"] * draws.choice([1, 2])
    if family not in ("mixtral", "olmoe", "gpt_oss"):
        moe["dense_layers"] = draws.pick({0: 3, 1: 2, layers: 0.2})
        moe["every"] = draws.pick({1: 4, 2: 1, 3: 0.5})
    if family in ("mixed", "hybrid"):
        moe |= {"bias": draws.maybe(0.3), "shared_gate": draws.maybe(0.3)}
    router = _router(draws, family, experts)
    moe |= {f"router.{key}": value for key, value in router.items()}
    moe |= _capacity(draws, router, experts, moe["top_k"])
    if moe["top_k"] == 1 and router.get("score") == "sigmoid":
        moe["router.normalize"] = False  # the weight would be s / s, whose gradient is nothing but rounding
    return {f"moe.{key}": value for key, value in moe.items()}


def _upcycled(draws: Draws, model: Keys) -> Keys:
    """What makes the experts of a model parts of its dense networks."""
    granularity = draws.choice([1, 1, 2])
    experts = granularity * draws.choice([2, 3, 4])
    per_token = granularity * draws.choice([1, 2])
    keys: Keys = {
        "ffn": model.get("moe.shared", 0) + granularity * model["moe.ffn"],
        "moe.experts": experts,
        "moe.top_k": per_token,
        "moe.router.name": "top_k",
        "moe.router.normalize": True,
        "moe.router.null_experts": 0,
        "moe.router.groups": 1,
        "moe.router.groups_kept": 1,
    }
    if per_token == 1:
        keys["moe.router.score"] = "softmax"
    if model.get("ffn_bias"):
        keys["moe.bias"] = True
    if model.get("moe.capacity_scope") == "local":
        keys["moe.capacity_factor"] = float(experts)
    return keys


def _router(draws: Draws, family: str, experts: int) -> Keys:
    router: Keys = {}
    if family.startswith("deepseek") and draws.maybe(0.5):
        router["groups"] = draws.choice([g for g in common_divisors(experts) if experts // g >= 2 or g == 1])
        router["groups_kept"] = draws.randint(1, router["groups"])
    free = family == "mixed" or draws.maybe(0.4)
    if not free:
        return router
    router["name"] = draws.pick({"top_k": 3, "expert_choice": 1, "sinkhorn": 1})
    if router["name"] != "top_k":
        router = {"name": router["name"]}
    elif router.get("groups", 1) == 1:
        router["null_experts"] = draws.pick({0: 3, 1: 0.5, 4: 0.5})
    router["score"] = draws.choice(["softmax", "sigmoid"])
    router["normalize"] = draws.maybe(0.6)
    router["scale"] = draws.pick({1.0: 3, 2.5: 1})
    router["logit_bias"] = draws.maybe(0.2)
    router["jitter"] = draws.pick({0.0: 4, 0.05: 1})
    router["z_loss"] = draws.pick({0.0: 2, 0.01: 1})
    router["selection_bias"] = router["name"] != "expert_choice" and draws.maybe(0.3)
    router["aux_loss"] = draws.pick({0.0: 1, 0.05: 2}) if router["name"] == "top_k" else 0.0
    router["aux_level"] = draws.choice(["micro_batch", "sequence", "global_batch"])
    return router


def _capacity(draws: Draws, router: Keys, experts: int, top_k: int) -> Keys:
    if router.get("name") == "sinkhorn" or draws.maybe(0.65):
        return {}
    if draws.maybe(0.25):
        # What is dropped locally depends on the layout; with room for all tokens nothing is.
        return {"capacity_factor": float(experts), "capacity_scope": "local", "pad": draws.maybe(0.7)}
    return {"capacity_factor": draws.choice([0.7, 1.0, 1.5]), "drop": draws.choice(["probability", "position"])}
