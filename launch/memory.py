"""What a rank will need of its device's memory, by closed formula; with a pipeline, the rank that needs most.

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

and once 3 N h / t around the final norm and the head; with memory.recompute=full only N h / t per layer. A rank of a
pipeline holds those of its stages for as many micro-batches as its program has in flight. A balanced vocabulary adds
N (V / (t pp) + h) from the head's forward to its gradient. Working memory is the larger of two moments: the head with
the logits of one chunk of tokens (all tokens where it is balanced), and the backward pass of one feed-forward network
(of one whole layer with recompute).

Not counted: the device's context, communication buffers, fragmentation, attention's own workspace.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..configs import Config, ModelConfig
from ..configs.schema import AdamWConfig, SgdConfig
from ..models.transformer import Part
from ..parallel.pipeline.memory import ActivationBytes, peak_bytes
from ..trainer.pipeline import Pipeline, compute_program

GIB = 2**30
HEAD_CHUNK = 1024
"""Tokens whose logits the head holds at once (`parallel.vocab.VocabHead`)."""
_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}


@dataclass(frozen=True, kw_only=True)
class LocalParameters:
    """Parameters of one rank after tensor and pipeline parallelism."""

    layer: int
    """Of one transformer layer."""
    rest: int
    """Embedding, learned positions, final norm and head."""
    total: int
    """All of them."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank."""

    rank: int
    """On the pipeline axis."""
    local: LocalParameters
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


def local_parameters(model: ModelConfig, tp: int, part: Part | None = None, *, shared: int = 1) -> LocalParameters:
    """Parameters of one rank; the model is resolved.

    Args:
        model: the whole model.
        tp: tensor parallel ranks.
        part: what the rank's stages hold of it; none: everything.
        shared: pipeline ranks that share the vocabulary.
    """
    part = Part(tuple(range(model.layers))) if part is None else part
    w, h = _widths(model, tp), model.hidden
    norm = h * (2 if model.norm == "layer" else 1)
    head_dim = model.head_dim or h // model.heads
    matrices = 3 if model.activation == "swiglu" else 2
    layer = h * (2 * w.q + 2 * w.kv) + matrices * h * w.ffn + 2 * norm
    layer += (w.q + 2 * w.kv) * model.qkv_bias + h * model.out_bias + 2 * head_dim * model.qk_norm
    layer += ((matrices - 1) * w.ffn + h) * model.ffn_bias
    # A tied table stands on the last stage too, unless that is on the first one's rank.
    tables = (part.embeds or part.predicts) if model.tied else part.embeds + part.predicts
    rest = norm * part.ends + w.vocab // shared * h * tables
    rest += (model.max_positions or 0) * h if model.position == "learned" and part.begins else 0
    return LocalParameters(layer=layer, rest=rest, total=len(part.layers) * layer + rest)


def estimate(cfg: Config) -> Memory:
    """Memory of one rank of a resolved job, of the one that needs most."""
    return max(per_rank(cfg), key=lambda memory: memory.total)


def per_rank(cfg: Config) -> list[Memory]:
    """Memory of each rank of the pipeline axis."""
    pipeline = Pipeline.of(cfg)
    shared = cfg.parallel.pp if pipeline.split.balanced else 1
    activations = _activations(cfg, pipeline)
    found = []
    for rank, bytes_held in enumerate(activations):
        part = pipeline.split.part(pipeline.stages_of(rank))
        local = local_parameters(cfg.model, cfg.parallel.tp, part, shared=shared)
        found.append(_on_rank(cfg, rank, part, local, bytes_held))
    return found


def _on_rank(cfg: Config, rank: int, part: Part, local: LocalParameters, activations: int) -> Memory:
    p, t = cfg.parallel, cfg.train
    dp = p.dp or 1
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
        rank=rank,
        local=local,
        parameters=parameters,
        gradients=gradients,
        masters=masters,
        states=states,
        gathered=gathered,
        activations=activations,
        working=_working(cfg, part, bits, precise),
    )


def layer_elements(cfg: Config) -> int:
    """Elements that the forward pass of a micro-batch through one layer makes for backward on one rank."""
    m, w, stream = cfg.model, _widths(cfg.model, cfg.parallel.tp), _stream(cfg)
    tokens = _tokens(cfg)
    attention = tokens * (2 * w.q + 2 * w.kv + (w.q + w.kv) * m.qk_norm)
    ffn = tokens * w.ffn * (3 if m.activation == "swiglu" else 2)
    return 4 * stream + attention + ffn


def activation_elements(cfg: Config, layers: int | None = None, *, ends: bool = True) -> int:
    """Elements that the forward pass of a micro-batch keeps for backward on one rank.

    Args:
        cfg: the job.
        layers: how many it passes; none: all.
        ends: it passes the final norm and the head.
    """
    each = _stream(cfg) if cfg.memory.recompute == "full" else layer_elements(cfg)
    return (cfg.model.layers if layers is None else layers) * each + 3 * _stream(cfg) * ends


def _activations(cfg: Config, pipeline: Pipeline) -> list[int]:
    """Bytes of all activations in flight on each rank of the pipeline axis, at the most."""
    p, t = cfg.parallel, cfg.train
    bits, layers = _BYTES[t.dtype], pipeline.split.layers
    microbatches = max(1, t.global_batch // (t.micro_batch * (p.dp or 1)))
    if p.pipeline.schedule != "gpipe":
        # All others are in their steady state by then.
        microbatches = min(microbatches, 4 * p.pp + 2 * (p.pipeline.group or 0))
    head = 0
    if pipeline.split.balanced:
        head = _tokens(cfg) * (_widths(cfg.model, p.tp).vocab // p.pp + cfg.model.hidden) * bits
    sizes = ActivationBytes(
        activation=tuple(
            float(activation_elements(cfg, len(mine), ends=stage == len(layers) - 1) * bits)
            for stage, mine in enumerate(layers)
        ),
        head=(float(head),),
    )
    return [int(peak) for peak in peak_bytes(compute_program(cfg, pipeline, microbatches), sizes)]


def _tokens(cfg: Config) -> int:
    return cfg.train.micro_batch * cfg.train.seq_len // cfg.parallel.cp


def _stream(cfg: Config) -> int:
    return _tokens(cfg) * cfg.model.hidden // cfg.parallel.tp


def _working(cfg: Config, part: Part, bits: int, precise: int) -> int:
    w, tokens = _widths(cfg.model, cfg.parallel.tp), _tokens(cfg)
    balanced = cfg.parallel.pp > 1 and cfg.parallel.pipeline.vocab == "balanced"
    head = 0
    if part.predicts:
        at_once, vocab = (tokens, w.vocab // cfg.parallel.pp) if balanced else (min(HEAD_CHUNK, tokens), w.vocab)
        # Logits, their precise copy and their gradient; the tokens' hidden states and the gradients of those.
        head = at_once * vocab * (bits + 2 * precise) + 2 * tokens * cfg.model.hidden * bits
    layer = layer_elements(cfg) * bits if cfg.memory.recompute == "full" else 0
    ffn = (3 * w.ffn + 2 * cfg.model.hidden) * tokens * bits
    return max(head, ffn + layer)


def _states_per_parameter(cfg: Config) -> int:
    match cfg.optim:
        case AdamWConfig():
            return 2
        case SgdConfig(momentum=momentum):
            return 1 if momentum else 0
        case _:
            return 0
