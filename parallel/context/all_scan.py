"""All-Scan: the state of linear attention from rank to rank (ZeCO, arXiv 2507.01004, section 3).

Sequences are cut into contiguous parts, rank r has the r-th one. Each rank first computes its tokens' state as if
nothing came before, and the share of an earlier state that passes through; then the states travel once along the ranks,
cut into blocks of key dimensions, so that a block moves on while the next one arrives:

    S_in(r) = S_out(r − 1)         S_out(r) = passed(r) · S_in(r) + S(r)

    rank 0   S ─ 1 2 3 ▶
    rank 1        1 2 3 ▶            every rank sends one state, however many ranks there are
    rank 2          1 2 3

Backward is one scan the other way, of the gradients: dS_end(r) = passed(r + 1) · dS_end(r + 1) + dS(r + 1). (A mirrored
summary of the paper has no communication in backward, and lets the first chunk decay what it begins with; both give
wrong results.) The scans run in lanes, beside the work inside the chunks, which needs no state.

Where a document begins inside a part, nothing passes: passed = 0. Where one begins with a part, the state that comes is
dropped.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..comm.collectives import Handle, receive, send
from ..comm.lane import Lane, Pending
from ..comm.mesh import Axis

BLOCKS = 4
"""Blocks per state. With P ranks and a state that takes time t to send, a scan takes t (1 + (P − 2) / BLOCKS)."""


class AllScan:
    """What comes before and after a rank's contiguous part of its sequences (`models.linear_attention.Neighbours`).

    One serves all layers of a rank. All ranks make the same calls in the same order.

    Args:
        forward, backward: the ranks of the cut, for the two directions. On NCCL nothing else may communicate over them,
            and each is a communicator of its own; gloo keeps apart what goes to different ranks.
        device: of the states.
        blocks: per state.
    """

    def __init__(self, forward: Axis, backward: Axis, device: torch.device | str, *, blocks: int = BLOCKS) -> None:
        self._forward, self._backward, self._blocks = _of_lane(forward), _of_lane(backward), blocks
        self._up = Lane("scan forward", device, self._forward)
        self._down = Lane("scan backward", device, self._backward)

    def state_before(self, passed: Tensor, state: Tensor, joined: Tensor | None) -> Pending[Tensor | None]:
        """Starts the scan of states, whose result is the incoming state (B, H, d, e), none on the first rank.

        Args:
            passed: (B, H, d) the share of the incoming state that is left after this rank's tokens.
            state: (B, H, d, e) the state after this rank's tokens if nothing comes in.
            joined: (B,) the sequences in which something comes in, it is zero in the others; none: all.
        """
        axis = self._forward
        before, after = (axis.rank + step if 0 <= axis.rank + step < axis.size else None for step in (-1, 1))
        return self._up.submit(partial(_travel, axis, passed, state, before, after, self._blocks, incoming=joined))

    def grad_after(self, passed: Tensor, grad: Tensor, joined: Tensor | None) -> Pending[Tensor | None]:
        """Starts the scan of gradients, whose result is that of the state after this rank's tokens (B, H, d, e), none
        on the last rank.

        Args:
            passed, joined: as above.
            grad: (B, H, d, e) the gradient of the incoming state through this rank's outputs.
        """
        axis = self._backward
        before, after = (axis.rank + step if 0 <= axis.rank + step < axis.size else None for step in (1, -1))
        return self._down.submit(partial(_travel, axis, passed, grad, before, after, self._blocks, outgoing=joined))

    def close(self) -> None:
        """Ends the lanes."""
        self._up.close()
        self._down.close()


def _of_lane(axis: Axis) -> Axis:
    """The axis with a record of its own: a lane's entries carry the step of their submission."""
    return axis if axis.recorder is None else replace(axis, recorder=axis.recorder.fork())


def _travel(
    axis: Axis,
    passed: Tensor,
    own: Tensor,
    before: int | None,
    after: int | None,
    blocks: int,
    *,
    incoming: Tensor | None = None,
    outgoing: Tensor | None = None,
) -> Tensor | None:
    """Receives a state from `before`, sends passed · received + own to `after`, block by block.

    Args:
        passed: (B, H, d).
        own: (B, H, d, e).
        incoming, outgoing: (B,) the sequences whose state is received, or sent; of the others it is zero.

    Returns:
        What was received (B, H, d, e).
    """
    keys = own.shape[2]
    size = -(-keys // min(blocks, keys))
    own_blocks = own.permute(2, 0, 1, 3).contiguous().split(size)
    shares = passed.permute(2, 0, 1)[..., None].split(size)
    arrived = None if before is None else own.new_empty(keys, *own.shape[:2], own.shape[3])
    into = (None,) * len(own_blocks) if arrived is None else arrived.split(size)
    sends: list[Handle] = []
    for mine, share, block in zip(own_blocks, shares, into, strict=True):
        leaving = mine
        if block is not None and before is not None:
            receive(block, axis, before).wait()
            if incoming is not None:
                block.masked_fill_(_others(incoming), 0)
            leaving = torch.addcmul(mine, share, block)
        if after is not None:
            leaving = leaving if outgoing is None else leaving.masked_fill(_others(outgoing), 0)
            sends.append(send(leaving, axis, after))
    for handle in sends:
        handle.wait()
    return None if arrived is None else arrived.permute(1, 2, 0, 3)


def _others(sequences: Tensor) -> Tensor:
    """(B,) → (1, B, 1, 1) the other sequences, of a block (·, B, H, e)."""
    return ~sequences[None, :, None, None]
