"""From what was given for each key to values of the declared types, and to the dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import Problem
from ..fields import describe, field_types, flatten_schema, is_mapping, section_class
from ..schema import Config, Origin
from ..sources import Given, plain
from .convert import WrongType, convert, display, expected, written
from .hints import foreign_value
from .interpolation import SHORTEST_SECRET, Unresolvable, escape, is_interpolated, parts, texts


@dataclass
class KnownProblems:
    """What is known so far: the problems, and the keys whose values cannot be trusted because of one."""

    problems: list[Problem] = field(default_factory=list)
    untrusted: set[str] = field(default_factory=set)

    def reject(self, key: str, message: str, where: str = "") -> None:
        """Reports a problem of a key."""
        self.problems.append(Problem(key, f"{message} ({where})" if where else message))
        self.untrusted.add(key)


def convert_all(
    given: Mapping[str, Given], chosen: Mapping[str, type], reading: KnownProblems
) -> tuple[dict[str, Any], Origin]:
    """The value of every given key, and which of them come from outside; what cannot be converted is reported."""
    keys, _ = flatten_schema(chosen)
    values: dict[str, Any] = {}
    interpolated = [key for key in given if is_interpolated(plain(given[key].node))]
    for key in (k for k in given if k not in interpolated and k not in reading.untrusted):
        _convert(values, key, keys[key], given[key], given[key].node, reading)
    known = {k: _literal(v) for k, v in (defaults(chosen) | values).items()}
    if not interpolated:
        return values, Origin()
    from .evaluation import evaluate

    known |= {key: plain(given[key].node) for key in interpolated}
    for key in (k for k in interpolated if k not in reading.untrusted):
        try:
            node = written(evaluate(known, key))
        except Unresolvable as error:
            reading.reject(key, f"{display(given[key].node)} cannot be resolved: {error}", given[key].where)
            continue
        _convert(values, key, keys[key], given[key], node, reading)
    return values, _origin({key: known[key] for key in interpolated if key in values}, known, values)


def _convert(
    values: dict[str, Any], key: str, annotation: Any, given: Given, node: Any, reading: KnownProblems
) -> None:
    try:
        values[key] = convert(annotation, node)
    except WrongType as error:
        hint = foreign_value(key, annotation, plain(given.node))
        reading.reject(key, expected(annotation, given.node, f"{hint}{error}"), given.where)


def _literal(value: Any) -> Any:
    """A value that is no interpolation, for a tree in which others are."""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, tuple):
        return [_literal(element) for element in value]
    return value


def _origin(raw: Mapping[str, Any], known: Mapping[str, Any], values: Mapping[str, Any]) -> Origin:
    """Which of the interpolated values come from outside, and their parts that do."""
    from .evaluation import evaluate

    secrets: dict[str, str] = {}
    for value in raw.values():
        for part in (p for text in texts(value) for p in parts(text)):
            found = evaluate({**known, "_": part}, "_")
            secrets |= {text: part for text in texts(found) if len(text) >= SHORTEST_SECRET}
    outside = {
        key: value
        for key, value in raw.items()
        if any(parts(text) for text in texts(value)) or any(s in t for t in texts(values[key]) for s in secrets)
    }
    return Origin(written=outside, secrets=tuple(secrets.items()))


def defaults(chosen: Mapping[str, type], cls: type = Config, prefix: str = "") -> dict[str, Any]:
    """The default of every key that has one."""
    found: dict[str, Any] = {}
    for name, annotation in field_types(cls).items():
        inner = section_class(prefix + name, annotation, chosen)
        if inner is not None:
            found |= defaults(chosen, inner, f"{prefix}{name}.")
        elif (value := _default(cls, name)) is not dataclasses.MISSING:
            found[prefix + name] = value
    return found


def _default(cls: type, name: str) -> Any:
    declared = cls.__dataclass_fields__[name]
    if declared.default_factory is not dataclasses.MISSING:
        return declared.default_factory()
    return declared.default


def build(values: Mapping[str, Any], chosen: Mapping[str, type], reading: KnownProblems) -> Config:
    """The dataclasses of the values; keys without value and default are reported, and a stand-in is taken."""
    keys, _ = flatten_schema(chosen)
    whole = {**defaults(chosen), **values}
    for key in sorted(set(keys) - set(whole)):
        if key not in reading.untrusted and key.split(".")[0] not in reading.untrusted:
            instead = ", or a model.preset" if key.startswith("model.") else ""
            reading.reject(key, f"missing; expected {describe(keys[key])}{instead}")
        reading.untrusted.add(key)
        whole[key] = _placeholder(keys[key])
    return _section(Config, "", chosen, whole)


def _section(cls: type, prefix: str, chosen: Mapping[str, type], values: Mapping[str, Any]) -> Any:
    arguments: dict[str, Any] = {}
    for name, annotation in field_types(cls).items():
        key = prefix + name
        inner = section_class(key, annotation, chosen)
        arguments[name] = values[key] if inner is None else _section(inner, f"{key}.", chosen, values)
    return cls(**arguments)


def _placeholder(annotation: Any) -> Any:
    """A value of the right type, for going on looking for problems after a missing or wrong one."""
    return {int: 1, float: 1.0, bool: False, str: ""}.get(annotation, {} if is_mapping(annotation) else ())
