"""Typed access to a Hugging Face config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...configs.errors import Problem


@dataclass
class Reader:
    """Typed access to config.json that collects every problem instead of stopping at the first.

    Args:
        config: the object.
        defaults: what a key that it leaves out means.
        prefix: what precedes its keys in messages.
        problems: what was found to be wrong.
    """

    config: Mapping[str, Any]
    defaults: Mapping[str, Any]
    prefix: str = ""
    problems: list[Problem] = field(default_factory=list)

    def value(self, key: str) -> Any:
        """The value, or its default, or None."""
        return self.config[key] if key in self.config else self.defaults.get(key)

    def first(self, *keys: str) -> str:
        """The first of these keys, all of which mean the same, that is given."""
        return next((key for key in keys if self.config.get(key) is not None), keys[0])

    def problem(self, key: str, message: str) -> None:
        """Records what is wrong with a key, once however often it is read."""
        found = Problem(f"config.json {self.prefix}{key}", message)
        if found not in self.problems:
            self.problems.append(found)

    def number(self, key: str, *, zero: bool = False) -> float:
        """A positive number, or 0 if `zero`; 1 and a problem if there is none."""
        found = self.value(key)
        if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found) or found < 0:
            self.problem(key, "missing, expected a positive number" if found is None else f"{found!r} is not positive")
            return 1.0
        if found == 0 and not zero:
            self.problem(key, f"{found!r} is not positive")
            return 1.0
        return found

    def integer(self, key: str, *, zero: bool = False) -> int:
        """As `number`."""
        found = self.number(key, zero=zero)
        if int(found) != found:
            self.problem(key, f"{found!r} is not an integer")
            return 1
        return int(found)

    def listed(self, key: str) -> list[Any]:
        """A list; empty where there is none, with a problem if there is something else."""
        found = self.value(key)
        if found is not None and not isinstance(found, (list, tuple)):
            self.problem(key, f"{found!r} is not a list")
            return []
        return list(found or ())

    def only(self, key: str, *allowed: Any) -> None:
        """Record a problem unless the value is absent or one of `allowed`."""
        found = self.value(key)
        if found is not None and found not in allowed:
            if not allowed:
                self.problem(key, f"{found!r} is not supported")
                return
            listed = ", ".join(repr(a) for a in allowed)
            self.problem(key, f"{found!r} is not supported, only {listed}")
