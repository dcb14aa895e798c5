"""The schema as a flat table of dotted keys, what each key accepts, and the nearest key to a wrong one."""

from __future__ import annotations

import dataclasses
import operator
import types
from collections.abc import Iterable, Mapping
from functools import cache, reduce
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import nearest
from .schema import DATASETS, OPTIMIZERS, SCHEDULES, Config
from .tables.derived import underived
from .tables.named import named

_Node = TypeVar("_Node")

SELECTORS: dict[str, tuple[dict[str, type], str]] = {
    "optim": (OPTIMIZERS, "adamw"),
    "optim.schedule": (SCHEDULES, "cosine"),
    "data": (DATASETS, "stdlib"),
}
"""Polymorphic sections: the classes that SECTION.name chooses from, and the name that is taken when none is given."""


def add_class(section: str, name: str, cls: type) -> None:
    """Adds what SECTION.name can choose, for the life of the process; for modules outside the package.

    Args:
        section: one of `SELECTORS`.
        name: what users write.
        cls: a frozen dataclass with the section's keys.

    Raises:
        ValueError: the name is taken.
    """
    registry, _ = SELECTORS[section]
    if name in registry:
        raise ValueError(f"{section}.name={name} is taken")
    registry[name] = cls
    for names in (all_keys, free_text_keys, section_keys):
        names.cache_clear()


@cache
def field_types(cls: type) -> Mapping[str, Any]:
    """Name to evaluated annotation of every key, in the order of declaration."""
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.metadata.get("key", True)}


def section_class(path: str, annotation: Any, chosen: Mapping[str, type]) -> type | None:
    """The dataclass of the section at `path`, or None when the annotation is that of a value."""
    if not dataclasses.is_dataclass(annotation):
        return None
    if path in SELECTORS:
        registry, default = SELECTORS[path]
        return chosen.get(path, registry[default])
    return annotation if isinstance(annotation, type) else None


def flatten_schema(
    chosen: Mapping[str, type], cls: type = Config, prefix: str = ""
) -> tuple[dict[str, Any], dict[str, type]]:
    """All values (dotted key to annotation) and all sections (dotted key to class) of the schema."""
    values: dict[str, Any] = {}
    sections: dict[str, type] = {}
    for name, annotation in field_types(cls).items():
        key = prefix + name
        inner = section_class(key, annotation, chosen)
        if inner is None:
            values[key] = annotation
        else:
            sections[key] = inner
            inner_values, inner_sections = flatten_schema(chosen, inner, key + ".")
            values |= inner_values
            sections |= inner_sections
    return values, sections


def value_of(config: Any, key: str) -> Any:
    """The value of a dotted key in the dataclasses; None for a key that the chosen class does not have."""
    return reduce(lambda node, name: getattr(node, name, None), key.split("."), config)


def with_value(config: _Node, key: str, value: Any) -> _Node:
    """The dataclass with another value of a dotted key."""
    name, dot, rest = key.partition(".")
    inner = with_value(getattr(config, name), rest, value) if dot else value
    return dataclasses.replace(config, **{name: inner})  # type: ignore[type-var]


@cache
def all_keys() -> frozenset[str]:
    """The dotted keys of all values, whichever classes are chosen."""
    names: set[str] = set()
    for section, (registry, _) in SELECTORS.items():
        for cls in registry.values():
            names |= set(flatten_schema({section: cls})[0])
    return frozenset(names)


@cache
def free_text_keys() -> frozenset[str]:
    """The dotted keys whose values are any text, lists of such or mappings of it."""
    names: set[str] = set()
    for section, (registry, _) in SELECTORS.items():
        for cls in registry.values():
            for key, annotation in flatten_schema({section: cls})[0].items():
                inner, _ = optional(annotation)
                mark = named(inner)
                if inner is str or (mark.file if mark else str in get_args(inner)):
                    names.add(key)
    return frozenset(names)


@cache
def section_keys() -> frozenset[str]:
    """The dotted keys of all sections, whichever classes are chosen."""
    names: set[str] = set()
    for section, (registry, _) in SELECTORS.items():
        for cls in registry.values():
            names |= set(flatten_schema({section: cls})[1])
    return frozenset(names)


def is_mapping(annotation: Any) -> bool:
    """Whether the value itself is a mapping with free keys."""
    return get_origin(annotation) is dict


def optional(annotation: Any) -> tuple[Any, bool]:
    """The annotation without None, and whether None was part of it, as it is of derived keys."""
    value = underived(annotation)
    if value is not None:
        return value, True
    if get_origin(annotation) in (Union, types.UnionType):
        inner = [a for a in get_args(annotation) if a is not type(None)]
        if len(inner) < len(get_args(annotation)):
            return reduce(operator.or_, inner), True
    return annotation, False


_SINGULAR = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
_PLURAL = {int: "integers", float: "numbers", bool: "true or false", str: "texts"}


def describe(annotation: Any) -> str:
    """What a key accepts, for messages: 'an integer or null'."""
    inner, nullable = optional(annotation)
    origin, args = get_origin(inner), get_args(inner)
    if (mark := named(inner)) is not None:
        text = f"one of {mark}"
    elif origin is Literal:
        text = str(args[0]) if len(args) == 1 else "one of " + ", ".join(map(str, args))
    elif origin in (tuple, list):
        one = get_args(args[0]) if get_origin(args[0]) is Literal else ()
        text = f"a list of {', '.join(map(str, one)) or _PLURAL.get(args[0], 'values')}"
    elif origin is dict:
        text = f"a mapping of names to {_PLURAL.get(args[1], 'values')}"
    elif origin in (Union, types.UnionType):
        text = " or ".join(describe(a) for a in args)
    else:
        text = _SINGULAR.get(inner, str(inner))
    return f"{text} or null" if nullable else text


def short(value: Any) -> str:
    """A value for a one-line message: at most 60 characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = " ".join((repr(value) if isinstance(value, str) else str(value)).split())
    return text if len(text) <= 60 else text[:57] + "..."


def nearest_key(key: str, valid: Iterable[str]) -> str | None:
    """The valid dotted key that was probably meant: alike in the same section, then of the same name in another one."""
    keys = list(valid)
    section, _, leaf = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in keys if k.rpartition(".")[0] == section}
    match = nearest(leaf, siblings)
    if match is not None:
        return siblings[match]
    namesakes = [k for k in keys if k.rpartition(".")[2] == leaf]
    return (nearest(key, namesakes) or namesakes[0]) if namesakes else nearest(key, keys)
