"""The `model` section: the decoder-only transformer with dense or mixture-of-experts layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from .tables.derived import DERIVED, Derived
from .tables.families import FAMILIES
from .tables.named import Named

MAX_OVERLAP_CHUNKS = 8
"""The most parts into which a layer's tokens are cut on their way to the experts."""


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding."""

    theta: float = 10000.0
    """Base of the geometric series of wavelengths."""
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    """How wavelengths are stretched for contexts longer than the original one."""
    factor: float = 1.0
    """Ratio of the new context length to the original one."""
    original_positions: int = 8192
    """Context length, in tokens, that the unscaled model was trained with."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_positions / low_freq_factor are stretched by the whole factor."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_positions / high_freq_factor are left alone."""
    beta_fast: float = 32.0
    """yarn: dimensions that turn more often than this within the original context are left alone."""
    beta_slow: float = 1.0
    """yarn: dimensions that turn less often than this are stretched by the whole factor."""
    attention_factor: Derived[float] = DERIVED
    """yarn: multiplier of cos and sin; derived as 0.1 ln(factor) + 1."""
    truncate: bool = True
    """yarn: the borders between the bands are rounded to whole dimensions."""
    score_factor: float = 1.0
    """Multiplier of all attention scores beside 1 / sqrt(head_dim) (DeepSeek: the square of YaRN's mscale)."""
    interleaved: bool = False
    """Dimensions 2i and 2i + 1 turn together (DeepSeek) instead of i and i + d/2."""


@dataclass(frozen=True, kw_only=True)
class MlaConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    kv_rank: int = 0
    """Width of the compressed keys and values; 0: plain multi-head attention."""
    q_rank: int | None = None
    """Width of the compressed queries; none: queries are not compressed."""
    nope_dim: int = 128
    """Width of the part of a query or key head without positions."""
    rope_dim: int = 64
    """Width of the part with rotary positions; its key is shared by all heads."""
    value_dim: int = 128
    """Width of a value head."""


@dataclass(frozen=True, kw_only=True)
class LinearAttentionConfig:
    """Gated linear attention (GLA, arXiv 2312.06635): a decaying state of key_dim x value_dim numbers per head."""

    key_dim: int = 64
    """Width of a query or key head; each of its dimensions has a decay of its own."""
    value_dim: int = 128
    """Width of a value head."""
    gate_rank: int = 16
    """Rank of the projection that the decays come from."""
    chunk: int = 64
    """Tokens that are computed together, a power of two; the result does not depend on it."""


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Which experts a token goes to, and how their load is kept even. Scores are computed in fp32."""

    name: Literal["top_k", "expert_choice", "sinkhorn"] = "top_k"
    """top_k: each token takes its best experts; expert_choice: each expert its best tokens (not causal); sinkhorn:
    top_k of scores balanced over the microbatch."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """How logits become scores."""
    normalize: bool = True
    """The weights of a token's experts are divided by their sum (with softmax: the softmax of the selected logits)."""
    scale: float = 1.0
    """Multiplier of the weights."""
    groups: int = 1
    """Groups of experts; with more than one a token goes to experts of the `groups_kept` best groups only."""
    groups_kept: Derived[int] = DERIVED
    """Groups that a token may use; derived: all."""
    group_members: int = 2
    """A group's score is the sum of so many of its best members' scores."""
    logit_bias: bool = False
    """A learned bias on the logits."""
    selection_bias: bool = False
    """Balance without a loss: a bias per expert, for the selection only, moves against its load after every step."""
    bias_rate: float = 1e-3
    """Step of the selection bias."""
    null_experts: int = 0
    """Experts that do nothing and cost nothing (AdaMoE): a token's number of experts adapts."""
    jitter: float = 0.0
    """In training the router's input is multiplied by uniform noise from 1 − jitter to 1 + jitter."""
    aux_loss: float = 0.0
    """Coefficient of the load-balancing loss (Switch Transformer); 0: none."""
    aux_level: Literal["micro_batch", "sequence", "global_batch"] = "micro_batch"
    """Over which tokens the load is balanced; global_batch takes the load of the step before."""
    z_loss: float = 0.0
    """Coefficient of the mean square of log-sum-exp of the logits; 0: none."""


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Mixture-of-experts layers instead of feed-forward networks."""

    experts: int = 0
    """Routed experts of a layer; 0: a dense model."""
    top_k: int = 2
    """Experts per token (expert_choice: on average)."""
    ffn: Derived[int] = DERIVED
    """Inner width of an expert; derived: model.ffn."""
    shared: int = 0
    """Inner width of the shared expert that every token passes (several of them: their sum); 0: none."""
    shared_gate: bool = False
    """The shared expert's output is multiplied by a learned sigmoid gate."""
    bias: bool = False
    """Bias on the experts' matrices."""
    dense_layers: int = 0
    """So many first layers have a dense feed-forward network of width model.ffn."""
    every: int = 1
    """After those, every so many-th layer is a mixture of experts and the others are dense."""
    router: RouterConfig = field(default_factory=RouterConfig)
    """Routing and balance."""
    dispatcher: Literal["all_to_all", "all_gather", "deepep"] = "all_to_all"
    """How tokens reach the ranks of their experts; all_gather is the simple one that others are checked against."""
    capacity_factor: float | None = None
    """Tokens per expert are limited to this times the even share, the rest is dropped; none: nothing is dropped."""
    capacity_scope: Literal["local", "micro_batch"] = "micro_batch"
    """The limit holds for the tokens of one rank (which depends on the layout), or of the whole microbatch."""
    drop: Literal["probability", "position"] = "probability"
    """Which tokens a full expert keeps: those with the largest weights or the first ones."""
    pad: bool = False
    """Every expert gets exactly its capacity of rows, so that all shapes are known before."""
    weigh: Literal["before", "after"] = "after"
    """Whether an expert's weight is multiplied before or after its second matrix (before keeps less for backward)."""
    compute: Literal["auto", "loop", "grouped_mm", "bmm"] = "auto"
    """How the experts' matrices are multiplied; auto: the fastest for device, type and sizes."""
    overlap_chunks: Literal["auto"] | int = 1
    """Tokens are dispatched in 1 to 8 chunks, each one's transfer behind another one's compute; auto: by trial."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The decoder-only transformer."""

    preset: str | None = None
    """Name of a model in presets/models; the keys below override it."""
    family: Annotated[str, Named(FAMILIES)] = "llama"
    """Hugging Face names and sharding plan; also sets the defaults of presets/families/FAMILY.yaml."""
    layers: int
    """Number of transformer layers."""
    hidden: int
    """Width of the residual stream."""
    heads: int
    """Number of query heads."""
    kv_heads: Derived[int] = DERIVED
    """Number of key and value heads; derived: heads."""
    head_dim: Derived[int] = DERIVED
    """Width of a head; derived: hidden / heads."""
    ffn: int
    """Inner width of the feed-forward network."""
    vocab: Derived[int] = DERIVED
    """Vocabulary size; derived: the tokenizer's, where it is built in or a file."""
    vocab_used: int | None = None
    """Token ids in use: what the vocabulary has beyond them is padding, never predicted, cut off by an export; none:
    all. Derived: the vocabulary of checkpoint.init, where it is smaller."""
    norm: Literal["rms", "layer"] = "rms"
    """Normalisation of the residual stream."""
    norm_impl: Literal["auto", "torch", "apex"] = "auto"
    """auto: apex's kernels, checked at the start, where they are installed and there is a GPU; else ours."""
    norm_eps: float = 1e-5
    """Added to the mean square (rms) or the variance (layer)."""
    position: Literal["rope", "learned"] = "rope"
    """Rotary embedding of queries and keys, or a learned table added to the token embedding."""
    max_positions: Derived[int] = DERIVED
    """Rows of the learned table, or the context recorded on export, in tokens; derived: train.seq_len."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Rotary embedding; unused with position=learned."""
    activation: Literal["swiglu", "swiglu_clipped", "gelu", "gelu_tanh"] = "swiglu"
    """Feed-forward non-linearity; the swiglus have a gate (clipped: GPT-OSS's), the others have none."""
    qk_norm: bool = False
    """RMSNorm of every query and key head before the rotary embedding."""
    qk_norm_whole: bool = False
    """With qk_norm: one norm over all heads together (OLMoE)."""
    mla: MlaConfig = field(default_factory=MlaConfig)
    """Latent attention; unused with kv_rank=0."""
    sinks: bool = False
    """A learned logit per head takes part in every softmax of attention and belongs to no key (GPT-OSS)."""
    qkv_bias: bool = False
    """Bias on the query, key and value projections."""
    out_bias: bool = False
    """Bias on the attention output projection."""
    ffn_bias: bool = False
    """Bias on the feed-forward projections."""
    window: int | None = None
    """Sliding attention window in tokens, the query's own included; none: full causal attention."""
    window_every: int = 1
    """The window holds in layers 0, n, 2n, …; the others see everything."""
    attention_every: int = 1
    """Every so many-th layer (n − 1, 2n − 1, …) has softmax attention, the others linear attention; 1: all softmax."""
    linear: LinearAttentionConfig = field(default_factory=LinearAttentionConfig)
    """Linear attention, of as many heads as the softmax layers' queries; unused with attention_every=1."""
    moe: MoeConfig = field(default_factory=MoeConfig)
    """Mixture of experts; unused with experts=0."""
    mtp: int = 0
    """Multi-token prediction modules after the last layer (DeepSeek-V3, section 2.2)."""
    mtp_loss: float = 0.3
    """Weight of their mean loss."""
    tied: bool = False
    """The head uses the embedding's weight."""
    init_std: float = 0.02
    """Standard deviation of initial weights; output projections get init_std / sqrt(2 layers)."""
    dropout: float = 0.0
    """Dropout of the embedding and of each residual branch, drawn per (seed, step, sample, layer)."""

    @property
    def used_vocab(self) -> int:
        """How many token ids are in use."""
        return self.vocab if self.vocab_used is None else self.vocab_used

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the mixture-of-experts layers."""
        if not self.moe.experts:
            return ()
        first, every = self.moe.dense_layers, self.moe.every
        return tuple(i for i in range(first, self.layers) if (i - first + 1) % max(1, every) == 0)

    @property
    def linear_layers(self) -> tuple[int, ...]:
        """Indices of the layers with linear attention."""
        return tuple(i for i in range(self.layers) if (i + 1) % max(1, self.attention_every))

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """`moe_layers` and, as further layers, those of the prediction modules, where the model has experts."""
        ahead = range(self.layers, self.layers + self.mtp) if self.moe.experts else ()
        return (*self.moe_layers, *ahead)

    def window_of(self, layer: int) -> int | None:
        """The sliding window of one layer, if it has one."""
        return self.window if layer % max(1, self.window_every) == 0 else None
