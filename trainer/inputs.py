"""From a microbatch of the loader to what this rank's stages read: the one place where sequences are shared out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..configs.schema import Config
from ..models.dropout import Draws
from ..models.mtp import ahead
from ..models.sequences import Inputs
from ..parallel.comm.mesh import Mesh
from ..parallel.context.layout import deal_of
from ..parallel.kernels.mask import TokenLayout
from ..parallel.kernels.upload import upload
from ..parallel.labels import IGNORED
from .data.dataset import Microbatch


def own_mean(counted: Tensor, inputs: Sequence[Inputs]) -> Tensor:
    """The mean loss of a rank's own tokens, in nats, () fp64; −∞, below all others', where none of them has one.

    Args:
        counted: () the sum of their losses, each times its microbatch's factor.
        inputs: the microbatches, all with the same factor.
    """
    labels = [each.labels.reshape(-1, *each.tokens.shape)[0] for each in inputs if each.labels is not None]
    tokens = torch.stack([(each != IGNORED).sum() for each in labels]).sum().double()
    return torch.where(tokens > 0, counted.double() / (tokens * inputs[0].scale), -torch.inf)


class InputMaker:
    """Makes the inputs of one rank.

    Args:
        cfg: the job.
        mesh: whose context ranks share each sequence, and whose tensor ranks share the rest of the tokens.
        device: where the inputs go.
    """

    def __init__(self, cfg: Config, mesh: Mesh, device: torch.device) -> None:
        self.cfg, self.device = cfg, device
        self._cp, self._tp = mesh.axis("cp"), mesh.axis("tp")
        self._deal = deal_of(cfg.parallel.context.placement)
        self._plain: TokenLayout | None = None

    def make(self, batch: Microbatch, step: int, scale: float) -> Inputs:
        """This rank's part of a microbatch.

        Args:
            batch: whole sequences, on the host: reading it waits for no device.
            step: of the training; −1: evaluation.
            scale: factor of every token's loss.
        """
        share = self.cfg.train.micro_batch / self.cfg.train.global_batch if step >= 0 else 0.0
        depth = self.cfg.model.mtp
        # What the device computes with: only that, in few copies. Documents stay here, where masks are planned.
        tokens, labels = upload(batch.tokens, self.device), upload(batch.labels, self.device)
        positions = None if batch.positions is None else upload(batch.positions, self.device)
        labels = ahead(labels, depth) if depth and step >= 0 else labels
        layout = self._layout(batch)
        if layout is None:
            draws = self._draws(batch, step, torch.arange(batch.tokens.numel()))
            return Inputs(tokens, labels, scale, positions, batch.documents, draws, share)
        order = layout.mine.order.expand(len(batch.tokens), -1)
        places = order + torch.arange(len(order))[:, None] * batch.tokens.shape[1]
        mine = layout.once(upload, layout.mine.order, self.device).expand(len(batch.tokens), -1)
        return Inputs(
            tokens.gather(1, mine),
            labels.gather(-1, mine.expand(labels.shape[:-1] + mine.shape[-1:])),
            scale,
            mine if positions is None else positions.gather(1, mine),
            None,  # the layout has them
            self._draws(batch, step, places.reshape(-1)),
            share,
            layout,
        )

    def _layout(self, batch: Microbatch) -> TokenLayout | None:
        """None where one rank has whole sequences."""
        if self._cp.size == 1:
            return None
        if batch.documents is not None:
            return self._deal(batch.tokens.shape[1], self._cp.size, self._cp.rank, batch.documents)
        # One object for all such batches: methods keep what they plan for a layout.
        self._plain = self._plain or self._deal(batch.tokens.shape[1], self._cp.size, self._cp.rank, None)
        return self._plain

    def _draws(self, batch: Microbatch, step: int, places: Tensor) -> Draws | None:
        model = self.cfg.model
        if not (model.dropout or model.moe.router.jitter) or not torch.is_grad_enabled():
            return None
        rows = places.chunk(self._tp.size)[self._tp.rank]
        samples = tuple(batch.samples.tolist())
        return Draws(model.dropout, self.cfg.train.seed, step, samples, self.cfg.train.seq_len, rows)
