"""Where numbers that are not finite began: the passes of a bad step, run again with every module looked at.

All ranks have decided alike that the step is bad, and nothing was updated: so all of them run its batch once more,
through the same operations of the same program, up to the gradient's norm. What each rank finds first is brought
together, and the earliest counts:

    parameters  ·  forward passes, by microbatch and stage  ·  backward passes, by microbatch, from the last stage on
    ·  the reduced gradient, from the loss on  ·  what the bad step itself has left in it

The last of these is all there is where the numbers do not come again: then it was no mistake of the data or the model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...parallel.replicas.parameters import part_of
from ..checkpoint.state import units_by_key
from ..data.dataset import Microbatch
from ..setup import Parts
from ..step import Stepper
from .finite_hooks import FiniteHooks, Seen, bad_value

_LAYER = re.compile(r"layers\.(\d+)")
_SAMPLES = 64
"""Of a microbatch, that are named."""


@dataclass(frozen=True)
class NonFinite:
    """A tensor that was not finite.

    Args:
        order: the less, the earlier; only of ranks of one job.
        rank: where.
        during: "parameters", "forward", "recompute", "backward" or "gradient".
        value: NaN or infinity.
        module: its name in the model.
        tensor: which of it.
        stage: of the pipeline (part-stages counted).
        microbatch: of the global batch; −1: of no single one.
        samples: of that microbatch, run-wide numbers.
        repeats: whether it came again when the batch did.
    """

    order: tuple[int, ...]
    rank: int
    during: str
    value: str
    module: str
    tensor: str
    stage: int
    microbatch: int = -1
    samples: tuple[int, ...] = ()
    repeats: bool = True

    @property
    def layer(self) -> int | None:
        """Its layer."""
        found = _LAYER.search(self.module)
        return int(found[1]) if found else None


def find_non_finite(stepper: Stepper, step: int, batches: Sequence[Microbatch], valid: int) -> NonFinite | None:
    """The earliest tensor of a bad step that is not finite; all ranks call this, and learn the same.

    Args:
        stepper: which has run the step, and on a GPU perhaps the one after it.
        step, batches, valid: as of `Stepper.run`.

    Returns:
        None where all numbers are finite when the step is run again and were not seen to be bad before: then their
        sum of squares overflows.
    """
    mesh = stepper.mesh
    parameter = _bad_parameter(stepper.parts, mesh.rank)
    found = _earliest(stepper, parameter)
    if found is not None:
        return found
    # On a GPU the gradient is the next step's by now.
    left = _bad_gradient(stepper, repeats=False) if stepper.device.type == "cpu" else None
    hooks = FiniteHooks(stepper.model, mesh.recorder, stepper.ops)
    with hooks, stepper.repeated(step, batches, valid) as losses:
        own = _seen(stepper, hooks.first, batches) if hooks.first is not None else _bad_loss(stepper, losses, batches)
        own = own or _bad_gradient(stepper, repeats=True)
    return _earliest(stepper, own or left)


def _earliest(stepper: Stepper, own: NonFinite | None) -> NonFinite | None:
    found = [each for each in stepper.mesh.gather_objects(own) if each is not None]
    return min(found, key=lambda each: (not each.repeats, each.order, each.rank), default=None)


def _bad_parameter(parts: Parts, rank: int) -> NonFinite | None:
    """The first in the order of the forward pass."""
    for order, (name, param) in enumerate(parts.model.named_parameters()):
        value = bad_value(local_part(param).detach())
        if value:
            module, _, tensor = name.rpartition(".")
            stage = _stage_of(parts, name)
            return NonFinite((0, 0, stage, order), rank, "parameters", value, module, tensor, stage)
    return None


def local_part(x: Tensor) -> Tensor:
    """What this rank has of a parameter (…), wherever it is spread: FSDP2's and that of ZeRO 3 too."""
    whole = x.to_local() if hasattr(x, "to_local") else part_of(x)  # type: ignore[operator]
    return getattr(x, "ds_tensor", whole)


def _seen(stepper: Stepper, seen: Seen, batches: Sequence[Microbatch]) -> NonFinite:
    op, forward = seen.op, seen.tensor in ("input", "output", "loss") and not seen.again
    stage = max(op.stage, 0)
    order = (1, op.index, stage, seen.count) if forward else (2, op.index, -stage, seen.count)
    during = "forward" if forward else "recompute" if seen.again else "backward"
    number, samples = _which(stepper, op.index, batches)
    return NonFinite(order, stepper.mesh.rank, during, seen.value, seen.module, seen.tensor, stage, number, samples)


def _bad_loss(stepper: Stepper, losses: Sequence[Tensor], batches: Sequence[Microbatch]) -> NonFinite | None:
    """Of the first microbatch whose loss is bad, though no module's output was."""
    last = len(stepper.parts.pipeline.split.layers) - 1
    for index, loss in enumerate(losses):
        value = bad_value(loss)
        if value:
            number, samples = _which(stepper, index, batches)
            order = (1, index, last + 1, 0)
            return NonFinite(order, stepper.mesh.rank, "forward", value, "head", "loss", last, number, samples)
    return None


def _bad_gradient(stepper: Stepper, *, repeats: bool) -> NonFinite | None:
    """Of what this rank has of the reduced gradient, the parameter that is nearest to the loss."""
    parts = stepper.parts
    places = {name: order for order, (name, _) in enumerate(parts.model.named_parameters())}
    units, worst = units_by_key(parts.replicas), None
    for piece in parts.replicas.pieces():
        values = units[piece.unit].grad[piece.at : piece.at + piece.stop - piece.start]
        if (worst is None or places[piece.name] > places[worst[0]]) and (value := bad_value(values)):
            worst = piece.name, value
    if worst is None:
        return None
    (name, value), stage = worst, _stage_of(parts, worst[0])
    module, _, tensor = name.rpartition(".")
    order = (3, 0, -stage, -places[name])
    what = f"gradient of {tensor}"
    return NonFinite(order, stepper.mesh.rank, "gradient", value, module, what, stage, repeats=repeats)


def _which(stepper: Stepper, index: int, batches: Sequence[Microbatch]) -> tuple[int, tuple[int, ...]]:
    """The number in the global batch of a microbatch of this rank, and its samples."""
    dp = stepper.mesh.axis("dp")
    return index * dp.size + dp.rank, tuple(batches[index].samples.tolist()[:_SAMPLES])


def _stage_of(parts: Parts, name: str) -> int:
    """The stage that computes with a parameter."""
    layers, found = parts.pipeline.split.layers, _LAYER.match(name)
    if found is None:
        return 0 if name.startswith(("embed", "positions")) else len(layers) - 1
    return next(stage for stage, mine in enumerate(layers) if int(found[1]) in mine)
