"""transformers' MixtralForCausalLM (sdpa) in one process: 8 experts in every layer, 2 of them for each token.

A policy is a dtype policy and how experts are computed, as `fp32-grouped_mm`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from workload import Workload, run_worker

from peers.common import make_model, make_update
from peers.transformers_one import make_step


def build(workload: Workload, policy: str) -> Callable[[Tensor], Tensor]:
    """The training step: global batch to loss."""
    dtype, implementation = policy.split("-")
    model = make_model(workload, dtype, experts=8, top_k=2, implementation=implementation)
    return make_step(model, make_update(model, workload, dtype), dtype)


if __name__ == "__main__":
    run_worker(build)
