"""Numbers that have to be multiples of others."""

from __future__ import annotations

from ..errors import Problem


def indivisible(key: str, value: int, divisor_key: str, divisor: int, why: str) -> list[Problem]:
    """The problem of a value that is no multiple of another key's; out of range, either is another check's problem."""
    if value < 1 or divisor < 1 or value % divisor == 0:
        return []
    up = -(-value // divisor) * divisor
    message = f"{value} is not a multiple of {divisor_key}={divisor} ({why}); set {key}={up} or change {divisor_key}"
    return [Problem(key, message, (divisor_key,))]
