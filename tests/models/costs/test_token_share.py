"""MEMO's closed form, against what follows from it for a layer of the GPT kind and against a search."""

from __future__ import annotations

import pytest

from pentad.models.costs.token_share import LayerParts, token_share


def _gpt(tokens: int, hidden: int) -> tuple[LayerParts, float]:
    """What a causal layer keeps in bf16, 16 elements a token and hidden unit, and the FLOPs of its forward pass."""
    unit = 2.0 * tokens * hidden
    return LayerParts(
        input=unit, attention=unit, others=14 * unit
    ), 24.0 * tokens * hidden**2 + 2.0 * tokens**2 * hidden


@pytest.mark.parametrize(
    ("flops_s", "bytes_s", "hidden", "whole_from"),
    [(400e12, 50e9, 4096, 78_848), (200e12, 16e9, 8192, 101_696), (312e12, 32e9, 4096, 106_848)],
)
def test_all_tokens_are_offloaded_from_the_length_of_the_closed_form_on(
    flops_s: float, bytes_s: float, hidden: int, whole_from: int
) -> None:
    assert whole_from == 16 * flops_s / bytes_s - 12 * hidden
    for tokens, whole in ((whole_from + 1, True), (whole_from - 64, False), (2 * whole_from, True)):
        parts, flops = _gpt(tokens, hidden)
        found = token_share(parts, forward_s=flops / flops_s, host_bytes_s=bytes_s, layers=32)
        assert (found.share == 1.0, found.bound) == (whole, "none" if whole else "copies")
        assert found.whole == ("input", "attention")


def test_the_share_is_the_largest_that_hides_and_fits() -> None:
    parts = LayerParts(input=2.0, attention=3.0, others=40.0)
    for forward in (0.4, 0.7, 1.0, 3.0, 5.0):
        for host in (None, 100.0, 160.0, 400.0):
            found = token_share(parts, forward_s=forward, host_bytes_s=10.0, layers=12, host_bytes=host)
            fits = [
                k / 1000
                for k in range(1001)
                if (5 + 40 * k / 1000) / 10 <= forward + 1e-12 and (host is None or 10 * (5 + 40 * k / 1000) <= host)
            ]
            assert found.share == pytest.approx(max(fits, default=0.0), abs=1e-3)
            assert (found.whole == ("input", "attention")) == bool(fits)


def test_where_not_even_the_dear_parts_hide_the_input_alone_goes_or_nothing() -> None:
    parts = LayerParts(input=2.0, attention=3.0, others=40.0)
    assert token_share(parts, forward_s=0.3, host_bytes_s=10.0, layers=12).whole == ("input",)
    assert token_share(parts, forward_s=0.1, host_bytes_s=10.0, layers=12).whole == ()
    assert token_share(parts, forward_s=9.0, host_bytes_s=10.0, layers=12, host_bytes=40.0).bound == "host"
