"""The balanced vocabulary of a step: the passes of `parallel.balanced_vocab`, tied to the model and microbatches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...models.sequences import Inputs
from ...parallel.balanced_vocab import BalancedEmbedding, BalancedHead
from ...parallel.comm.lane import Lane
from ...parallel.comm.mesh import Mesh
from ...parallel.vocab import Look, VocabShard
from ..setup import Parts


class BalancedVocabulary:
    """A `parallel.pipeline.runtime.Vocabulary` for one rank's part of the model.

    Args:
        parts: the model and the pipeline.
        mesh: of this rank.
        barriers: 1 or 2 (parallel.pipeline.vocab_barriers).
        dtype: of the hidden states.
        inputs: a microbatch by its number.
    """

    def __init__(
        self, parts: Parts, mesh: Mesh, barriers: int, dtype: torch.dtype, inputs: Callable[[int], Inputs]
    ) -> None:
        self._model, self._replicas, self._inputs, self._dtype = parts.model, parts.replicas, inputs, dtype
        cfg, tp = parts.model.cfg, mesh.axis("tp").size
        head, embed = mesh.axis("vocab_head"), mesh.axis("vocab_embed")
        self._lanes = Lane("head", parts.device, head), Lane("embedding", parts.device, embed)
        first, last = (tuple(range(rank * tp, (rank + 1) * tp)) for rank in parts.pipeline.ends)
        shard = VocabShard.of(head, cfg.vocab, cfg.used_vocab)
        self._head = BalancedHead(head, self._lanes[0], shard, last, barriers)
        self._embedding = BalancedEmbedding(embed, self._lanes[1], VocabShard.of(embed, cfg.vocab), first)

    def show(self, look: Look | None) -> None:
        """Whom the head shows its logits from now on."""
        self._head.look = look

    def clear(self) -> None:
        """Drops everything, after a step that was left half-way."""
        self._head.clear()
        self._embedding.clear()

    def close(self) -> None:
        """Ends the lanes."""
        for lane in self._lanes:
            lane.close()

    def post_hidden(self, index: int, x: Tensor | None) -> None:
        """CX: x is the last stage's output, None on other ranks."""
        self._head.post_hidden(index, x, *self._shape(index), self._dtype)

    def score(self, index: int) -> None:
        """S: logits and softmax statistics of this rank's rows."""
        self._replicas.begin_microbatch()
        inputs = self._inputs(index)
        assert inputs.labels is not None
        labels, with_grad = inputs.labels.reshape(-1), torch.is_grad_enabled()
        self._head.score(index, self._model.head_weight, labels, inputs.scale, with_grad=with_grad)

    def post_statistics(self, index: int) -> None:
        """CS."""
        self._head.post_statistics(index)

    def head_grad(self, index: int) -> None:
        """T: the gradient of this rank's rows of the head."""
        self._head.weight_grad(index, self._model.head_weight)

    def post_hidden_grad(self, index: int) -> None:
        """CD."""
        self._head.post_hidden_grad(index)

    def hidden_grad(self, index: int) -> Tensor:
        """The gradient of the last stage's output, on its ranks."""
        return self._head.hidden_grad(index)

    def loss(self, index: int) -> Tensor:
        """The microbatch's loss, on all ranks."""
        return self._head.loss(index)

    def look_up(self, index: int) -> None:
        """IF: the rows that this rank has."""
        self._replicas.begin_microbatch()
        self._embedding.look_up(index, self._inputs(index).tokens.reshape(-1), self._model.embed_weight)

    def post_rows(self, index: int) -> None:
        """CE."""
        self._embedding.post_rows(index)

    def rows(self, index: int) -> Tensor:
        """The input of the first stage, on its ranks."""
        return self._embedding.rows(index)

    def post_rows_grad(self, index: int, grad: Tensor | None) -> None:
        """CG: the gradient of `rows`, None on other ranks."""
        self._embedding.post_grad(index, grad, *self._shape(index), self._dtype)

    def embed_grad(self, index: int) -> None:
        """IB: the gradient of this rank's rows of the embedding."""
        self._embedding.weight_grad(index, self._inputs(index).tokens.reshape(-1), self._model.embed_weight)

    def _shape(self, index: int) -> tuple[int, int]:
        """(N, h)"""
        return self._inputs(index).tokens.numel(), self._model.cfg.hidden
