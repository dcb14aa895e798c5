"""The choice of how many subgroups of the states go to the device, on published times."""

from __future__ import annotations

import pytest

from pentad.trainer.optim.stride import STRIDES, StrideTuner, best_stride, on_device, update_time

# Milliseconds of a step by stride, data parallel over 4 A100 (mauryaavinash95/deep-optimizer-states-results), and
# what the updates of all subgroups take on the host and on the device, fitted to them.
MEASURED: dict[str, tuple[tuple[float, float], dict[int, float]]] = {
    "7B": ((1543, 1174), {2: 1336, 3: 1448, 4: 1466, 6: 1486, 8: 1505, 10: 1474}),
    "8.3B": ((2416, 1731), {2: 2068, 3: 2190, 4: 2241, 6: 2325, 8: 2347, 10: 2313}),
    "13B": ((3077, 2049), {2: 2595, 3: 2679, 4: 2822, 6: 2910, 8: 2943, 10: 2999}),
    "20B": ((4340, 2722), {2: 3500, 3: 3604, 4: 3806, 6: 3931, 8: 3941, 10: 3951}),
}
ALL_ON_THE_HOST = {"7B": 2054, "8.3B": 3080, "13B": 3806, "20B": 5202}


@pytest.mark.parametrize("model", MEASURED)
def test_the_model_picks_the_stride_that_was_measured_to_be_best(model: str) -> None:
    (host, device), times = MEASURED[model]
    tried = {0: ALL_ON_THE_HOST[model], **times}
    assert best_stride(host, device, tuple(tried)) == min(tried, key=lambda stride: tried[stride])
    for stride, measured in times.items():
        assert update_time(stride, host, device) == pytest.approx(measured, rel=0.03 if model != "20B" else 0.065)


def test_the_fastest_stride_is_on_one_side_or_the_other() -> None:
    assert best_stride(1.0, 2.0) == 0 and best_stride(2.0, 1.0) == 1
    assert best_stride(2.0, 1.0, (0, 2, 3)) == 2


@pytest.mark.parametrize("stride", STRIDES)
def test_so_many_subgroups_are_on_the_device(stride: int) -> None:
    chosen = [number for number in range(120) if on_device(number, stride)]
    assert len(chosen) == (120 // stride if stride else 0)


def test_the_choice_follows_the_measurements() -> None:
    """Predicted to be best on the device, measured to be slower there than predicted."""
    tuner = StrideTuner(host=2.0, device=1.0)
    assert tuner.stride == 1
    seen = set()
    for _ in range(400):
        seen.add(tuner.stride)
        share = 0.0 if tuner.stride == 0 else 1 / tuner.stride
        host = 2.0 * (1 - share)
        tuner.measured(host + 6.0 * share, host, share)
    assert tuner.stride == 0 and seen >= {0, 1}
