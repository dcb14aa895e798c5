"""The decoder-only transformer, as the config says.

Shapes: B sequences of T tokens, N = B · T, h hidden width, V vocabulary. The residual stream is (N, h). The embedding,
the head with its loss, every projection and the attention core are seams: objects that can be replaced from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..configs.schema import ModelConfig
from ..parallel.kernels.mask import TokenLayout
from ..parallel.kernels.upload import Constant, upload
from ..parallel.recompute import run_part
from ..parallel.vocab import Look, look_up, whole_vocabulary
from .attention import Attention
from .costs.parts import Part
from .dropout import Draws
from .feed_forward import FeedForward
from .linear_attention import LinearAttention
from .mla import LatentAttention
from .moe import Moe
from .mtp import Prediction
from .norms import make_norm
from .rope import angles, frequencies
from .routing.losses import attach
from .sequences import Inputs, Sequences


def attention_of(cfg: ModelConfig, index: int) -> Attention | LatentAttention | LinearAttention:
    """The attention of one layer."""
    if index in cfg.linear_layers:
        return LinearAttention(cfg, index)
    return LatentAttention(cfg, index) if cfg.mla.kv_rank else Attention(cfg, index)


class Layer(nn.Module):
    """Pre-norm residual block: attention, then feed-forward or mixture of experts."""

    def __init__(self, cfg: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.attention_norm = make_norm(cfg)
        self.attention = attention_of(cfg, index)
        self.ffn_norm = make_norm(cfg)
        routed = index in cfg.routed_layers
        self.ffn = None if routed else FeedForward(cfg)
        self.moe = Moe(cfg, index) if routed else None

    def forward(self, x: Tensor, seq: Sequences, draws: Draws | None = None) -> Tensor:
        """x (N, h) → (N, h)."""
        y = self.attention(run_part("norm", self.attention_norm, x), seq)
        x = x + (draws.drop(y, 2 * self.index) if draws else y)
        y = run_part("norm", self.ffn_norm, x)
        if self.moe is not None:
            y = self.moe(y, seq, draws)
        elif self.ffn is not None:
            y = self.ffn(y)
        return x + (draws.drop(y, 2 * self.index + 1) if draws else y)


class Table(nn.Module):
    """A weight matrix that is looked up or multiplied by from outside: (rows, h)."""

    def __init__(self, rows: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, hidden))


class EmbeddingOp(Protocol):
    """tokens (N,) → hidden states (N, h); `local_tokens` picks the matching rows of anything per token."""

    def __call__(self, tokens: Tensor, weight: Tensor) -> Tensor: ...

    def local_tokens(self, x: Tensor) -> Tensor:
        """(B · length, …) → (N, …): the rows of the tokens that are here."""
        ...


class HeadOp(Protocol):
    """Hidden states to logits or to the loss; see `parallel.vocab.VocabHead`."""

    look: Look | None

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (N, h), weight (V, h) → (N, V)."""
        ...

    def loss(self, x: Tensor, weight: Tensor, labels: Tensor, scale: Tensor | float) -> Tensor:
        """x (N, h), weight (V, h), labels (N,) → the scalar sum of all tokens' losses, times `scale`."""
        ...


RunLayer = Callable[[Layer, Tensor, Sequences, Draws | None], Tensor]


def run_layer(layer: Layer, x: Tensor, seq: Sequences, draws: Draws | None) -> Tensor:
    """x (N, h) → (N, h): calls the layer and keeps what its backward needs."""
    return layer(x, seq, draws)


class Transformer(nn.Module):
    """The model, or a part of it. Parameters are uninitialised: see `models.weights.initialise` and `load_hf`."""

    def __init__(self, cfg: ModelConfig, part: Part | None = None) -> None:
        super().__init__()
        part = part or Part(tuple(range(cfg.layers)))
        self.cfg, self.part = cfg, part
        depth = cfg.mtp if part.ends else 0
        table = part.embeds or (part.predicts and cfg.tied) or depth > 0
        self.embed = Table(cfg.vocab, cfg.hidden) if table else None
        learned = cfg.position == "learned" and part.begins
        self.positions = Table(cfg.max_positions, cfg.hidden) if learned else None
        self.layers = nn.ModuleDict({str(i): Layer(cfg, i) for i in part.layers})
        self.norm = make_norm(cfg) if part.ends else None
        self.mtp = nn.ModuleList(Prediction(cfg, Layer(cfg, cfg.layers + k)) for k in range(depth))
        self.head = Table(cfg.vocab, cfg.hidden) if part.predicts and not cfg.tied else None
        self.embedding_op: EmbeddingOp
        self.head_op: HeadOp
        self.embedding_op, self.head_op = whole_vocabulary(cfg.vocab, cfg.used_vocab)
        self.run_layer: RunLayer = run_layer
        turning = cfg.mla.rope_dim if cfg.mla.kv_rank else cfg.head_dim
        self._frequencies: tuple[Constant, float] | None = None
        if cfg.position == "rope":
            freq, factor = frequencies(cfg.rope, turning)
            self._frequencies = Constant(freq), factor

    @property
    def embed_weight(self) -> Tensor:
        """The embedding's table, where this part has it."""
        assert self.embed is not None
        return self.embed.weight

    @property
    def head_weight(self) -> Tensor:
        """The head's weight (V, h), where this part has it."""
        return self.embed_weight if self.head is None else self.head.weight

    def sequences(self, inputs: Inputs, dtype: torch.dtype) -> Sequences:
        """What the layers know of a microbatch; `dtype` of the hidden states."""
        tokens, positions = inputs.tokens, inputs.positions
        batch, length = tokens.shape
        cos = sin = None
        if self._frequencies is not None:
            where = torch.arange(length, device=tokens.device) if positions is None else positions
            freq, factor = self._frequencies
            cos, sin = angles(freq.on(tokens.device), factor, where, dtype)
        layout = inputs.layout or TokenLayout.whole(length, inputs.documents)
        rows = places = None
        if self.cfg.moe.experts:
            sequence = torch.arange(batch, device=tokens.device)[:, None]
            whole = layout.length
            everywhere = sequence * whole + layout.once(upload, layout.mine.order, tokens.device)
            places = self.embedding_op.local_tokens(everywhere.reshape(-1))
            rows = places // whole
        return Sequences(batch, length, cos, sin, layout, rows, inputs.share, places=places)

    def embed_tokens(self, inputs: Inputs) -> Tensor:
        """tokens (B, T) → the input of the first layer (N, h)."""
        return self.begin(self.embedding_op(inputs.tokens.reshape(-1), self.embed_weight), inputs)

    def begin(self, rows: Tensor, inputs: Inputs) -> Tensor:
        """The input of the first layer (N, h) from the embedding's rows (N, h) of the tokens."""
        x, tokens, draws = rows, inputs.tokens, inputs.draws
        if self.positions is not None:
            where = inputs.positions
            where = torch.arange(tokens.shape[1], device=tokens.device) if where is None else where
            where = self.embedding_op.local_tokens(where.expand_as(tokens).reshape(-1))
            x = x + look_up(where, self.positions.weight)
        return draws.drop(x, -1) if draws else x

    def run_layers(self, x: Tensor, seq: Sequences, draws: Draws | None, layers: Sequence[int]) -> Tensor:
        """x (N, h) through the layers with these indices."""
        for i in layers:
            layer = self.layers[str(i)]
            assert isinstance(layer, Layer)
            x = self.run_layer(layer, x, seq, draws)
        return x

    def end(self, x: Tensor) -> Tensor:
        """The head's input from the last layer's output."""
        assert self.norm is not None
        return self.norm(x)

    def forward(self, inputs: Inputs | Tensor) -> Tensor:
        """Logits (B, T, V), or with labels the summed cross-entropy times `scale` (a scalar).

        Args:
            inputs: a microbatch; or only its token ids (B, T).
        """
        inputs = Inputs(inputs) if isinstance(inputs, Tensor) else inputs
        x = self.embed_tokens(inputs)
        seq = self.sequences(inputs, x.dtype)
        x = self.run_layers(x, seq, inputs.draws, self.part.layers)
        if inputs.labels is None:
            return self.head_op.logits(self.end(x), self.head_weight).view(*inputs.tokens.shape, -1)
        return self.loss(x, seq, inputs)

    def loss(self, x: Tensor, seq: Sequences, inputs: Inputs) -> Tensor:
        """The summed cross-entropy (a scalar) of the last layer's output (N, h), for inputs with labels."""
        labels = inputs.labels
        assert labels is not None
        if labels.dim() == 3:
            x, labels = self._look_ahead(x, seq, inputs.draws, labels, inputs.scale), labels[0]
        return self.head_op.loss(self.end(x), self.head_weight, labels.reshape(-1), inputs.scale)

    def _look_ahead(
        self, hidden: Tensor, seq: Sequences, draws: Draws | None, following: Tensor, scale: Tensor | float
    ) -> Tensor:
        """The hidden states (N, h), to which the loss of the prediction modules is attached."""
        x, loss = hidden, hidden.new_zeros(())
        factor = scale * (self.cfg.mtp_loss / len(self.mtp))
        for module, tokens, wanted in zip(self.mtp, following[:-1], following[1:], strict=True):
            assert isinstance(module, Prediction) and isinstance(module.layer, Layer)
            embedded = self.embedding_op(tokens.clamp(min=0).reshape(-1), self.embed_weight)
            x = self.run_layer(module.layer, module(x, embedded), seq, draws)
            loss = loss + self.head_op.loss(module.norm(x), self.head_weight, wanted.reshape(-1), factor)
        return attach(hidden, loss)
