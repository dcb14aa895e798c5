"""The balanced vocabulary of a step: the passes of `parallel.balanced_vocab`, tied to the model and microbatches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...models.sequences import Inputs
from ...parallel.balanced_vocab import BalancedEmbedding, BalancedHead
from ...parallel.comm.lane import Lane
from ...parallel.comm.mesh import Mesh
from ...parallel.pipeline.execute import Handler
from ...parallel.pipeline.kind import Kind
from ...parallel.pipeline.needs import Kinds
from ...parallel.pipeline.program import Op
from ...parallel.pipeline.runtime import Taken
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

    def handlers(self, output: Taken, rows_grad: Taken) -> dict[Kind, Handler]:
        """One per kind of vocabulary operation; arguments as of `Vocabulary.handlers`."""
        head, embedding, model = self._head, self._embedding, self._model

        def post_hidden(op: Op) -> None:
            head.post_hidden(op.index, output(op.index), *self._shape(op.index), self._dtype)

        def post_rows_grad(op: Op) -> None:
            embedding.post_grad(op.index, rows_grad(op.index), *self._shape(op.index), self._dtype)

        return {
            Kinds.HIDDEN: post_hidden,
            Kinds.HEAD: self._score,
            Kinds.STATISTICS: lambda op: head.post_statistics(op.index),
            Kinds.HEAD_GRAD: lambda op: head.weight_grad(op.index, model.head_weight),
            Kinds.HIDDEN_GRAD: lambda op: head.post_hidden_grad(op.index),
            Kinds.EMBED: self._look_up,
            Kinds.EMBEDDED: lambda op: embedding.post_rows(op.index),
            Kinds.EMBEDDED_GRAD: post_rows_grad,
            Kinds.EMBED_GRAD: lambda op: embedding.weight_grad(op.index, self._tokens(op.index), model.embed_weight),
        }

    def rows(self, index: int) -> Tensor:
        """The input of the first stage, on its ranks."""
        return self._embedding.rows(index)

    def hidden_grad(self, index: int) -> Tensor:
        """The gradient of the last stage's output, on its ranks."""
        return self._head.hidden_grad(index)

    def loss(self, index: int) -> Tensor:
        """The microbatch's loss, on all ranks."""
        return self._head.loss(index)

    def _score(self, op: Op) -> None:
        self._replicas.begin_microbatch()
        inputs = self._inputs(op.index)
        assert inputs.labels is not None
        labels, with_grad = inputs.labels.reshape(-1), torch.is_grad_enabled()
        self._head.score(op.index, self._model.head_weight, labels, inputs.scale, with_grad=with_grad)

    def _look_up(self, op: Op) -> None:
        self._replicas.begin_microbatch()
        self._embedding.look_up(op.index, self._tokens(op.index), self._model.embed_weight)

    def _tokens(self, index: int) -> Tensor:
        """(N,)"""
        return self._inputs(index).tokens.reshape(-1)

    def _shape(self, index: int) -> tuple[int, int]:
        """(N, h)"""
        return self._inputs(index).tokens.numel(), self._model.cfg.hidden
