"""What a rank will need of its device's memory, by closed formula. Imports no torch.

With N = micro_batch · seq_len tokens of a forward pass, t = tp, r = dp · cp ranks that share what is sharded,
P parameters of one rank, b bytes of train.dtype and m bytes of the precise type (4 for bf16, else b):

    part                ddp               zero1              fsdp
    parameters          P b               P b                P m / r, the masters
    gradients           P m               P m                P m / r; P m while micro-batches accumulate
    masters (bf16)      P m               P m / r            (the parameters)
    optimizer states    s P m             s P m / r          s P m / r       s: 2 AdamW, 1 SGD with momentum, 0 SGD
    gathered layers                                          (the two largest layers + the rest) b

Activations are what backward needs. Elements per layer and rank, with q and k the widths of all query and all key
heads of one rank, f the feed-forward width of one rank, h the hidden size:

    residual stream and norms     4 N h / t         inputs and outputs of both norms (sequence parallel)
    attention                     N (2 q + 2 k)     rotated queries and keys, values, result; N (q + k) for QK-norm
    feed-forward                  3 N f             gate, up, their product (2 N f without a gate)

and once 3 N h / t around the final norm and the head. Working memory is the larger of two moments: the head with the
logits of one chunk of tokens, and the backward pass of one feed-forward network.

Not counted: the device's context, communication buffers, fragmentation, attention's own workspace.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..configs import Config, ModelConfig
from ..configs.schema import AdamWConfig, SgdConfig

GIB = 2**30
HEAD_CHUNK = 1024
"""Tokens whose logits the head holds at once (`parallel.vocab.VocabHead`)."""
_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}


@dataclass(frozen=True, kw_only=True)
class LocalParameters:
    """Parameters of one rank after tensor parallelism."""

    layer: int
    """Of one transformer layer."""
    rest: int
    """Embedding, learned positions, final norm and head."""
    total: int
    """All of them."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank."""

    parameters: int
    gradients: int
    masters: int
    states: int
    gathered: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """The sum of the parts."""
        fixed = self.parameters + self.gradients + self.masters + self.states + self.gathered
        return fixed + self.activations + self.working


@dataclass(frozen=True, kw_only=True)
class _Widths:
    """Widths of one rank's part: query heads together, key heads together, feed-forward, vocabulary."""

    q: int
    kv: int
    ffn: int
    vocab: int


def _widths(model: ModelConfig, tp: int) -> _Widths:
    kv_heads, head_dim = model.kv_heads or model.heads, model.head_dim or model.hidden // model.heads
    # Fewer key heads than ranks: each rank keeps a copy of one.
    return _Widths(
        q=model.heads * head_dim // tp,
        kv=max(1, kv_heads // tp) * head_dim,
        ffn=model.ffn // tp,
        vocab=(model.vocab or 0) // tp,
    )


def local_parameters(model: ModelConfig, tp: int) -> LocalParameters:
    """Parameters of one of `tp` tensor parallel ranks; the model is resolved."""
    w, h = _widths(model, tp), model.hidden
    norm = h * (2 if model.norm == "layer" else 1)
    head_dim = model.head_dim or h // model.heads
    matrices = 3 if model.activation == "swiglu" else 2
    layer = h * (2 * w.q + 2 * w.kv) + matrices * h * w.ffn + 2 * norm
    layer += (w.q + 2 * w.kv) * model.qkv_bias + h * model.out_bias + 2 * head_dim * model.qk_norm
    layer += ((matrices - 1) * w.ffn + h) * model.ffn_bias
    rest = norm + w.vocab * h * (1 if model.tied else 2)
    rest += (model.max_positions or 0) * h if model.position == "learned" else 0
    return LocalParameters(layer=layer, rest=rest, total=model.layers * layer + rest)


def estimate(cfg: Config) -> Memory:
    """Memory of one rank of a resolved job."""
    p, t = cfg.parallel, cfg.train
    dp = p.dp or 1
    local = local_parameters(cfg.model, p.tp)
    share = dp * p.cp
    bits, precise = _BYTES[t.dtype], max(4, _BYTES[t.dtype])
    kept = local.total * precise
    states = kept * _states_per_parameter(cfg)
    accumulates = t.global_batch > t.micro_batch * dp
    match p.data.sharding:
        case "fsdp":
            # FSDP2 keeps the layer in use and the next one gathered, and what is outside the layers all the time.
            gathered = (min(2, cfg.model.layers) * local.layer + local.rest) * bits
            parameters, gradients = kept // share, kept if accumulates else kept // share
            masters, states = 0, states // share
        case sharding:
            divisor = share if sharding == "zero1" else 1
            parameters, gradients, gathered = local.total * bits, kept, 0
            masters, states = (kept // divisor if bits < precise else 0), states // divisor
    return Memory(
        parameters=parameters,
        gradients=gradients,
        masters=masters,
        states=states,
        gathered=gathered,
        activations=activation_elements(cfg) * bits,
        working=_working(cfg, bits, precise),
    )


def activation_elements(cfg: Config) -> int:
    """Elements that one forward pass of a micro-batch keeps for backward on one rank."""
    m, w = cfg.model, _widths(cfg.model, cfg.parallel.tp)
    tokens = cfg.train.micro_batch * cfg.train.seq_len // cfg.parallel.cp
    stream = tokens * m.hidden // cfg.parallel.tp
    attention = tokens * (2 * w.q + 2 * w.kv + (w.q + w.kv) * m.qk_norm)
    ffn = tokens * w.ffn * (3 if m.activation == "swiglu" else 2)
    return m.layers * (4 * stream + attention + ffn) + 3 * stream


def _working(cfg: Config, bits: int, precise: int) -> int:
    w = _widths(cfg.model, cfg.parallel.tp)
    tokens = cfg.train.micro_batch * cfg.train.seq_len // cfg.parallel.cp
    # Logits, their precise copy and their gradient; the tokens' hidden states and the gradients of those.
    head = min(HEAD_CHUNK, tokens) * w.vocab * (bits + 2 * precise) + 2 * tokens * cfg.model.hidden * bits
    ffn = (3 * w.ffn + 2 * cfg.model.hidden) * tokens * bits
    return max(head, ffn)


def _states_per_parameter(cfg: Config) -> int:
    match cfg.optim:
        case AdamWConfig():
            return 2
        case SgdConfig(momentum=momentum):
            return 1 if momentum else 0
        case _:
            return 0
