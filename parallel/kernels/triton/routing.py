"""What a router makes of its logits in one launch each way, and what it counts in two: all in fp32, its sums in fp64.

Shapes: n tokens, C choices, K of a token. Sums have one order, so a run repeats bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...expert.routing import RouteForm
from .jit import compiled
from .operators import operator, programs_of

_CELLS = 2048
"""Logits that a program holds."""
_PARTS = 64
"""Rows of partial sums that are added at once."""
SUMS = ("z", "entropy", "top1", "balance")
"""Sums over tokens behind those of the choices and of the shares: (log-sum-exp)², entropy, largest share, and
shares · loads where these differ between sequences."""


@compiled
def _column(x):
    return tl.expand_dims(x, 1)


@compiled
def _sum(x):
    return tl.sum(x, 0)


@compiled
def _score(x, high, SOFTMAX: tl.constexpr):
    if SOFTMAX:
        return tl.exp(x - high)
    return tl.sigmoid(x)


@compiled
def _chosen(logits, choices, row, there, size, count, high, SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr):
    """What the scores of a row's choices are relative to, and their sum."""
    total = high * 0.0
    if NORMALIZE:
        if SOFTMAX:
            high = high * 0.0 + float("-inf")
            for k in range(count):
                choice = tl.load(choices + row * count + k, mask=there, other=0)
                high = tl.maximum(high, tl.load(logits + row * size + choice, mask=there, other=0.0))
        for k in range(count):
            choice = tl.load(choices + row * count + k, mask=there, other=0)
            total += _score(tl.load(logits + row * size + choice, mask=there, other=0.0), high, SOFTMAX)
        if not SOFTMAX:
            total += 1e-20
    return high, total


@compiled
def _route_kernel(
    logits, choices, loads, sequences, weights, partial, rows, size, count, scale,
    SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr, EACH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    bins = tl.arange(0, BLOCK)[None, :]
    used = bins < size
    taken = tl.zeros((BLOCK,), tl.float32)
    shared = tl.zeros((BLOCK,), tl.float32)
    z = tl.zeros((ROWS,), tl.float32)
    entropy = tl.zeros((ROWS,), tl.float32)
    top = tl.zeros((ROWS,), tl.float32)
    balance = tl.zeros((ROWS,), tl.float32)
    for first in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        there = row < rows
        x = tl.load(logits + _column(row) * size + bins, mask=_column(there) & used, other=0.0)
        x = tl.where(used, x, float("-inf"))
        peak = tl.max(x, 1)
        share = tl.exp(x - _column(peak))
        total = tl.sum(share, 1)
        lse = peak + tl.log(total)
        if not SOFTMAX:
            share = tl.where(used, tl.sigmoid(x), 0.0)
            total = tl.sum(share, 1) + 1e-20
        share = tl.where(_column(there), share / _column(total), 0.0)
        shared += tl.sum(share, 0)
        z += tl.where(there, lse * lse, 0.0)
        entropy -= tl.sum(share * tl.log(tl.maximum(share, 1e-37)), 1)
        top += tl.max(share, 1)
        if EACH:
            of = tl.load(sequences + row, mask=there, other=0)
            load = tl.load(loads + _column(of) * size + bins, mask=_column(there) & used, other=0.0)
            balance += tl.sum(share * load, 1)
        high, chosen = _chosen(logits, choices, row, there, size, count, peak, SOFTMAX, NORMALIZE)
        if not NORMALIZE:
            chosen = total if SOFTMAX else chosen + 1.0
        for k in range(count):
            choice = tl.load(choices + row * count + k, mask=there, other=0)
            score = _score(tl.load(logits + row * size + choice, mask=there, other=0.0), high, SOFTMAX)
            tl.store(weights + row * count + k, score / chosen * scale, mask=there)
            taken += tl.sum(tl.where((_column(choice) == bins) & _column(there), 1.0, 0.0), 0)
    bins = tl.arange(0, BLOCK)
    out = partial + program * (2 * size + 4)
    tl.store(out + bins, taken, mask=bins < size)
    tl.store(out + size + bins, shared, mask=bins < size)
    tl.store(out + 2 * size, tl.sum(z, 0))
    tl.store(out + 2 * size + 1, tl.sum(entropy, 0))
    tl.store(out + 2 * size + 2, tl.sum(top, 0))
    tl.store(out + 2 * size + 3, tl.sum(balance, 0))


@compiled
def _total_kernel(partial, totals, count, width, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    found = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, count, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        there = (part < count) & (at[None, :] < width)
        found += tl.sum(tl.load(partial + part * width + at[None, :], mask=there, other=0.0).to(tl.float64), 0)
    tl.store(totals + at, found, mask=at < width)


@compiled
def _settle_kernel(
    totals, counts, loads, tally, tokens, size, aux, z, AUX: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    bins = tl.arange(0, BLOCK)
    used = bins < size
    taken = tl.load(totals + bins, mask=used, other=0.0)
    balance = tl.load(totals + 2 * size + 3)
    if AUX:
        load = tl.load(counts + bins, mask=used, other=0.0).to(tl.float64)
        whole = _sum(load)
        load = tl.where(whole > 0, load / tl.where(whole > 0, whole, 1.0), 1.0 / size)
        tl.store(loads + bins, load.to(tl.float32), mask=used)
        balance = tl.sum(tl.where(used, tl.load(totals + size + bins, mask=used, other=0.0) * load, 0.0), 0)
    at = tl.arange(0, 8)
    # The order of models/routing/tally_fields.py; nothing is dropped, nothing goes to null experts.
    more = tl.where(at == 0, tokens, 0).to(tl.float64)
    more += tl.where(at == 1, tl.sum(taken, 0), 0.0)
    more += tl.where(at == 4, tl.load(totals + 2 * size + 1), 0.0) + tl.where(
        at == 5, tl.load(totals + 2 * size + 2), 0.0
    )
    more += tl.where(at == 6, balance * aux, 0.0) + tl.where(at == 7, tl.load(totals + 2 * size) * z, 0.0)
    tl.store(tally + at, tl.load(tally + at) + more)
    tl.store(tally + 8 + bins, tl.load(tally + 8 + bins, mask=used, other=0.0) + taken, mask=used)


@compiled
def _back_kernel(
    dweights, logits, choices, loads, sequences, dlogits, rows, size, count, scale, aux, z,
    SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr, AUX: tl.constexpr, EACH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    bins = tl.arange(0, BLOCK)[None, :]
    used = bins < size
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    there = row < rows
    at = _column(row) * size + bins
    x = tl.load(logits + at, mask=_column(there) & used, other=0.0)
    x = tl.where(used, x, float("-inf"))
    peak = tl.max(x, 1)
    prob = tl.exp(x - _column(peak))
    total = tl.sum(prob, 1)
    prob = prob / _column(total)
    grad = prob * _column(2 * z * (peak + tl.log(total)))
    score = tl.where(used, tl.sigmoid(x), 0.0)
    if AUX:
        base = row * 0
        if EACH:
            base = tl.load(sequences + row, mask=there, other=0) * size
        load = tl.load(loads + _column(base) + bins, mask=_column(there) & used, other=0.0)
        if SOFTMAX:
            grad += aux * prob * (load - _column(tl.sum(prob * load, 1)))
        else:
            whole = _column(tl.sum(score, 1)) + 1e-20
            mean = _column(tl.sum(score / whole * load, 1))
            grad += aux * (load - mean) / whole * score * (1 - score)
    high, chosen = _chosen(logits, choices, row, there, size, count, peak, SOFTMAX, NORMALIZE)
    if not NORMALIZE:
        chosen = total if SOFTMAX else chosen + 1.0
    dot = total * 0.0
    for k in range(count):
        choice = tl.load(choices + row * count + k, mask=there, other=0)
        value = _score(tl.load(logits + row * size + choice, mask=there, other=0.0), high, SOFTMAX) / chosen
        dot += value * tl.load(dweights + row * count + k, mask=there, other=0.0) * scale
    if SOFTMAX:
        if not NORMALIZE:
            grad -= prob * _column(dot)
            dot = dot * 0.0
    elif not NORMALIZE:
        dot = dot * 0.0
    for k in range(count):
        choice = tl.load(choices + row * count + k, mask=there, other=0)
        given = tl.load(dweights + row * count + k, mask=there, other=0.0) * scale - dot
        value = _score(tl.load(logits + row * size + choice, mask=there, other=0.0), high, SOFTMAX)
        slope = value / chosen
        if not SOFTMAX:
            slope = slope * (1 - value)
        grad += tl.where(_column(choice) == bins, _column(slope * given), 0.0)
    tl.store(dlogits + at, grad, mask=_column(there) & used)


def _tile(choices: int) -> dict[str, int]:
    block = max(16, triton.next_power_of_2(choices))
    return {"ROWS": max(2, _CELLS // block), "BLOCK": block}


def _route_shapes(logits: Tensor, choices: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    n, size = logits.shape
    programs = max(1, min(programs_of(logits) // 4, -(-n // _tile(size)["ROWS"])))
    return logits.new_empty(choices.shape), logits.new_empty((programs, 2 * size + len(SUMS)))


@operator(
    "route(Tensor logits, Tensor choices, Tensor? loads, Tensor? sequences, bool softmax, bool normalize, float scale)"
    " -> (Tensor, Tensor)",
    _route_shapes,
)
def _route(
    logits: Tensor, choices: Tensor, loads: Tensor | None, sequences: Tensor | None, softmax: bool, normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weights (n, K) fp32, and partial sums (programs, 2 C + 4); loads are read where `sequences` are given."""
    weights, partial = _route_shapes(logits, choices)
    (n, size), count = logits.shape, choices.shape[1]
    _route_kernel[(len(partial),)](
        logits.contiguous(), choices.contiguous(), logits if loads is None else loads,
        choices if sequences is None else sequences, weights, partial, n, size, count, float(scale),
        SOFTMAX=softmax, NORMALIZE=normalize, EACH=sequences is not None, **_tile(size),
    )  # fmt: skip
    return weights, partial


@operator(
    "route_backward(Tensor dweights, Tensor logits, Tensor choices, Tensor? loads, Tensor? sequences, bool softmax,"
    " bool normalize, float scale, float aux, float z) -> Tensor",
    lambda dweights, logits, *_: logits.new_empty(logits.shape),
)
def _route_backward(
    dweights: Tensor, logits: Tensor, choices: Tensor, loads: Tensor | None, sequences: Tensor | None, softmax: bool,
    normalize: bool, scale: float, aux: float, z: float,
) -> Tensor:  # fmt: skip
    """dlogits (n, C)."""
    dlogits = logits.new_empty(logits.shape)
    (n, size), count, tile = logits.shape, choices.shape[1], _tile(logits.shape[1])
    if n:
        _back_kernel[(triton.cdiv(n, tile["ROWS"]),)](
            dweights.contiguous(), logits.contiguous(), choices.contiguous(), logits if loads is None else loads,
            choices if sequences is None else sequences, dlogits, n, size, count, float(scale), float(aux), float(z),
            SOFTMAX=softmax, NORMALIZE=normalize, AUX=loads is not None, EACH=sequences is not None,
            **tile,
        )  # fmt: skip
    return dlogits


@operator(
    "route_totals(Tensor partial) -> Tensor",
    lambda partial: partial.new_empty(partial.shape[1], dtype=torch.float64),
)
def triton_route_totals(partial: Tensor) -> Tensor:
    """(2 C + 4,) fp64 of partial sums: how often each choice was taken, the sums of the shares, then `SUMS`."""
    count, width = partial.shape
    totals = partial.new_empty(width, dtype=torch.float64)
    _total_kernel[(triton.cdiv(width, 16),)](partial, totals, count, width, PARTS=_PARTS, BLOCK=16)
    return totals


@operator(
    "route_settle(Tensor totals, Tensor? counts, Tensor(a!)? loads, Tensor(b!) tally, int tokens, float aux, float z)"
    " -> ()",
    lambda *_: None,
)
def triton_route_settle(
    totals: Tensor, counts: Tensor | None, loads: Tensor | None, tally: Tensor, tokens: int, aux: float, z: float
) -> None:
    """Adds a microbatch to a router's tally, and writes its loads.

    Args:
        totals: of this device's tokens, as `triton_route_totals` gives them.
        counts: (C,) that the loads follow, in any unit; zeros: even ones. None: there is no balancing loss, or the
            loads are those of sequences, which were known before.
        loads: (C,) fp32, becomes counts as fractions.
        tally: as of `models.routing.tally.add_to`.
        tokens: of this device.
        aux, z: what Σ shares · loads and Σ (log-sum-exp)² are multiplied by there.
    """
    size = (len(totals) - len(SUMS)) // 2
    given = (totals if counts is None else counts, totals if loads is None else loads)
    block = max(16, triton.next_power_of_2(size))
    _settle_kernel[(1,)](totals, *given, tally, tokens, size, float(aux), float(z), AUX=counts is not None, BLOCK=block)


class _TritonRoute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, choices: Tensor, loads: Tensor | None, sequences: Tensor | None, form: RouteForm
    ) -> tuple[Tensor, Tensor]:
        # Loads that are no sequences' are written after this and before the backward pass.
        ctx.loads, ctx.form = loads, form
        ctx.save_for_backward(logits, choices, sequences)
        weights, partial = _route(logits, choices, loads, sequences, form.softmax, form.normalize, form.scale)
        ctx.mark_non_differentiable(partial)
        return weights, partial

    @staticmethod
    def backward(ctx: Any, dweights: Tensor, _: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (logits, choices, sequences), form = ctx.saved_tensors, ctx.form
        how = (form.softmax, form.normalize, form.scale, form.aux, form.z)
        return _route_backward(dweights, logits, choices, ctx.loads, sequences, *how), None, None, None, None


def triton_route(
    logits: Tensor, choices: Tensor, loads: Tensor | None, sequences: Tensor | None, form: RouteForm
) -> tuple[Tensor, Tensor]:
    """Weights of the choices, and partial sums for `triton_route_totals`.

    The gradient of the weights brings that of the losses with it, as if these had been added to the training loss.

    Args:
        logits: (n, C) fp32.
        choices: (n, K), different ones in a row.
        loads: (C,) fp32, read in backward, or (B, C) of sequences; none: no balancing loss.
        sequences: (n,) the sequence of each token, whose loads count; none: all tokens have the same.
        form: what is made of them.
    """
    return _TritonRoute.apply(logits, choices, loads, sequences, form)
