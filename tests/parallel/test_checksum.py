"""Checksums see every single bit, and nothing else."""

from __future__ import annotations

import pytest
import torch

from pentad.parallel.checksum import ChecksumWindow, ParameterMemory, checksum, sum_words, words


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.uint8])
@pytest.mark.parametrize(("count", "start"), [(1, 0), (3, 1), (7, 0), (13, 5), (40, 3)])
def test_every_bit_changes_the_sum_and_flipping_it_back_restores_it(dtype: torch.dtype, count: int, start: int) -> None:
    memory = torch.zeros(64, dtype=torch.float64).view(torch.uint8)
    memory.copy_(torch.arange(len(memory)) * 37 % 251)
    x = memory.view(dtype)[start : start + count]
    raw, before = x.view(torch.uint8), (int(checksum(x)), int(sum_words(words(x))))
    found = set()
    for byte in range(len(raw)):
        for bit in range(8):
            raw[byte] ^= 1 << bit
            now = int(checksum(x)), int(sum_words(words(x)))
            assert now[0] != before[0] and now[1] != before[1], (byte, bit)
            found.add(now[0])
            raw[byte] ^= 1 << bit
    assert (int(checksum(x)), int(sum_words(words(x)))) == before
    assert len(found) > 1


def test_equal_bits_have_equal_sums_wherever_they_lie() -> None:
    whole = torch.randn(5, 9)
    assert int(checksum(whole[1:3])) == int(checksum(whole[1:3].clone()))
    assert int(checksum(whole[:, 2])) == int(checksum(whole[:, 2].clone()))
    assert int(checksum(whole.view(-1)[1:8])) == int(checksum(whole.view(-1)[1:8].clone()))
    assert int(checksum(torch.zeros(0))) == int(checksum(torch.zeros(3))) == 0
    assert int(checksum(torch.tensor(-0.0))) != 0  # bits, not values
    nan = torch.tensor([torch.nan])
    assert int(checksum(nan)) == int(checksum(nan.clone()))


def test_the_sum_is_that_of_the_words_in_plain_arithmetic() -> None:
    x = torch.randn(100, dtype=torch.float64)
    exact = sum(int.from_bytes(x[i].numpy().tobytes(), "little", signed=True) for i in range(100))
    assert int(checksum(x)) % 2**64 == exact % 2**64


def test_a_window_says_which_place_changed_and_forgets_nothing() -> None:
    memory = torch.zeros(30)
    window = ChecksumWindow(
        [ParameterMemory("x", str(i), memory[i * 10 : i * 10 + 10]) for i in range(3)], memory.device
    )
    memory[5] = 1  # not open yet
    window.open()
    window.check()
    assert not window.changed.any()
    memory[15] = 1
    window.check()
    assert window.changed.tolist() == [False, True, False]
    window.close()
    memory[:] = 2
    window.open(2)  # the others are closed
    memory[:] = 3
    window.check()
    assert window.changed.tolist() == [False, True, True]
