"""A YAML file as a flat list of what was written under each dotted key, with its line.

Only YAML's structure is read: mappings, lists, quotes, comments, anchors. What a scalar means is left to its key's
type. Whatever would be lost or guessed silently is an error: keys given twice, tags, keys that are no text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..errors import Problem, UserError
from .written import Node, Scalar

_LARGEST_FILE = 4 * 2**20
_MOST_VALUES = 20_000
"""Aliases can multiply: ten lines of them stand for a billion values."""
_DEEPEST = 50
_MERGE = "tag:yaml.org,2002:merge"
_NEEDS_QUOTES = "undefined alias", "cannot start any token", "mapping values are not allowed", "expected alphabetic"


@dataclass(frozen=True)
class Entry:
    """What a file says about one key."""

    key: str
    node: Node
    line: int


def read_entries(file: Path, label: str) -> list[Entry]:
    """Everything that the file says, in its order.

    Args:
        file: the file, in UTF-8, with or without a byte order mark.
        label: what messages call it.

    Raises:
        UserError: it cannot be read, or is not YAML that a job can have.
    """
    text = read_text(file, label)
    try:
        _refuse_tags_and_depth(text, label)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None or (isinstance(root, yaml.ScalarNode) and not root.value):
            return []
        if not isinstance(root, yaml.MappingNode):
            raise UserError(
                Problem(label, "must hold `section: {key: value}` at its top level, not a list or a single value")
            )
        return _Reader(label).entries(root)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(Problem(f"{label}{line}", f"not valid YAML: {_reason(error)}")) from None
    except yaml.YAMLError as error:
        raise UserError(Problem(label, f"not valid YAML: {' '.join(str(error).split())[:120]}")) from None
    except RecursionError:  # aliases of aliases of aliases
        raise UserError(Problem(label, "is nested too deeply; a job has five levels at most")) from None


def read_text(file: Path, label: str) -> str:
    """The text of a configuration file, without a byte order mark.

    Raises:
        UserError: it cannot be read, is too large, or is not UTF-8.
    """
    try:
        if file.stat().st_size > _LARGEST_FILE:
            size = file.stat().st_size / 2**20
            raise UserError(Problem(label, f"has {size:.0f} MiB; is that a job's YAML file? they have a few kilobytes"))
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(Problem(label, f"cannot be read: {error.strerror or error}")) from None
    except UnicodeDecodeError as error:
        message = f"cannot be read: byte {error.start} is not UTF-8; save it as UTF-8 (is it a YAML file?)"
        raise UserError(Problem(label, message)) from None


def _reason(error: yaml.MarkedYAMLError) -> str:
    reason = " ".join((error.problem or error.context or "").split())
    if "another document" in reason:
        return "a second document begins here; a job is a single document, without ---"
    if "'\\t'" in reason:
        return f"{reason}; indent with spaces, not tabs"
    if any(words in reason for words in _NEEDS_QUOTES):
        return f"{reason}; put quotes around a text that begins with * & ! % @ or ` or has a colon: '*.jsonl'"
    return reason


def _refuse_tags_and_depth(text: str, label: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            where = f"{label}:{event.start_mark.line + 1}"
            raise UserError(Problem(where, "is nested too deeply; a job has five levels at most"))
        tag = getattr(event, "tag", None)
        if tag is not None:
            where = f"{label}:{event.start_mark.line + 1}"
            raise UserError(Problem(where, f"the tag {tag} is not read; the key's type says what a value is"))


class _Reader:
    """Walks the nodes of one file."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._values = 0
        self._lines: dict[str, int] = {}

    def entries(self, root: yaml.MappingNode) -> list[Entry]:
        found = list(self._leaves(root, "", ()))
        for entry in found:
            self._once(entry.key, entry.line)
        return found

    def _once(self, key: str, line: int) -> None:
        if key in self._lines:
            message = f"duplicate key {key}, first on line {self._lines[key]}; keep one of them"
            raise UserError(Problem(f"{self._label}:{line}", message))
        self._lines[key] = line

    def _leaves(self, mapping: yaml.MappingNode, prefix: str, around: tuple[int, ...]) -> Iterator[Entry]:
        for name, value, line in self._pairs(mapping, around):
            key = prefix + name
            if isinstance(value, yaml.MappingNode) and value.value:
                yield from self._leaves(value, f"{key}.", self._inside(value, around))
            elif not isinstance(value, yaml.MappingNode):
                yield Entry(key, self._node(value, around), line)

    def _pairs(self, mapping: yaml.MappingNode, around: tuple[int, ...]) -> list[tuple[str, yaml.Node, int]]:
        """(key, value, line) of a mapping; those of `<<: *anchor` come first and give way to its own keys."""
        merged: dict[str, tuple[str, yaml.Node, int]] = {}
        own: dict[str, tuple[str, yaml.Node, int]] = {}
        for key, value in mapping.value:
            line = key.start_mark.line + 1
            if key.tag == _MERGE:
                sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for source in reversed(sources):
                    if not isinstance(source, yaml.MappingNode):
                        raise self._wrong(line, "<< takes a mapping, or a list of them")
                    inherited = self._pairs(source, self._inside(source, around))
                    merged |= {name: (name, inner, line) for name, inner, _ in inherited}
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise self._wrong(line, "a key must be a single text, not a list or a mapping")
            if key.value in own:
                message = f"duplicate key {key.value}, first on line {own[key.value][2]}; keep one of them"
                raise self._wrong(line, message)
            own[key.value] = (key.value, value, line)
        return [*(pair for name, pair in merged.items() if name not in own), *own.values()]

    def _inside(self, node: yaml.Node, around: tuple[int, ...]) -> tuple[int, ...]:
        """The nodes around whatever is in this one.

        Raises:
            UserError: it is inside itself.
        """
        if id(node) in around:
            raise self._wrong(node.start_mark.line + 1, "a recursive anchor: it contains itself")
        return (*around, id(node))

    def _node(self, node: yaml.Node, around: tuple[int, ...]) -> Node:
        self._values += 1
        if self._values > _MOST_VALUES:
            raise self._wrong(
                node.start_mark.line + 1, f"more than {_MOST_VALUES} values, with all aliases written out"
            )
        if isinstance(node, yaml.SequenceNode):
            return [self._node(element, self._inside(node, around)) for element in node.value]
        if isinstance(node, yaml.MappingNode):
            inner = self._inside(node, around)
            return {name: self._node(value, inner) for name, value, _ in self._pairs(node, around)}
        return Scalar(node.value, quoted=isinstance(node, yaml.ScalarNode) and node.style is not None)

    def _wrong(self, line: int, message: str) -> UserError:
        return UserError(Problem(f"{self._label}:{line}", message))
