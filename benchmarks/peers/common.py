"""The peers' model and dtype policies.

Policies: `fp32`; `masters` (bf16 parameters; fp32 masters, Adam states and gradient sums: what Pentad does); `plain`
(bf16 everything); `autocast` (fp32 parameters under torch.autocast); `mixed` (FSDP2's MixedPrecisionPolicy: fp32
shards, bf16 compute, fp32 reduction).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel
from workload import Workload


def make_model(
    workload: Workload, policy: str, experts: int = 0, top_k: int = 2, implementation: str = "grouped_mm"
) -> PreTrainedModel:
    """transformers' model with its own initialisation, in the policy's parameter dtype.

    Args:
        workload: the sizes.
        policy: see above.
        experts: in every layer (Mixtral), each of width workload.ffn; 0: a dense Llama.
        top_k: experts of a token.
        implementation: transformers' name for how experts are computed: grouped_mm, batched_mm or eager (a loop).
    """
    options: dict[str, Any] = dict(
        vocab_size=workload.vocab,
        hidden_size=workload.hidden,
        intermediate_size=workload.ffn,
        num_hidden_layers=workload.layers,
        num_attention_heads=workload.heads,
        num_key_value_heads=workload.kv_heads,
        max_position_embeddings=workload.seq_len,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    if experts:
        options |= {"num_local_experts": experts, "num_experts_per_tok": top_k, "sliding_window": None}
        options |= {"experts_implementation": implementation}
        model = MixtralForCausalLM(MixtralConfig(**options))
    else:
        model = LlamaForCausalLM(LlamaConfig(**options))
    if policy in ("masters", "plain"):
        # Only parameters: the rotary buffers stay fp32, as from_pretrained(dtype=bfloat16) leaves them.
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    return model.train()


class MasterAdamW:
    """Fused AdamW on fp32 copies of bf16 parameters, with fp32 gradient sums."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], make: Callable[[list[Tensor]], torch.optim.Optimizer]
    ) -> None:
        self.parameters = list(parameters)
        self.masters: list[Tensor] = []
        for parameter in self.parameters:
            master = parameter.detach().float()
            self.masters.append(master)
            parameter.register_post_accumulate_grad_hook(self._collector(master))
        self.optimizer = make(self.masters)

    @staticmethod
    def _collector(master: Tensor) -> Callable[[Tensor], None]:
        def collect(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

        return collect

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.copy_(master)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


def make_update(model: nn.Module, workload: Workload, policy: str) -> Callable[[], None]:
    """What follows the backward pass: clip, fused AdamW, zero_grad."""

    def adamw(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        betas = (workload.beta1, workload.beta2)
        return torch.optim.AdamW(
            parameters, lr=workload.lr, betas=betas, weight_decay=workload.weight_decay, fused=True
        )

    if policy == "masters":
        optimizer: MasterAdamW | torch.optim.Optimizer = MasterAdamW(model.parameters(), adamw)
        clipped = optimizer.masters
    else:
        optimizer, clipped = adamw(model.parameters()), list(model.parameters())

    def update() -> None:
        clip_grad_norm_(clipped, workload.clip)
        optimizer.step()
        optimizer.zero_grad()

    return update


def next_tokens(tokens: Tensor) -> Tensor:
    """Labels (B, T) of tokens (B, T); the last position has none."""
    return torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)


def local_value(loss: Tensor) -> Tensor:
    """A scalar that may be a replicated DTensor, as a plain tensor."""
    return loss.to_local() if isinstance(loss, DTensor) else loss
