"""Cases of attention over several ranks, and the plain maths of whole sequences that every method must equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pentad.parallel.comm.mesh import Degrees, Mesh
from pentad.parallel.context.layout import deal_of
from pentad.parallel.kernels.interfaces import AttentionCall, Core
from pentad.parallel.kernels.mask import TokenIndex, TokenLayout
from pentad.parallel.record import reader
from pentad.parallel.record.ring import Recorder
from tests.distributed import job_store
from tests.rows import without_copies

LENGTH = 48
TOLERANCE = 1e-11


@dataclass(frozen=True)
class Case:
    """One attention problem of whole sequences.

    Args:
        heads, kv_heads, key, value: numbers and widths of heads.
        dealing: a placement, or "random": which tokens a rank has; random ones differ between sequences.
        documents: their lengths, for each sequence of the batch, or none.
        window, sinks: as of `Core`; sinks are random.
    """

    name: str
    heads: int = 4
    kv_heads: int = 4
    key: int = 6
    value: int = 6
    dealing: str = "zigzag"
    batch: int = 2
    length: int = LENGTH
    documents: tuple[tuple[int, ...], ...] | None = None
    window: int | None = None
    sinks: bool = False
    dtype: torch.dtype = torch.float64

    @property
    def scale(self) -> float:
        """Multiplier of the scores."""
        return self.key**-0.5


MANY = ((1, 17, 1, 1, 9, 19), (30, 2, 1, 15))
"""Documents of any length, also of one token, across the borders of ranks."""
CASES = (
    Case("heads"),
    Case("groups", heads=16, dealing="contiguous"),
    Case("one key-value head", kv_heads=1, dealing="random", batch=1),
    Case("one sequence", batch=1, heads=8, kv_heads=2, dealing="contiguous"),
    Case("value width", value=10, heads=8, kv_heads=2),
    Case("documents", documents=MANY, kv_heads=2),
    Case("documents dealt out at random", documents=MANY, dealing="random"),
    Case("documents by length", documents=((20, 9, 9, 5, 4, 1), (48,)), dealing="by_length", kv_heads=2),
    Case("documents in runs", documents=MANY, dealing="contiguous", sinks=True),
    Case("one token each", documents=((1,) * LENGTH, (LENGTH,)), dealing="zigzag", kv_heads=1),
    Case("window", window=7, sinks=True, kv_heads=2),
    Case("window over documents", window=5, documents=MANY, dealing="random", kv_heads=1, sinks=True),
    Case("window of one token", window=1, dealing="contiguous"),
    Case("sinks", sinks=True, heads=16, dealing="random", value=3),
)
"""Head numbers suit 4 ranks that exchange heads."""


@dataclass(frozen=True)
class Inputs:
    """Whole sequences: q (B, S, H, d), k (B, S, K, d), v (B, S, K, e), gradient of the output (B, S, H, e)."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    sinks: Tensor | None


def inputs(case: Case) -> Inputs:
    """The same on every rank."""
    draws = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64).to(case.dtype)

    sizes = case.batch, case.length
    return Inputs(
        normal(*sizes, case.heads, case.key),
        normal(*sizes, case.kv_heads, case.key),
        normal(*sizes, case.kv_heads, case.value),
        normal(*sizes, case.heads, case.value),
        normal(case.heads) if case.sinks else None,
    )


def documents(case: Case) -> Tensor | None:
    """(B, S) ids."""
    if case.documents is None:
        return None
    return torch.stack([torch.repeat_interleave(torch.arange(len(x)), torch.tensor(x)) for x in case.documents])


def layout(case: Case, ranks: int, rank: int = 0) -> TokenLayout:
    """How the case's tokens are dealt out."""
    ids = documents(case)
    if case.dealing != "random":
        return deal_of(case.dealing)(case.length, ranks, rank, ids)
    draws = torch.Generator().manual_seed(3)
    places = torch.stack([torch.randperm(case.length, generator=draws) for _ in range(case.batch)])
    orders = [part.sort(1).values for part in places.chunk(ranks, 1)]
    return TokenLayout(tuple(TokenIndex(o, None if ids is None else ids.gather(1, o)) for o in orders), rank)


def reference(case: Case) -> list[Tensor]:
    """out and the gradients of q, k, v (and the sinks), of all scores written out, in fp64."""
    given = inputs(case)
    leaves = [x.double().requires_grad_() for x in (given.q, given.k, given.v, given.sinks) if x is not None]
    q, k, v = leaves[:3]
    group = case.heads // case.kv_heads
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(group, 2)) * case.scale
    place = torch.arange(case.length)
    seen = place[:, None] >= place
    if case.window is not None:
        seen = seen & (place[:, None] - place < case.window)
    ids = documents(case)
    seen = seen[None, None] if ids is None else seen & (ids[:, None, :, None] == ids[:, None, None, :])
    scores = scores.masked_fill(~seen, float("-inf"))
    if given.sinks is not None:
        scores = torch.cat([scores, leaves[3][None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    probs = scores.softmax(-1)[..., : case.length]
    out = torch.einsum("bhij,bjhe->bihe", probs, v.repeat_interleave(group, 2))
    return [out.detach(), *torch.autograd.grad(out, leaves, given.dout.double())]


def take(x: Tensor, rows: TokenIndex) -> Tensor:
    """(B, S, …) → (B, n, …), the tokens of these rows."""
    return x[torch.arange(len(x))[:, None], rows.order]


def put_together(parts: Sequence[Tensor], layout: TokenLayout) -> Tensor:
    """(B, n, …) of each rank → (B, S, …)."""
    whole = torch.cat(list(parts), 1)
    result = torch.full_like(whole, float("nan"))
    for part, rows in zip(parts, layout.ranks, strict=True):
        result[torch.arange(len(part))[:, None], rows.order] = part
    return result


def attend(case: Case, core: Core, ranks: int, rank: int) -> list[Tensor]:
    """This rank's out, dq, dk, dv and, with sinks, its part of their gradient."""
    given, dealt = inputs(case), layout(case, ranks, rank)
    q, k, v = (take(x, dealt.mine).requires_grad_() for x in (given.q, given.k, given.v))
    sinks = None if given.sinks is None else given.sinks.clone().requires_grad_()
    out = core(q, k, v, AttentionCall(dealt, case.window, case.scale, sinks))
    wanted = [q, k, v] if sinks is None else [q, k, v, sinks]
    return [out.detach(), *torch.autograd.grad(out, wanted, take(given.dout, dealt.mine))]


def check(case: Case, found: Sequence[list[Tensor]], tolerance: float = TOLERANCE) -> None:
    """Compares what `attend` gave on every rank with the reference."""
    dealt = layout(case, len(found))
    for place, expected in enumerate(reference(case)):
        parts = [results[place] for results in found]
        mine = torch.stack(parts).sum(0) if place == 4 else put_together(parts, dealt)
        label = ("out", "dq", "dk", "dv", "dsinks")[place]
        torch.testing.assert_close(
            mine.double(),
            expected,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, label=label: f"{case.name}: {label}: {text}",
        )


def on_ranks(
    rank: int, world: int, make: Callable[[Mesh], Core], cases: Sequence[Case], record: Path | None, inner: int = 1
) -> list[list[Tensor]]:
    """For `run_distributed(..., group=False)`: `attend` of each case; step i of the record is the i-th case.

    Args:
        make: the method, from the mesh; at a module's top level.
        record: folder of the ranks' records, or none.
        inner: ranks of the axis cp_inner.
    """
    recorder = Recorder(record and record / str(rank), rank=rank, world=world, entries=4096)
    mesh = Mesh(
        Degrees(cp=world), store=job_store(), rank=rank, device="cpu", recorder=recorder, timeout_s=60, context=inner
    )
    core = make(mesh)
    found = []
    for recorder.step, case in enumerate(cases):
        found.append(attend(case, core, world, rank))
    mesh.close()
    return found


def sent_bytes(record: Path, rank: int, sizes: dict[str, int], step: int = 0) -> int:
    """What a rank sent in a step: its share of the collectives it recorded.

    Args:
        record: the folder of `on_ranks`.
        sizes: ranks of each axis, by name.
        step: the number of the case.
    """
    ring = reader.read(record / str(rank))
    total = 0
    for entry in without_copies(ring):
        kind, nbytes = ring.name(entry["kind"]), int(entry["nbytes"])
        if int(entry["step"]) != step or kind in ("receive", ""):
            continue
        if kind == "send":
            total += nbytes
            continue
        # The entry has the bytes of the whole tensor, of which a rank keeps its own part.
        ranks = sizes[ring.name(entry["axis"])]
        moves = {"all_gather": 1, "reduce_scatter": 1, "all_to_all": 1, "all_reduce": 2}[kind]
        assert nbytes % ranks == 0
        total += moves * nbytes * (ranks - 1) // ranks
    return total


def saved_bytes(case: Case, core: Core, dealt: TokenLayout) -> int:
    """What autograd keeps for backward, in the memory of the saved tensors; a collective call."""
    given = inputs(case)
    q, k, v = (take(x, dealt.mine).requires_grad_() for x in (given.q, given.k, given.v))
    storages: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = core(q, k, v, AttentionCall(dealt, case.window, case.scale))
    torch.autograd.grad(out.sum(), (q, k, v))
    return sum(storages.values())
