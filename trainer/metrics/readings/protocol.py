"""What a reading is, and what it is told. No torch here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ....configs.schema import Config
from ....parallel.pipeline.program import Program
from ...numerics.spike_verdict import SpikeVerdict
from ..metric import Metric
from ..rows import StepRows


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What does not change while a run goes on."""

    cfg: Config
    """Resolved."""
    devices: int
    """Ranks of the job."""
    device: str
    """This rank's, as torch calls it: cpu, cuda:0."""
    peak_tflops: float | None
    """Of one device; None where it is not known."""
    peak_fp8_tflops: float | None = None
    """Of one device, for products in 8 bits; None where it is not known."""
    ceiling_tflops: float | None = None
    """What one device reaches in the model's own matrix products; None where it is not known."""
    program: Program | None = None
    """What the ranks of a pipeline do in a step."""
    hosts: Mapping[int, str] = field(default_factory=dict)
    """Where each rank is, as far as that is known."""
    epoch: int = 0
    """How many times the mesh was built anew since the job began."""
    locate: Callable[[Sequence[int]], Sequence[tuple[str, int]]] | None = None
    """Of sequences' run-wide numbers: the source that each comes from, and its first token there; None without data."""


@dataclass(frozen=True, kw_only=True)
class OnRank:
    """What one rank knows of the step that it is in."""

    step: int
    """1 for the first step of the training."""
    data_s: float
    """How long it waited for the loader."""
    silent_s: Callable[[], float] = float
    """Asked once: the longest time between two signs of life since the step before; 0: it gives none."""


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """What a step of the whole job was and did."""

    step: int
    """Optimizer steps done since the start of training, this one included."""
    loss: float
    """Mean over all valid tokens of the global batch, in nats."""
    loss_max_rank: float | None = None
    """The largest mean over a rank's own valid tokens, in nats; None where it is not known."""
    grad_norm: float
    """Global L2 norm before clipping."""
    lr: float
    skipped: bool
    """Whether nothing was updated, for a loss or gradient that was not finite, or a spike."""
    skips: int
    """Steps skipped since the start of training, this one included."""
    tokens: int
    """Of this step's global batch."""
    tokens_seen: int
    """Since the start of training, this step's included."""
    valid: int
    """Tokens of the global batch that have a loss."""
    pairs: float
    """Unmasked attention pairs of one layer, the mean over those with softmax attention, of the global batch."""
    seconds: float
    """Between the moments when the previous step's numbers and this one's were known, without an evaluation."""
    spike: SpikeVerdict | None = None
    """Where the step was held back as a spike, and run again: what it was."""
    losses: tuple[float, ...] = ()
    """What each microbatch of the global batch adds to the loss, in order; empty where that is not known."""
    routed: np.ndarray | None = None
    """(layers with experts, columns) of what the routers counted, summed over all ranks: `models.routing.tally_fields`,
    then how often each choice was taken. None for a model without experts."""
    rows: tuple[StepRows, ...] = ()
    """Where each rank's time went, in steps up to this one of which that has become known; each is given once."""
    worst: tuple[float, ...] = ()
    """For each number of this reading's `watch` the largest over all ranks."""


class Reading(ABC):
    """Turns every step into the values of its metrics. It reads: nothing that it does may change the training.

    Every rank makes its own reading and asks it to `watch`; only the rank that reports calls `step`.

    Args:
        run: the run that is read.
    """

    metrics: tuple[Metric, ...] = ()
    """What `step` returns. A run may leave out how one of them is shown, never the metric."""
    watched: int = 0
    """How many numbers `watch` returns."""

    def __init__(self, run: RunFacts) -> None:
        self.run = run

    def watch(self, mine: OnRank) -> Sequence[float]:
        """Numbers of this rank whose largest over all ranks is wanted as `StepDone.worst`; inside the step, once."""
        return ()

    @abstractmethod
    def step(self, done: StepDone) -> Mapping[str, Any]:
        """Values by key of the metrics; those that are None or left out are not known."""

    def close(self) -> None:
        """After the last step."""
        return
