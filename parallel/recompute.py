"""What is made again in backward rather than kept.

A part of a forward pass is a function of tensors. Neither what autograd saves in it nor what it returns is kept: in the
graph stands a `Missing` instead. At the first of them that backward asks for, the function runs once more, and fills in
all that are still wanted:

    forward     x ── part ──▶ y ── reader ──▶          x is kept; the nodes of part and reader hold a Missing each
    backward    the reader asks ──▶ part(x) ──▶ y for the reader, and for the part's own nodes what they had saved

The graph is that of the first run, with its parameters and their slots; the second run only fills it in. A node drops
its Missing as soon as it has run, so what was made again is freed at once, and nothing is made twice. What a part is
made from may be the Missing of an earlier part, or be on the host (`saved_tensors.Keeper`): it is asked for in turn.

A part whose rows are tokens can be made again for some of them (`TokenBlocks`): then of each tensor the rows of the
first tokens are kept, copied out of it, and the second run makes the others alone and joins both:

    forward     x ── part ──▶ y ── reader ──▶          x and the first rows of y are kept
    backward    the rest of x ── part ──▶ the rest of y, joined with its first rows, for the reader

The first run is the same in any case. What is kept of a part, as what it is made from, may be on the host.

No random state is saved: all draws of a model are keyed. A second run that would end with work that nobody needs is
left after the last tensor that somebody does.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .fingerprints import PartPrints
from .saved_tensors import Keeper, Strided, innermost, keeping
from .token_blocks import TokenBlocks

T = TypeVar("T")


_ROUND: ContextVar[Callable[[], AbstractContextManager[object]]] = ContextVar("round", default=nullcontext)
"""What goes round the second runs of parts that have their first one here."""


@contextmanager
def second_runs_in(context: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """Parts that run for the first time inside this block have their second runs inside a new `context()` each."""
    token = _ROUND.set(context)
    try:
        yield
    finally:
        _ROUND.reset(token)


@dataclass(frozen=True, slots=True)
class FirstRows:
    """What is kept of a tensor of which the rest is made again.

    Args:
        held: its first rows, as the keeper around the part holds them.
        how: it lies in its storage.
        elements: of that storage.
    """

    held: Any
    how: Strided
    elements: int

    @staticmethod
    def of(tensor: Tensor, blocks: TokenBlocks, around: Keeper) -> FirstRows:
        """Of a tensor (N, …) or (B, T, …)."""
        elements = tensor.untyped_storage().nbytes() // tensor.element_size()
        return FirstRows(around.pack(blocks.first(tensor.detach())), Strided.of(tensor), elements)


class Missing:
    """A saved tensor that is made again when it is asked for; what is kept of it."""

    __slots__ = ("__weakref__", "_rerun", "_tensor", "rows")

    def __init__(self, rerun: Rerun, rows: FirstRows | None = None) -> None:
        self._rerun: Rerun | None = rerun
        self._tensor: Tensor | None = None
        self.rows = rows

    def fill(self, tensor: Tensor) -> None:
        """It is there from now on."""
        self._tensor, self._rerun, self.rows = tensor, None, None

    def tensor(self) -> Tensor:
        """It, of any shape (…)."""
        if self._rerun is not None:
            self._rerun.run()
        assert self._tensor is not None
        return self._tensor


class Rerun:
    """A part that has run once and may run a second time; the `Keeper` of its first run.

    Args:
        function: of tensors to a tensor or several; what else it reads must outlive the backward pass.
        inputs: its tensors.
        around: the keeper of these.
        blocks: the tokens that run a second time; none: all, or rows are no tokens.
        name: of the part.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: Sequence[Tensor],
        around: Keeper,
        blocks: TokenBlocks | None = None,
        name: str = "",
    ) -> None:
        self._function, self._around, self._blocks = function, around, blocks
        # Products of fewer rows may be summed in another order: what is made of some tokens alone has other bits.
        self._prints = PartPrints.begin(name) if blocks is None else None
        self._round = _ROUND.get()
        self._inputs = [(around.pack(x.detach()), x.requires_grad) for x in inputs]
        self._given = addresses(inputs) if blocks is not None else frozenset()
        self._inside: list[weakref.ref[Missing]] = []
        self._returned: list[tuple[weakref.ref[Missing], int, Strided]] = []
        self._outputs: list[Strided] = []
        self._rows: dict[int, FirstRows] = {}

    def first(self, inputs: Sequence[Tensor]) -> Any:
        """What the function returns of its inputs, with a graph."""
        with keeping(self):
            outputs = self._function(*inputs)
        if self._blocks is not None:
            self._outputs = [Strided.of(y) for y in as_tuple(outputs)]
        if self._prints is not None:
            self._prints.give(as_tuple(outputs))
        return outputs

    def pack(self, tensor: Tensor) -> Any:
        """Nothing is kept but parameters, which are there anyway, and the first rows where these are to be kept."""
        if isinstance(tensor, nn.Parameter):
            return tensor
        if tensor.untyped_storage().data_ptr() in self._given:
            return self._around.pack(tensor)
        rows = None if self._blocks is None or not tensor.numel() else FirstRows.of(tensor, self._blocks, self._around)
        missing = Missing(self, rows)
        self._inside.append(weakref.ref(missing))
        if self._prints is not None:
            self._prints.save(tensor)
        return missing

    def unpack(self, held: Any) -> Tensor:
        return held.tensor() if isinstance(held, Missing) else self._around.unpack(held)

    def returned(self, index: int, tensor: Tensor) -> Missing:
        """In place of a tensor (…) that lies in the storage of what the function returned as its `index`-th."""
        if self._blocks is not None and index not in self._rows:
            whole = self._outputs[index].on(tensor.untyped_storage())
            self._rows[index] = FirstRows.of(whole, self._blocks, self._around)
        missing = Missing(self)
        self._returned.append((weakref.ref(missing), index, Strided.of(tensor)))
        return missing

    def run(self) -> None:
        """The second run: fills in what is still wanted."""
        with self._round():
            self._run()

    def _run(self) -> None:
        inputs = [self._input(held).requires_grad_(needed) for held, needed in self._inputs]
        self._inputs.clear()
        wanted = [(missing, index, how) for each, index, how in self._returned if (missing := each()) is not None]
        given = addresses(inputs) if self._blocks is not None else frozenset()
        prints = self._prints  # what is compared includes what the part returns
        second = _SecondRun(
            self._inside, self._whole, given, to_the_end=bool(wanted) or prints is not None, prints=prints
        )
        with torch.enable_grad(), keeping(second):
            try:
                outputs = list(as_tuple(self._function(*inputs)))
            except _EnoughError:
                return
        del inputs
        second.check()
        if prints is not None:
            prints.given_again(outputs)
        for index in {index for _, index, _ in wanted}:
            # One after the other: what it was joined from goes before the next one is.
            outputs[index] = self._whole(outputs[index].detach(), self._rows.pop(index, None))
        for missing, index, how in wanted:
            missing.fill(how.on(outputs[index].untyped_storage()))

    def _input(self, held: Any) -> Tensor:
        """What the second run reads of an input."""
        x = self._around.unpack(held).detach()
        return x if self._blocks is None else self._blocks.rest(x)

    def _whole(self, made: Tensor, rows: FirstRows | None) -> Tensor:
        """What a tensor of the second run stands for, with what was kept of it."""
        if rows is None or self._blocks is None:
            return made
        return self._blocks.joined(rows.how, rows.elements, self._around.unpack(rows.held), made)


class _EnoughError(Exception):
    """Nobody needs what would come now."""


class _SecondRun:
    """The keeper of a second run: hands out what is saved to those who asked for it in the first one.

    Args:
        missing: in the order of the first run.
        whole: a tensor of the first run, from that of the second one and what was kept.
        given: addresses of storages of which nothing was asked for.
        to_the_end: what the function returns is wanted too.
        prints: of the first run, if what is saved is to be compared.
    """

    def __init__(
        self,
        missing: Sequence[weakref.ref[Missing]],
        whole: Callable[[Tensor, FirstRows | None], Tensor],
        given: Set[int],
        *,
        to_the_end: bool,
        prints: PartPrints | None = None,
    ) -> None:
        self._prints = prints
        self._missing, self._at, self._whole, self._given = missing, 0, whole, given
        last = max((i for i, each in enumerate(missing) if each() is not None), default=-1)
        self._enough = None if to_the_end else last + 1

    def pack(self, tensor: Tensor) -> Tensor | None:
        if isinstance(tensor, nn.Parameter):
            return tensor
        if tensor.untyped_storage().data_ptr() in self._given:
            return None
        if self._at == len(self._missing):
            raise self._differs()
        if self._prints is not None:
            self._prints.saved_again(self._at, tensor)
        missing, self._at = self._missing[self._at](), self._at + 1
        if missing is not None:
            missing.fill(self._whole(tensor.detach(), missing.rows))
        if self._at == self._enough:
            raise _EnoughError
        return None

    def unpack(self, held: Any) -> Tensor:
        raise RuntimeError("the graph of a second run is not there to be used")

    def check(self) -> None:
        """After a run to the end."""
        if self._at != len(self._missing):
            raise self._differs()

    def _differs(self) -> RuntimeError:
        return RuntimeError(f"a second run saves other tensors than the {len(self._missing)} of the first one")


class PartKeeper:
    """The keeper of what is around parts that are made again: it knows what these return.

    Args:
        parts: their names.
        around: keeper of the rest.
        some: by name, the parts that are made again for some tokens.
        name: of what they are parts of.
    """

    def __init__(self, parts: frozenset[str], around: Keeper, some: Mapping[str, TokenBlocks], name: str = "") -> None:
        self.parts, self._name = parts, name
        self._around, self._some = around, some
        self._origins: dict[int, tuple[StorageWeakRef, Rerun, int]] = {}

    def run(self, part: str, function: Callable[..., T], inputs: Sequence[Tensor]) -> T:
        """Runs a part that is made again."""
        rerun = Rerun(function, inputs, self, self._some.get(part), f"{part} of {self._name}")
        outputs = rerun.first(inputs)
        given = addresses(inputs)
        if part in self._some and len(addresses(as_tuple(outputs))) < len(as_tuple(outputs)):
            raise RuntimeError(f"{part}: two of its outputs lie in one storage, of which rows cannot be kept")
        for index, y in enumerate(as_tuple(outputs)):
            storage = y.untyped_storage()
            # An input that is handed on is kept anyway; tensors without elements share an address.
            if storage.nbytes() and storage.data_ptr() not in given:
                self._origins[storage.data_ptr()] = (StorageWeakRef(storage), rerun, index)
        return outputs

    def pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        origin = self._origins.get(storage.data_ptr())
        # By address, which another storage may have as soon as the part's own is gone.
        if origin is None or origin[0].expired():
            return self._around.pack(tensor)
        _, rerun, index = origin
        return rerun.returned(index, tensor)

    def unpack(self, held: Any) -> Tensor:
        return held.tensor() if isinstance(held, Missing) else self._around.unpack(held)

    def close(self) -> None:
        """No part's output is saved any more."""
        self._origins.clear()


def addresses(tensors: Iterable[Tensor]) -> frozenset[int]:
    """Of the storages of tensors (…)."""
    return frozenset(x.untyped_storage().data_ptr() for x in tensors)


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """Outputs of a function that returns one tensor (…) or several."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def run_part(part: str, function: Callable[..., T], *inputs: Tensor) -> T:
    """function(*inputs), a part of a layer by this name, which is made again in backward where that is wanted
    (`remaking`), or is inside of something that is.

    What the function returns must not be changed in place by anyone.
    """
    keeper = innermost()
    if isinstance(keeper, PartKeeper) and part in keeper.parts:
        return keeper.run(part, function, inputs)
    return function(*inputs)


@contextmanager
def remaking(parts: frozenset[str], some: Mapping[str, TokenBlocks] | None = None, name: str = "") -> Iterator[None]:
    """Parts by these names inside this block are made again; so what reads their outputs must be inside too.

    Args:
        parts: their names.
        some: those of them that are made again for some tokens: all their tensors have rows that are tokens
            (`TokenBlocks`), and what the function makes of a token depends on no other one.
        name: of what they are parts of.
    """
    keeper = PartKeeper(parts, innermost(), some or {}, name)
    try:
        with keeping(keeper):
            yield
    finally:
        keeper.close()


def run_again(function: Callable[..., T], *inputs: Tensor, name: str = "") -> T:
    """function(*inputs), all of which is made again in backward but what it returns; `name` says what it is."""
    return Rerun(function, inputs, innermost(), name=name).first(inputs)
