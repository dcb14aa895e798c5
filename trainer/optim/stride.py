"""Which subgroups of the states are updated on the device, when the states lie on the host.

Updates on the host and updates on the device (states there and back) share the host's memory and its links, so their
times add: with every k-th of the subgroups on the device a step's updates take

    T(k) = (1 − 1/k) X + Y / k          T(0) = X, all on the host; T(1) = Y, all on the device

X and Y of all subgroups. Measured times of Maurya et al., "Deep Optimizer States" (2024), are within 6 % of it.
"""

from __future__ import annotations

from collections.abc import Sequence

STRIDES = (0, 1, 2, 3, 4, 6, 8, 10)
"""0: no subgroup on the device; k: every k-th."""
_AGAIN = 32
"""Steps after which the choice is made again."""
_NEW = 0.2
"""Weight of the newest measurement in the running mean."""
_CLEARLY = 0.98
"""A change is made for times so much shorter."""


def update_time(stride: int, host: float, device: float) -> float:
    """Seconds of a step's updates, when all on the host take `host` and all on the device `device` seconds."""
    return host if stride == 0 else (1 - 1 / stride) * host + device / stride


def best_stride(host: float, device: float, strides: Sequence[int] = STRIDES) -> int:
    """The stride with the shortest time; of equal ones the first."""
    return min(strides, key=lambda stride: update_time(stride, host, device))


def on_device(number: int, stride: int) -> bool:
    """Whether a subgroup is updated on the device. The last of each k: the host is at work from the start."""
    return stride > 0 and (number + 1) % stride == 0


class StrideTuner:
    """Chooses a stride from measurements, and again as they change.

    Args:
        host, device: seconds of all updates on either, measured before the first step.
        strides: to choose from.
    """

    def __init__(self, host: float, device: float, strides: Sequence[int] = STRIDES) -> None:
        self._host, self._device, self._strides = host, device, strides
        self._whole: dict[int, float] = {}
        self._steps = 0
        self.stride = best_stride(host, device, strides)

    def measured(self, whole: float, host: float, share: float) -> None:
        """One step's updates with `stride`.

        Args:
            whole: their seconds.
            host: those in which the host updated.
            share: of all elements, that were updated on the device.
        """
        self._whole[self.stride] = _mean(self._whole.get(self.stride), whole)
        if share == 0:
            self._host = _mean(self._host, whole)
        elif share == 1:
            self._device = _mean(self._device, whole)
        else:
            self._host = _mean(self._host, host / (1 - share))
            self._device = _mean(self._device, max(whole - host, 0.0) / share)
        self._steps += 1
        if self._steps % _AGAIN == 0:
            self._choose()

    def _choose(self) -> None:
        """By measured times where there are some: what was tried once is known better than by its parts."""
        times = {k: self._whole.get(k, update_time(k, self._host, self._device)) for k in self._strides}
        best = min(times, key=lambda stride: times[stride])
        if times[best] < _CLEARLY * times[self.stride]:
            self.stride = best


def _mean(old: float | None, new: float) -> float:
    return new if old is None else (1 - _NEW) * old + _NEW * new
