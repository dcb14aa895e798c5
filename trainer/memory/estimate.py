"""What a rank will need of its device's memory, by closed formula; with a pipeline, the rank that needs most.

With N = micro_batch · seq_len tokens of a forward pass, t = tp, r = dp · cp ranks that share what is sharded,
P parameters of one rank, b bytes of train.dtype and m bytes of the precise type (4 for bf16, else b):

    part                ddp               zero1              fsdp
    parameters          P b               P b                P m / r, the masters
    gradients           P m               P m                P m / r; P m while microbatches accumulate
    masters (bf16)      P m               P m / r            (the parameters)
    optimizer states    s P m             s P m / r          s P m / r       s: 2 AdamW, 1 SGD with momentum, 0 SGD
    gathered layers                                          (the two largest layers + the rest) b

Routed experts are divided by ep and etp, and r is t dp cp / (ep etp) for them.

Activations are what backward needs. Elements per layer and rank, with q and k the widths of all query and all key
heads of one rank, f the feed-forward width of one rank, h the hidden size:

    residual stream and norms     4 N h / t         inputs and outputs of both norms (sequence parallel)
    attention                     N (2 q + 2 k)     rotated queries and keys, values, result; N (q + k) for QK-norm
    latent attention              N (3 q + 2 v)     queries, keys, keys and values expanded (q - p, v), result (v)
                                                    and the narrow vectors, normalised and not, once in t ranks
    linear attention              N (5 k + 5 v)     queries, keys and three times decays (fp32), values, gates, results
                                                    as they are, normalised and gated; the narrow vectors as above
    feed-forward                  3 N f             gate, up, their product (2 N f without a gate)
    experts                       R (2 h + 3 f)     their inputs, inner vectors and results, R = N K etp / t rows;
                                                    R (h + 3 f) with moe.weigh=before
    router                        2 N E / t         logits and scores

The experts' rows are those of an even load (nothing dropped; with moe.pad times moe.capacity_factor): a rank whose
experts are sought after has more. And once 3 N h / t around the final norm and the head; with memory.recompute=full
only N h / t per layer. A rank of a pipeline holds those of its stages for as many microbatches as its program has in
flight, but for those that are on the host then (memory.offload_activations). A balanced vocabulary adds
N (V / (t pp) + h) from the head's forward to its gradient. Working memory is the larger of two moments: the head with
the logits of one chunk of tokens (all tokens where it is balanced), and the backward pass of one feed-forward network
or of the experts of one layer (of one whole layer with recompute).

Not counted: the device's context, communication buffers, fragmentation, attention's own workspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...configs import Config, ModelConfig
from ...configs.schema import AdamWConfig, SgdConfig
from ...configs.tables.context_methods import CONTEXT_METHODS
from ...configs.tables.schedules import SCHEDULES
from ...models.costs.parameters import active_experts, matrices_of
from ...models.costs.parts import Part
from ...parallel.pipeline.memory import ActivationBytes, peak_bytes
from ..pipeline.programs import Pipeline, compute_program, offloaded

GIB = 2**30
HEAD_CHUNK = 1024
"""Tokens whose logits the head holds at once (`parallel.vocab.VocabHead`)."""
_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}


@dataclass(frozen=True, kw_only=True)
class LocalParameters:
    """Parameters of one rank after tensor, expert and pipeline parallelism."""

    layer: int
    """Of its largest transformer layer."""
    experts: int
    """Routed experts of all its layers."""
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
    """Widths of one rank's part: query heads together, key heads together, networks, vocabulary."""

    q: int
    kv: int
    value: int
    """Of all heads' results."""
    ffn: int
    shared: int
    expert: int
    vocab: int


def _widths(model: ModelConfig, tp: int, etp: int = 1) -> _Widths:
    kv_heads, head_dim = model.kv_heads, model.head_dim
    q = model.heads * head_dim // tp
    # Fewer key heads than ranks: each rank keeps a copy of one.
    return _Widths(
        q=q,
        kv=max(1, kv_heads // tp) * head_dim,
        value=model.heads * model.mla.value_dim // tp if model.mla.kv_rank else q,
        ffn=model.ffn // tp,
        shared=model.moe.shared // tp,
        expert=model.moe.ffn // etp,
        vocab=model.vocab // tp,
    )


def local_parameters(
    model: ModelConfig, tp: int, part: Part | None = None, *, shared: int = 1, ep: int = 1, etp: int = 1
) -> LocalParameters:
    """Parameters of one rank; the model is resolved.

    Args:
        model: the whole model.
        tp: tensor parallel ranks.
        part: what the rank's stages hold of it; none: everything.
        shared: pipeline ranks that share the vocabulary.
        ep: ranks that share the experts.
        etp: ranks that share each expert's inner width.
    """
    part = Part(tuple(range(model.layers))) if part is None else part
    w, h, moe = _widths(model, tp, etp), model.hidden, model.moe
    norm = h * (2 if model.norm == "layer" else 1)
    linear = set(model.linear_layers)
    kinds = (_attention_parameters(model, w, tp), _linear_parameters(model, tp))
    choices = moe.experts + moe.router.null_experts
    beside = choices * (h + moe.router.logit_bias)
    if moe.shared:
        beside += _network(model, w.shared, model.ffn_bias) + h * moe.shared_gate
    experts = moe.experts // ep * _network(model, w.expert, moe.bias)
    ahead = range(model.layers, model.layers + model.mtp) if part.ends else ()
    held = (*part.layers, *ahead)
    routed = set(model.routed_layers).intersection(held)
    dense = _network(model, w.ffn, model.ffn_bias)
    layers = [kinds[layer in linear] + 2 * norm + (beside + experts if layer in routed else dense) for layer in held]
    # A table that both ends of a pipeline use stands on both, unless they are on one rank.
    embeds = part.embeds or bool(ahead) or (model.tied and part.predicts)
    tables = embeds + (part.predicts and not model.tied)
    rest = norm * part.ends + w.vocab // shared * h * tables + len(ahead) * (2 * h * h + 3 * norm)
    rest += model.max_positions * h if model.position == "learned" and part.begins else 0
    return LocalParameters(
        layer=max(layers, default=0),
        experts=len(routed) * experts,
        rest=rest,
        total=sum(layers) + rest,
    )


def _network(model: ModelConfig, width: int, bias: bool) -> int:
    matrices = matrices_of(model)
    return matrices * model.hidden * width + ((matrices - 1) * width + model.hidden) * bias


def _attention_parameters(model: ModelConfig, w: _Widths, tp: int) -> int:
    h, mla = model.hidden, model.mla
    found = w.value * h + h * model.out_bias + model.heads // tp * model.sinks
    if mla.kv_rank:
        narrow = mla.kv_rank + mla.rope_dim + (mla.q_rank or 0)
        found += (h + model.qkv_bias) * narrow + (narrow - mla.rope_dim)
        expanded = model.heads // tp * (mla.nope_dim + mla.value_dim)
        return found + mla.kv_rank * expanded + (h if mla.q_rank is None else mla.q_rank) * w.q
    head_dim = model.head_dim
    norms = (w.q + w.kv if model.qk_norm_whole else 2 * head_dim) * model.qk_norm
    return found + (h + model.qkv_bias) * (w.q + 2 * w.kv) + norms


def _linear_parameters(model: ModelConfig, tp: int) -> int:
    keys, values = (model.heads // tp * width for width in (model.linear.key_dim, model.linear.value_dim))
    h, rank = model.hidden, model.linear.gate_rank
    return h * (2 * keys + 3 * values + rank) + (rank + 1) * keys + model.linear.value_dim


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
        p = cfg.parallel
        local = local_parameters(cfg.model, p.tp, part, shared=shared, ep=p.ep, etp=p.etp)
        found.append(_on_rank(cfg, rank, part, local, bytes_held))
    return found


def _on_rank(cfg: Config, rank: int, part: Part, local: LocalParameters, activations: int) -> Memory:
    p, t = cfg.parallel, cfg.train
    dp = p.dp
    share = dp * p.cp
    bits, precise = _BYTES[t.dtype], max(4, _BYTES[t.dtype])
    kept = local.total * precise
    accumulates = t.global_batch > t.micro_batch * dp
    match p.data.sharding:
        case "fsdp":
            # FSDP2 keeps the layer in use and the next one gathered, and what is outside the layers all the time.
            gathered = (min(2, cfg.model.layers) * local.layer + local.rest) * bits
            parameters, gradients = kept // share, kept if accumulates else kept // share
            masters, sharded = 0, kept // share
        case "zero1":
            parameters, gradients, gathered = local.total * bits, kept, 0
            experts = local.experts * precise
            sharded = (kept - experts) // share + experts // expert_replicas(cfg)
            masters = sharded if bits < precise else 0
        case "ddp":
            parameters, gradients, gathered, sharded = local.total * bits, kept, 0, kept
            masters = kept if bits < precise else 0
    states = sharded * _states_per_parameter(cfg)
    if cfg.memory.offload_optimizer != "none":
        masters = states = 0  # on the host
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


def expert_replicas(cfg: Config) -> int:
    """Ranks of a pipeline stage that hold the same experts."""
    p = cfg.parallel
    return max(1, p.tp * p.cp * p.dp // (p.ep * p.etp))


def layer_elements(cfg: Config, layer: int = 0) -> int:
    """Elements that the forward pass of a microbatch through a layer makes for backward on one rank."""
    m, w, tokens, tp = cfg.model, _widths(cfg.model, cfg.parallel.tp, cfg.parallel.etp), _tokens(cfg), cfg.parallel.tp
    inner = matrices_of(m)
    if layer in m.linear_layers:
        attention = _linear_elements(cfg)
    elif m.mla.kv_rank:
        # Gathered latents are expanded again in backward.
        gathers = cfg.parallel.cp > 1 and CONTEXT_METHODS[cfg.parallel.context.method].latent_core
        expanded = 0 if gathers else w.q + m.heads // tp * (m.mla.nope_dim + m.mla.value_dim)
        narrow = 2 * (m.mla.kv_rank + (m.mla.q_rank or 0)) + m.mla.rope_dim
        attention = tokens * (w.q + expanded + w.value) + tokens * narrow // tp
    else:
        attention = tokens * (2 * w.q + 2 * w.kv + (w.q + w.kv) * m.qk_norm)
    if layer not in m.routed_layers:
        return 4 * _stream(cfg) + attention + tokens * w.ffn * inner
    rows = _expert_rows(cfg) * (m.hidden * (1 if m.moe.weigh == "before" else 2) + w.expert * inner)
    router = 2 * tokens * (m.moe.experts + m.moe.router.null_experts) // tp
    return 4 * _stream(cfg) + attention + rows + router + tokens * w.shared * inner


def _linear_elements(cfg: Config) -> int:
    m, tp = cfg.model, cfg.parallel.tp
    keys, values = (m.heads // tp * width for width in (m.linear.key_dim, m.linear.value_dim))
    # The decays, what their logarithm is made of and what it keeps are in fp32 at least.
    precise = 3 * max(1, 4 // _BYTES[cfg.train.dtype])
    return _tokens(cfg) * ((2 + precise) * keys + 5 * values) + _tokens(cfg) * m.linear.gate_rank // tp


def _expert_rows(cfg: Config) -> int:
    """Rows of the experts of one rank in a forward pass at even load."""
    moe, p = cfg.model.moe, cfg.parallel
    padded = moe.capacity_factor if moe.pad and moe.capacity_factor else 1.0
    return round(_tokens(cfg) * active_experts(cfg.model) * padded * p.etp / p.tp)


def activation_elements(cfg: Config, layers: Sequence[int] | None = None, *, ends: bool = True) -> int:
    """Elements that the forward pass of a microbatch keeps for backward on one rank.

    Args:
        cfg: the job.
        layers: indices of those that it passes; none: all.
        ends: it passes the prediction modules, the final norm and the head.
    """
    m, full = cfg.model, cfg.memory.recompute == "full"
    layers = range(m.layers) if layers is None else layers
    if ends:
        layers = (*layers, *range(m.layers, m.layers + m.mtp))
    # A prediction module keeps both of its inputs, joined and not, and then what the head does.
    beside = (3 + 7 * m.mtp) * _stream(cfg) * ends
    return sum(_stream(cfg) if full else layer_elements(cfg, i) for i in layers) + beside


def _activations(cfg: Config, pipeline: Pipeline) -> list[int]:
    """Bytes of all activations in flight on each rank of the pipeline axis, at the most."""
    p, t = cfg.parallel, cfg.train
    bits, layers = _BYTES[t.dtype], pipeline.split.layers
    microbatches = max(1, t.global_batch // (t.micro_batch * p.dp))
    schedule = SCHEDULES.get(p.pipeline_in_use.schedule)
    if schedule is not None and schedule.steady:
        # By then every rank is in its steady state.
        microbatches = min(microbatches, 4 * p.pp + 2 * (p.pipeline.group or 0))
    head = 0
    if pipeline.split.balanced:
        head = _tokens(cfg) * (_widths(cfg.model, p.tp).vocab // p.pp + cfg.model.hidden) * bits
    sizes = ActivationBytes(
        activation=tuple(
            float(activation_elements(cfg, mine, ends=stage == len(layers) - 1) * bits)
            for stage, mine in enumerate(layers)
        ),
        head=(float(head),),
    )
    program = offloaded(cfg, compute_program(cfg, pipeline, microbatches), pipeline)
    return [int(peak) for peak in peak_bytes(program, sizes)]


def _tokens(cfg: Config) -> int:
    return cfg.train.micro_batch * cfg.train.seq_len // cfg.parallel.cp


def _stream(cfg: Config) -> int:
    return _tokens(cfg) * cfg.model.hidden // cfg.parallel.tp


def _working(cfg: Config, part: Part, bits: int, precise: int) -> int:
    w, tokens = _widths(cfg.model, cfg.parallel.tp, cfg.parallel.etp), _tokens(cfg)
    balanced = cfg.parallel.pp > 1 and cfg.parallel.pipeline.vocab == "balanced"
    head = 0
    if part.predicts:
        at_once, vocab = (tokens, w.vocab // cfg.parallel.pp) if balanced else (min(HEAD_CHUNK, tokens), w.vocab)
        # Logits, their precise copy and their gradient; the tokens' hidden states and the gradients of those.
        head = at_once * vocab * (bits + 2 * precise) + 2 * tokens * cfg.model.hidden * bits
    routed = set(cfg.model.routed_layers)
    moments = [0]
    for i in part.layers:
        rows, width = (_expert_rows(cfg), w.expert) if i in routed else (tokens, w.ffn)
        again = layer_elements(cfg, i) if cfg.memory.recompute == "full" else 0
        moments.append(((3 * width + 2 * cfg.model.hidden) * rows + again) * bits)
    return max(head, *moments)


def _states_per_parameter(cfg: Config) -> int:
    match cfg.optim:
        case AdamWConfig():
            return 2
        case SgdConfig(momentum=momentum):
            return 1 if momentum else 0
        case _:
            return 0
