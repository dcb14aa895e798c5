"""The parts of a layer that can be made again by themselves in the backward pass (`memory.recompute_parts`)."""

LAYER_PARTS = {
    "norm": "what norms give, from what they read",
    "activation": "the activation function's product in dense and shared networks, from what it reads",
    "attention": "queries, keys and values, from the norm's output",
    "latent": "queries, keys and values of latent attention, from the latents",
    "ffn": "gate and up of dense and shared networks, from the norm's output",
    "moe": "gate and up of routed experts, from the rows that were sent to them",
}
"""Name to what it makes again."""

TOKEN_WISE = frozenset(LAYER_PARTS) - {"moe"}
"""Those whose rows are tokens, so that they can be made again for some of them (`memory.token_share`)."""

FOREIGN_PARTS = {
    "layernorm": "norm",
    "rmsnorm": "norm",
    "act": "activation",
    "swiglu": "activation",
    "qkv": "attention",
    "mla_up_proj": "latent",
    "mlp": "ffn",
    "shared_experts": "ffn",
    "experts": "moe",
}
"""What other frameworks call them."""
