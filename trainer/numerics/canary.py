"""The canary: before a job trains, every rank makes the same small step, and all on equal devices must get equal bits.

The step has a forward pass, a backward pass and an update of a fixed model with fixed numbers in the job's type, so a
rank that computes wrongly at its start is found before it has spoilt anything. Each rank makes it twice: one that
differs from itself needs no other to be compared with.
"""

from __future__ import annotations

import socket
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ...configs.schema import AdamWConfig, ConstantSchedule, ModelConfig
from ...models.sequences import Inputs
from ...models.transformer import Transformer
from ...parallel.checksum import checksum
from ...parallel.comm.mesh import Mesh
from ..metrics.peak import processor_name
from ..optim.optimizer import UpdatePiece, UpdateScalars, make_rule

_MODEL = ModelConfig(layers=2, hidden=256, heads=4, kv_heads=2, head_dim=64, ffn=512, vocab=512, max_positions=64)
_SHAPE = (2, 64)
"""Sequences and tokens."""
PASSES = ("the forward pass", "the backward pass", "the update")
"""What is compared, in order."""


class CanaryError(RuntimeError):
    """Some rank computes other bits than others on equal devices, or than itself."""


@dataclass(frozen=True)
class CanaryBits:
    """What one rank made.

    Args:
        rank, host: which, and where it is.
        kind: of its device and software; only equal ones are compared.
        runs: of each run, a checksum for each of `PASSES`.
    """

    rank: int
    host: str
    kind: str
    runs: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def steady(self) -> bool:
        """Whether both runs made the same bits."""
        return self.runs[0] == self.runs[1]


@dataclass(frozen=True)
class CanaryResult:
    """What follows from all ranks' bits.

    Args:
        kinds: how many ranks there are of each kind.
        suspects: ranks that differ from most of their kind, or from themselves.
        lines: for people: what is wrong; none, if nothing is.
        unsteady: kinds of which no rank gets the same bits twice, so that nothing can be said.
    """

    kinds: dict[str, int]
    suspects: tuple[int, ...]
    lines: tuple[str, ...]
    unsteady: tuple[str, ...]


def canary(mesh: Mesh, device: torch.device, dtype: torch.dtype) -> CanaryResult:
    """Makes the step on all ranks, which call this together, and compares.

    Args:
        mesh: of the job.
        device, dtype: of this rank, and what it trains in.
    """
    with _deterministic(device):
        runs = canary_bits(device, dtype), canary_bits(device, dtype)
    mine = CanaryBits(mesh.rank, socket.gethostname(), _kind(device), runs)
    return judge_bits(mesh.gather_objects(mine))


def canary_bits(device: torch.device, dtype: torch.dtype) -> tuple[int, ...]:
    """The checksums of one run, for each of `PASSES`."""
    with torch.device(device):
        model = Transformer(_MODEL).to(dtype)
    params = list(model.parameters())
    with torch.no_grad():
        for number, param in enumerate(params):
            param.copy_(_numbers(param, number) + (param.dim() == 1))
    tokens = (torch.arange(_SHAPE[0] * _SHAPE[1], device=device) * 167 % _MODEL.vocab).view(_SHAPE)
    with torch.enable_grad():
        loss = model(Inputs(tokens, tokens.roll(-1, 1), 1 / tokens.numel()))
        loss.backward()
    grads = [param.grad for param in params if param.grad is not None]
    forward, backward = checksum(loss.detach().view(1)), _total(grads)
    return tuple(int(each) for each in (forward, backward, _total(_updated(params, device))))


def _numbers(like: Tensor, number: int) -> Tensor:
    """Between −0.1 and 0.1, of a shape (…), in fp64: exact integers until the one division."""
    places = torch.arange(like.numel(), dtype=torch.int64, device=like.device).view(like.shape)
    return ((places * 7919 + number * 104729) % 10007).double() / 50035 - 0.1


def _updated(params: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The parameters after one update, in the precision of masters, and the optimizer's states."""
    rule = make_rule(AdamWConfig(lr=1e-3, schedule=ConstantSchedule()), device)
    pieces = []
    for param in params:
        assert param.grad is not None
        value = param.detach().reshape(-1)
        value = value.float() if value.dtype != torch.float64 else value.clone()
        states = {name: torch.zeros_like(value) for name in rule.names}
        pieces.append(UpdatePiece(value, param.grad.reshape(-1).to(value.dtype), states, decay=param.dim() > 1))
    one, zero = torch.ones((), device=device), torch.zeros((), device=device)
    rule.update(pieces, UpdateScalars(1e-3, one, zero, one))
    return [x for piece in pieces for x in (piece.value, *piece.states.values())]


def _total(tensors: Sequence[Tensor]) -> Tensor:
    """One checksum, in which the order counts."""
    sums = torch.stack([checksum(x) for x in tensors])
    return (sums * (2 * torch.arange(len(sums), device=sums.device) + 1)).sum()


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """On a GPU, kernels that add in a fixed order, where there are such."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def _kind(device: torch.device) -> str:
    """What must be equal for bits to be: products of other processors are summed in another order."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{processor_name()} ({capability}), {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}"


def judge_bits(ranks: Sequence[CanaryBits]) -> CanaryResult:
    """What follows from all ranks' bits."""
    kinds: dict[str, list[CanaryBits]] = defaultdict(list)
    for each in ranks:
        kinds[each.kind].append(each)
    suspects, lines, unsteady = list[int](), list[str](), list[str]()
    for kind, members in kinds.items():
        steady = [each for each in members if each.steady]
        if not steady and len(members) > 1:
            unsteady.append(kind)
            continue
        for each in members:
            if not each.steady:
                suspects.append(each.rank)
                lines.append(
                    f"rank {each.rank} on {each.host} makes other bits the second time, in {_differs(*each.runs)}"
                )
        odd, line = _odd_ones(steady)
        suspects += odd
        lines += line
    counts = {kind: len(members) for kind, members in kinds.items()}
    return CanaryResult(counts, tuple(sorted(suspects)), tuple(lines), tuple(unsteady))


def _odd_ones(members: Sequence[CanaryBits]) -> tuple[list[int], list[str]]:
    """The ranks of one kind whose bits are not those of most, or all where no bits are; and a line about them."""
    (most, count), *others = Counter(each.runs[0] for each in members).most_common() or [((), 0)]
    if not others:
        return [], []
    if count == others[0][1]:
        sides = defaultdict(list)
        for each in members:
            sides[each.runs[0]].append(each)
        parted = " and ".join(_named(side) for side in sides.values())
        where = _differs(most, others[0][0])
        return [each.rank for each in members], [
            f"{parted} make different bits in {where}, and none are in the majority"
        ]
    odd = [each for each in members if each.runs[0] != most]
    rest = [each for each in members if each.runs[0] == most]
    where = _differs(most, odd[0].runs[0])
    make = "make" if len(odd) > 1 else "makes"
    return [each.rank for each in odd], [f"{_named(odd)} {make} other bits than {_named(rest)}, in {where}"]


def _named(members: Sequence[CanaryBits]) -> str:
    """rank 3 on node-1, or ranks 0, 1 and 6 more on node-1, node-2."""
    ranks, hosts = [str(each.rank) for each in members], dict.fromkeys(each.host for each in members)
    shown = ", ".join(ranks) if len(ranks) <= 8 else f"{', '.join(ranks[:8])} and {len(ranks) - 8} more"
    on = ", ".join(list(hosts)[:8]) + (f" and {len(hosts) - 8} more" if len(hosts) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown} on {on}"


def _differs(one: Sequence[int], other: Sequence[int]) -> str:
    """The first pass in which two runs differ."""
    return next(name for name, a, b in zip(PASSES, one, other, strict=True) if a != b)


def canary_lines(found: CanaryResult) -> list[str]:
    """For people, where nothing is wrong."""
    lines = []
    for kind, count in found.kinds.items():
        if kind in found.unsteady:
            lines.append(f"warning: canary: kernels on {kind} do not make the same bits twice: nothing can be compared")
        else:
            same = "equal bits" if count > 1 else "nothing to compare it with but itself"
            lines.append(f"canary   {count} rank{'s' * (count > 1)} on {kind}: {same}")
    return lines


def raise_if_wrong(found: CanaryResult) -> None:
    """Ends the job where a rank computes wrongly.

    Raises:
        CanaryError: with the ranks and hosts.
    """
    if found.lines:
        raise CanaryError(
            f"canary: {'; '.join(found.lines)}; leave that host out or have it tested "
            "(faults.numerics.canary=false trains all the same)"
        )
