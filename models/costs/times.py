"""How fast a rank's device computes and copies, for what is decided from times before a step runs. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...configs import ModelConfig
from ...configs.schema import HardwareConfig
from .activations import layer_rows
from .flops import layer_flops
from .kept import Choice, SomeTokens, flops_of_again, kept_bytes, share_again
from .widths import LocalWork

_TFLOPS = {"bf16": 989.5, "fp32": 66.9, "fp64": 66.9}
_HOST_GIB_S = 59.6
"""Of an H100 SXM5 on PCIe 5.0, where nothing is known of the devices."""
_REACHED = 0.7
"""Share of the peak that large products reach."""
_BALANCE = {2: 295.0, 4: 20.0, 8: 20.0}
"""FLOPs for each byte that a device's own memory gives, by bytes of an element: an H100's peak over 3.35e12."""
_LINK = 370e9
"""Bytes a second of a collective between the GPUs of a node, H100s."""


@dataclass(frozen=True)
class Rates:
    """What one device does in a second.

    Args:
        flops: of matrix products in train.dtype.
        host_bytes: that go to its host, and as many that come from it at the same time.
        source: where the numbers are from, for people.
        stored, fetched: bytes that go to a disk, and that come from it, for what the host may not hold.
    """

    flops: float
    host_bytes: float
    source: str
    stored: float = 3e9
    fetched: float = 5e9

    @staticmethod
    def of(hardware: HardwareConfig, dtype: str) -> Rates:
        """Those of the job's keys or preset; for what they do not say, those of an H100."""
        given = {"peak_tflops": hardware.peak_tflops, "host_gib_s": hardware.host_gib_s}
        tflops = _TFLOPS[dtype] if hardware.peak_tflops is None else hardware.peak_tflops
        gib_s = _HOST_GIB_S if hardware.host_gib_s is None else hardware.host_gib_s
        missing = [f"hardware.{key}" for key, value in given.items() if value is None]
        source = f"{' and '.join(missing)} assumed, an H100's" if missing else "hardware"
        return Rates(tflops * 1e12, gib_s * 2**30, source)


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """How long a rank takes to make again what a layer does not keep of a microbatch.

    FLOPs over the rate of matrix products, bytes over that of the device's memory, collectives over that of a link.

    Args:
        model: resolved.
        work: the microbatch as the rank works on it.
        length: tokens of a whole sequence.
        rates: of the device.
    """

    model: ModelConfig
    work: LocalWork
    length: int
    rates: Rates

    def again(self, layer: int, choice: Choice) -> float:
        """Seconds that a layer's choice adds to its backward pass."""
        if choice == "none":
            return 0.0
        rows = layer_rows(self.model, layer, self.work)
        flops = self._whole(layer) if choice == "full" else flops_of_again(rows, choice)
        # What is made is written once, and about as much is read for it.
        nbytes = 2.0 * sum(row.nbytes * share_again(row, choice) for row in rows)
        seconds = (flops / _REACHED + nbytes * _BALANCE[self.work.width]) / self.rates.flops
        return seconds + self._collected(layer, choice) / _LINK

    def _whole(self, layer: int) -> float:
        """FLOPs of a forward pass on one rank; all ranks of a stage do as much."""
        work = self.work
        return layer_flops(self.model, self.length)[layer] * work.tokens / self.length / work.tp

    def _collected(self, layer: int, choice: Choice) -> float:
        """Bytes that are gathered and sent once more."""
        m, work = self.model, self.work
        found = 0.0
        if work.tp > 1:
            gathers = _gathers(choice)
            found += gathers * work.tokens * m.hidden * work.width * (work.tp - 1) / work.tp
        if choice == "full" and layer in m.routed_layers and work.ranks > 1:
            found += 2 * work.sent_rows(m) * m.hidden * work.width
        return found

    def handful(
        self, layer: int, parts: Sequence[str], of: Callable[[frozenset[str]], Choice] = frozenset
    ) -> tuple[Choice, ...]:
        """The choices of a layer that are worth a look, from the one that keeps most to the one that keeps least: no
        mix of two others keeps as little in less time.

        Args:
            layer: its index.
            parts: that may be made again by themselves.
            of: the choice that some of them are.
        """
        rows = layer_rows(self.model, layer, self.work)
        useful = [part for part in parts if any(part in row.parts for row in rows)]
        subsets = [frozenset(p for i, p in enumerate(useful) if bits >> i & 1) for bits in range(1, 1 << len(useful))]
        hull: list[_Point] = []
        choices: list[Choice] = ["none", *map(of, subsets), "full"]
        points = [(kept_bytes(rows, choice), self.again(layer, choice), choice) for choice in choices]
        for point in sorted(points, key=lambda each: (-each[0], each[1])):
            if hull and hull[-1][0] == point[0]:
                continue
            while hull and point[1] <= hull[-1][1]:
                hull.pop()
            while len(hull) > 1 and _above(hull[-2], hull[-1], point):
                hull.pop()
            hull.append(point)
        return tuple(choice for _, _, choice in hull)


def _gathers(choice: Choice) -> float:
    """How often the tokens of the residual stream are gathered again over tp."""
    if choice == "full":
        return 4.0
    parts, share = (choice.parts, choice.blocks.again) if isinstance(choice, SomeTokens) else (choice, 1.0)
    return share * len({"attention", "ffn"}.intersection(parts))


_Point = tuple[int, float, Choice]
"""(bytes kept, seconds, the choice)."""


def _above(first: _Point, middle: _Point, last: _Point) -> bool:
    """Whether the middle one takes as long as a mix of its neighbours that keeps as little, or longer."""
    (a, s, _), (b, t, _), (c, u, _) = first, middle, last
    return (t - s) * (a - c) >= (u - s) * (a - b)
