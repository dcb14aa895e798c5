"""Types and constants of the kernels in Triton, as launches give them: by module and name, (types, constants).

Types: h, s, d pointers to bf16, fp32, fp64; l, w to int64, int32; i an int32, f an fp32.
"""

from __future__ import annotations

from itertools import product
from typing import Any

Cases = list[tuple[str, dict[str, Any]]]


def _each(types: str, same: dict[str, Any], **choices: tuple[Any, ...]) -> Cases:
    return [(types, {**same, **dict(zip(choices, values, strict=True))}) for values in product(*choices.values())]


BOOLEAN = (False, True)

SIGNATURES: dict[tuple[str, str], Cases] = {
    ("cross_entropy", "_statistics_kernel"): [("h l s i i i", {"BLOCK": 2048})],
    ("cross_entropy", "_gradient_kernel"): [("h l s s s i i", {"BLOCK": 2048})],
    ("gates", "_forward_kernel"): [("h h h i", {"BLOCK": 1024})],
    ("gates", "_backward_kernel"): [("h h h h h i", {"BLOCK": 1024})],
    ("norms", "_forward_kernel"): [("h h h s i f", {"BLOCK": 4096})],
    ("norms", "_backward_kernel"): [("h h h s h s i i", {"BLOCK": 4096})],
    ("norms", "_sum_kernel"): _each("s s i i", {"BLOCK": 256}, FRESH=BOOLEAN),
    ("rotary", "_kernel"): _each(
        "h s s h i i i i i i i i i i i f", {"HEADS": 8, "PAIRS": 64}, INTERLEAVED=BOOLEAN, STILL=(0, 32)
    ),
    ("rows", "_gather_kernel"): [("h l h i", {"BLOCK": 2048})],
    ("rows", "_sum_kernel"): _each("h l s h i i", {"BLOCK": 2048}, WEIGHTED=BOOLEAN),
    ("rows", "_back_kernel"): _each("h l s h h s i i", {"BLOCK": 4096}, WEIGHTED=BOOLEAN, DOTS=BOOLEAN),
    ("counting_sort", "_count_kernel"): [("l w i i", {"BLOCK": 512, "BINS": 16})],
    ("counting_sort", "_offset_kernel"): [("w w i", {"BLOCKS": 64, "BINS": 16})],
    ("counting_sort", "_place_kernel"): [("l w w l l w i i", {"BLOCK": 512, "BINS": 16})],
    ("routing", "_route_kernel"): [
        *_each("s l s l s s i i i f", {"ROWS": 128, "BLOCK": 16, "EACH": True}, SOFTMAX=BOOLEAN, NORMALIZE=BOOLEAN),
        (
            "s l s l s s i i f",
            {"count": 1, "ROWS": 128, "BLOCK": 16, "SOFTMAX": True, "NORMALIZE": True, "EACH": False},
        ),
    ],
    ("routing", "_total_kernel"): [("s d i i", {"PARTS": 64, "BLOCK": 16})],
    ("routing", "_settle_kernel"): _each("d d s d i i f f", {"BLOCK": 16}, AUX=BOOLEAN),
    ("routing", "_back_kernel"): _each(
        "s s l s l s i i i f f f",
        {"ROWS": 128, "BLOCK": 16, "AUX": True},
        SOFTMAX=BOOLEAN,
        EACH=BOOLEAN,
        NORMALIZE=(True,),
    ),
}
