"""Numbers and times as short text. No torch here."""

from __future__ import annotations

import math
from collections.abc import Sequence


def fixed(value: float, width: int, digits: int) -> str:
    """Fixed point with up to `digits` decimals, else scientific, that fits into `width`."""
    if not math.isfinite(value):
        return str(float(value))
    tiny = 0 < abs(value) < 10 ** (2 - width)
    # A laptop's 0.0043 TFLOP/s is not 0.004: small numbers get the decimals that the column has room for.
    if 0 < abs(value) < 10 ** (1 - digits):
        digits = max(digits, width - 2)
    for decimals in range(digits, -1, -1):
        text = f"{value:.{decimals}f}"
        if len(text) <= width and not tiny:
            return text
    for decimals in range(3, -1, -1):
        text = f"{value:.{decimals}e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
        if len(text) <= width:
            return text
    return "big"


def si(value: float) -> str:
    """At most 6 characters with a decimal prefix: 950, 12.3K, 4.56M."""
    if not math.isfinite(value):
        return str(float(value))
    if 0 < abs(value) < 0.01:
        return f"{value:.0e}"
    steps = ((1, ""), (1e3, "K"), (1e6, "M"), (1e9, "G"), (1e12, "T"), (1e15, "P"))
    factor, suffix = next((pair for pair in steps if abs(value) < 999.5 * pair[0]), (0, ""))
    return f"{value / factor:.3g}{suffix}" if factor else "big"


def duration(seconds: float) -> str:
    """At most 6 characters: 42s, 3m07s, 2h05m, 4d03h, 120d, >9999d."""
    if not math.isfinite(seconds):
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    days = whole // 86400
    if days < 100:
        return f"{days}d{whole % 86400 // 3600:02d}h"
    return f"{days}d" if days < 10000 else ">9999d"


def numbers(values: Sequence[int]) -> str:
    """12-15, or 12, 14, 15."""
    if len(values) > 1 and list(values) == list(range(values[0], values[0] + len(values))):
        return f"{values[0]}-{values[-1]}"
    return ", ".join(map(str, values))
