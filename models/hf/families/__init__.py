"""The registry of model families: a file each for those of the table in configs, and what an imported module adds."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from ....configs.errors import Problem, UserError
from ....configs.schema import ModelConfig
from ....configs.tables.families import BUILT_IN, FAMILIES, Defaults, register_family
from .family import Family

__all__ = ["Family", "all_families", "family_of", "find_family", "hf_family", "register"]

_added: dict[str, Family] = {}


def register(family: Family) -> None:
    """Makes a family from outside Pentad known, for the life of the process.

    Raises:
        UserError: there is another one of that name or architecture.
    """
    if _added.get(family.name) is family:
        return
    other = next((f for f in all_families() if f.architecture == family.architecture), None)
    if other is not None and other.name != family.name:
        message = f"{family.architecture} is the architecture of {other.name} already; give another one"
        raise UserError(Problem(f"family {family.name}", message))
    register_family(family.name, Defaults(family.text, family.defaults))
    _added[family.name] = family


def find_family(name: str) -> Family:
    """The family that `model.family` names.

    Raises:
        UserError: there is none; loading a configuration has found that out before.
    """
    if name in _added:
        return _added[name]
    if name not in BUILT_IN:
        raise UserError(Problem("model.family", f"{name!r} is not known, only {', '.join(FAMILIES)}"))
    return import_module(f".{name}", __package__).FAMILY


def all_families() -> list[Family]:
    """Pentad's own in the order of `configs.tables.families`, then those that were added."""
    return [*map(find_family, BUILT_IN), *_added.values()]


def family_of(config: Mapping[str, Any]) -> Family:
    """Family of a config.json, by `architectures`, or by `model_type` where that is absent.

    Raises:
        UserError: for any other architecture.
    """
    names = config.get("architectures") or []
    families = all_families()
    for family in families:
        model_type = family.model_type or family.name
        if family.architecture in names or (not names and config.get("model_type") == model_type):
            return family
    key, found = ("architectures", names) if names else ("model_type", config.get("model_type"))
    supported = ", ".join(family.architecture for family in families)
    message = f"{found!r} is not supported, only {supported}, or one that --import MODULE brings"
    raise UserError(Problem(f"config.json {key}", message))


def hf_family(cfg: ModelConfig) -> Family:
    """The family whose architecture expresses `cfg`: its own where possible, else the first of Pentad's that can.

    Raises:
        UserError: naming the keys in the way of its own family's architecture, if none can.
    """
    own = find_family(cfg.family)
    for family in (own, *map(find_family, BUILT_IN)):
        if not family.obstacles(cfg):
            return family
    raise UserError(*own.obstacles(cfg))
