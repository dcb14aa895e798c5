"""transformers' LlamaForCausalLM (sdpa) in one process."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel
from workload import Workload, run_worker

from peers.common import make_model, make_update


def make_step(model: PreTrainedModel, update: Callable[[], None], policy: str) -> Callable[[Tensor], Tensor]:
    """Forward, backward, update: global batch to loss."""

    def step(tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=policy == "autocast"):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        update()
        return loss.detach()

    return step


def build(workload: Workload, policy: str) -> Callable[[Tensor], Tensor]:
    """The training step: global batch to loss."""
    model = make_model(workload, policy)
    return make_step(model, make_update(model, workload, policy), policy)


if __name__ == "__main__":
    run_worker(build)
