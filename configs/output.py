"""A configuration on its way out: YAML, trackers, messages. What came from the environment stays where it was."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml

from .fields import free_text_keys
from .paths import default_checkpoint_folder
from .reading.interpolation import escape
from .schema import Config


def as_dict(config: Config, *, sizes: bool = False) -> dict[str, Any]:
    """All keys as nested dicts, for trackers and files: values from outside as they were written.

    Args:
        config: the configuration.
        sizes: numbers, truth values and choices from outside as their values, so that a checkpoint can be read
            without the environment; free texts remain as they were written.
    """
    tree = _keys(config)
    for key, value in config.origin.written.items():
        if not sizes or key in free_text_keys():
            _set(tree, key, value)
    derived = default_checkpoint_folder(config)
    if {"runs_dir", "name"} & set(config.origin.written) and config.checkpoint.dir == derived:
        # Derived from what must not be shown; loading derives it again.
        tree["checkpoint"]["dir"] = None
    return tree


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML; `load` of it gives an equal configuration."""
    tree = _escaped(as_dict(config))
    for key, value in config.origin.written.items():
        _set(tree, key, value)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def hide(config: Config, text: str) -> str:
    """The text with every value from outside replaced by its interpolation, `${oc.env:NAME}`."""
    for value, written in sorted(config.origin.secrets, key=lambda pair: -len(pair[0])):
        text = text.replace(value, written)
    return text


def _keys(section: Any) -> dict[str, Any]:
    """The keys of a section with their values; a field that is no key is left out."""
    found = {}
    for field in dataclasses.fields(section):
        if field.metadata.get("key", True):
            value = getattr(section, field.name)
            found[field.name] = _keys(value) if dataclasses.is_dataclass(value) else value
    return found


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        tree = tree[section]
    tree[leaf] = value


def _escaped(value: Any) -> Any:
    """The value with `${` written so that reading it back is not an interpolation; tuples as lists."""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_escaped(inner) for inner in value]
    return value
