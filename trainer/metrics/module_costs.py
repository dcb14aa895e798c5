"""What the matrix products of each kind of module compute and move in a step: the roofline that they are held against.

Bytes are those of a product's two factors and its result, once each, for every microbatch: what a device moves at
least that keeps nothing between products. A backward pass has two products for each of the forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...configs.schema import Config
from ...models.costs.flops import mean_pairs, step_flops
from ...models.costs.parameters import active_experts, matrices_of, sizes
from ...parallel.record.modules import BACKWARD, FORWARD

_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
_ATTENTION_MATRICES = 4


@dataclass(frozen=True)
class Work:
    """Of one device in a step.

    Args:
        flops: of matrix products.
        nbytes: that they move at least.
    """

    flops: float
    nbytes: float

    @property
    def intensity(self) -> float:
        """FLOPs for each byte."""
        return self.flops / self.nbytes if self.nbytes else 0.0

    def bound_s(self, flops: float, nbytes: float) -> tuple[float, str]:
        """The least time that it takes, and what sets it: "compute" or "memory".

        Args:
            flops: of a device in a second.
            nbytes: that its memory moves in a second.
        """
        compute, memory = self.flops / flops, self.nbytes / nbytes
        return max(compute, memory), "compute" if compute >= memory else "memory"


def module_work(cfg: Config) -> dict[str, Work]:
    """By label of `parallel.record.modules`; the mean over all devices.

    Args:
        cfg: resolved.
    """
    t, model, ranks = cfg.train, cfg.model, cfg.parallel.ranks
    tokens = t.global_batch * t.seq_len
    flops = step_flops(model, tokens, t.global_batch * mean_pairs(model, [t.seq_len]))
    s, width = sizes(model), _BYTES[t.dtype]
    microbatches = t.global_batch / t.micro_batch
    active, matrices = active_experts(model), matrices_of(model)

    def moved(elements: float, count: int, layers: int, rows: float, copies: float = 1.0) -> float:
        """Of products with `count` matrices of so many elements together, in so many layers."""
        return width * layers * (rows * (count * s.hidden + elements / s.hidden) + microbatches * copies * elements)

    keys = width * tokens * 4 * s.hidden * s.softmax  # queries, keys, values and what comes out of them
    forward = {
        "attention": Work(
            (flops.projections + flops.attention) / 3,
            moved(s.projections, _ATTENTION_MATRICES, s.softmax, tokens)
            + moved(s.linear_projections, _ATTENTION_MATRICES, s.linear, tokens)
            + keys,
        ),
        "ffn": Work(
            (flops.ffn + flops.shared) / 3,
            moved(s.ffn, matrices, s.dense, tokens) + moved(s.shared, matrices, s.routed, tokens),
        ),
        "experts": Work(flops.experts / 3, moved(s.expert, matrices, s.routed, active * tokens, model.moe.experts)),
        "head": Work(flops.head / 3, moved(s.hidden * s.vocab, 1, 1, tokens)),
    }
    found = {}
    for name, work in forward.items():
        if work.flops:
            found[FORWARD + name] = Work(work.flops / ranks, work.nbytes / ranks)
            found[BACKWARD + name] = Work(2 * work.flops / ranks, 2 * work.nbytes / ranks)
    # The head's gradients are made with its loss, chunk by chunk.
    head = found.pop(BACKWARD + "head")
    found[FORWARD + "head"] = Work(
        found[FORWARD + "head"].flops + head.flops, found[FORWARD + "head"].nbytes + head.nbytes
    )
    return found
