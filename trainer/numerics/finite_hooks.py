"""Hooks that look at what every module of a rank reads, makes and gets gradients for, and keep the first that is not
finite. They are there only while a bad step's passes are run again: `non_finite`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ...models.linear import GroupedLinear, Linear
from ...models.transformer import Transformer
from ...parallel.pipeline.needs import Kinds
from ...parallel.pipeline.program import Op
from ...parallel.record.ring import Recorder

_BACKWARD = (Kinds.BACKWARD, Kinds.INPUT_GRAD, Kinds.WEIGHT_GRAD)
_UNSET = object()


def bad_value(x: Tensor) -> str:
    """What is not finite in x (…): NaN, infinity, or nothing."""
    if torch.isfinite(x).all():
        return ""
    return "NaN" if torch.isnan(x).any() else "infinity"


@dataclass(frozen=True)
class Seen:
    """The first tensor that was not finite.

    Args:
        op: the operation in which it was seen.
        count: tensors that were looked at in it before.
        again: whether it is of a second run, of a part that is recomputed.
        module: its name in the model; of several that read the tensor, all.
        tensor: which of it.
        value: NaN or infinity.
    """

    op: Op
    count: int
    again: bool
    module: str
    tensor: str
    value: str


class FiniteHooks:
    """Looks at tensors inside a `with`; nothing is left afterwards.

    A module's forward pass is seen from its hooks, a projection's from where it multiplies (several may share one
    product), the head's from its loss. Their inputs' and outputs' gradients are looked at as they come. A gradient
    that is bad was made by what read the tensor, so it is these modules that are named.

    Args:
        model: this rank's part.
        recorder: of the rank, which knows the operation that is under way.
        ops: its program's operations.
    """

    def __init__(self, model: Transformer, recorder: Recorder, ops: Sequence[Op]) -> None:
        self._model, self._recorder, self._ops = model, recorder, ops
        self.first: Seen | None = None
        self._at, self._count = -1, 0
        self._readers = WeakTensorKeyDictionary()
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> FiniteHooks:
        names = {id(module): name for name, module in self._model.named_modules()}
        for module in self._model.modules():
            name = names[id(module)]
            if isinstance(module, Linear | GroupedLinear):
                self._replace(module, "apply_weights", partial(self._multiply, module.apply_weights, names))
            elif name and next(module.parameters(), None) is not None and not isinstance(module, nn.ModuleDict):
                before = module.register_forward_pre_hook(partial(self._before, name))
                after = module.register_forward_hook(partial(self._after, name))
                self._undo += [before.remove, after.remove]
        if self._model.head_op is not None:
            self._replace(self._model.head_op, "loss", partial(self._loss, self._model.head_op.loss))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._undo:
            self._undo.pop()()

    def _replace(self, owner: object, name: str, value: object) -> None:
        held = vars(owner).get(name, _UNSET)
        setattr(owner, name, value)
        undo = partial(delattr, owner, name) if held is _UNSET else partial(setattr, owner, name, held)
        self._undo.append(undo)

    # What is looked at ----------------------------------------------------------------------------------------

    def _before(self, name: str, module: nn.Module, given: Any) -> None:
        self._read(name, given[0] if given else None)

    def _after(self, name: str, module: nn.Module, given: Any, made: Any) -> None:
        self._made([name], made)

    def _multiply(self, apply: Callable[..., Any], names: dict[int, str], x: Any, *rest: Any) -> Any:
        linears = [names[id(linear)] for linear in rest[-1]]
        for name in linears:
            self._read(name, x)
        made = apply(x, *rest)
        self._made(linears, made)
        return made

    def _loss(self, loss: Callable[..., Tensor], x: Tensor, *rest: Any, **named: Any) -> Tensor:
        self._read("head", x)
        made = loss(x, *rest, **named)
        self._see("head", "loss", made)
        return made

    def _read(self, name: str, x: Any) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return
        self._see(name, "input", x)
        self._follow(x, "", name)

    def _made(self, names: Sequence[str], made: Any) -> None:
        outputs = made if isinstance(made, tuple | list) else (made,)
        for i, y in enumerate(outputs):
            if isinstance(y, Tensor) and y.is_floating_point():
                name = names[min(i, len(names) - 1)]
                self._see(name, "output", y)
                self._follow(y, name, "")

    def _follow(self, x: Tensor, maker: str, reader: str) -> None:
        """Looks at the gradient of x (…) too."""
        if self.first is not None or not torch.is_grad_enabled() or not x.requires_grad or self._in_backward:
            return
        readers = self._readers.get(x)
        if readers is None:
            readers = self._readers[x] = list[str]()
            x.register_hook(partial(self._gradient, maker, readers))
        if reader:
            readers.append(reader)

    def _gradient(self, maker: str, readers: list[str], grad: Tensor) -> None:
        inner = [name for name in readers if not any(other.startswith(f"{name}.") for other in readers)]
        if inner:
            self._see(" or ".join(dict.fromkeys(inner)), "gradient of its input", grad, again=False)
        else:
            self._see(maker, "gradient of its output", grad, again=False)

    def _see(self, module: str, tensor: str, x: Tensor, again: bool | None = None) -> None:
        if self.first is not None:
            return
        if self._recorder.op != self._at:
            self._at, self._count = self._recorder.op, 0
        value = bad_value(x.detach())
        if value:
            second = self._in_backward if again is None else again
            self.first = Seen(self._ops[self._at], self._count, second, module, tensor, value)
        self._count += 1

    @property
    def _in_backward(self) -> bool:
        return self._ops[self._recorder.op].kind in _BACKWARD
