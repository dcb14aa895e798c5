"""The reference of every configuration key, read from the dataclasses' source: `pentad show --keys SECTION`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

from .errors import Problem, UserError
from .fields import SELECTORS, field_types, nearest_key, optional
from .schema import Config
from .tables.named import named


@dataclass(frozen=True)
class KeyDoc:
    """One key of the configuration."""

    key: str
    """Full dotted key."""
    type: str
    """As declared: `int | None`, `Literal['a', 'b']`."""
    default: str
    """As one writes it in YAML; `required` for keys without a default."""
    doc: str
    """What it does, with its unit."""
    when: str
    """`optim.name=adamw` for keys that only one class of a section has; empty otherwise."""
    names: tuple[tuple[str, str], ...] = ()
    """The names that the key chooses from, each with a line on it; empty where `type` says all."""


def document(section: str | None = None) -> list[KeyDoc]:
    """All keys of a section (all sections: None), in the order of the schema; every class of a polymorphic section.

    Args:
        section: `model`, `optim.schedule`, or one key, `train.steps`.

    Raises:
        UserError: no such section or key.
    """
    docs = _section(Config, "", "")
    if section is None:
        return docs
    wanted = [d for d in docs if d.key == section or d.key.startswith(section + ".")]
    if not wanted:
        names = {d.key.rpartition(".")[0] for d in docs} | {d.key for d in docs}
        hint = nearest_key(section, names - {""})
        sections = ", ".join(n for n in field_types(Config) if any(d.key.startswith(n + ".") for d in docs))
        tail = f"did you mean {hint}?" if hint else f"sections: {sections}"
        raise UserError(Problem(section, f"no such section or key; {tail}"))
    return wanted


def render(docs: list[KeyDoc]) -> str:
    """The keys as text for a terminal: one line with type and default, the documentation under it."""
    lines: list[str] = []
    when = ""
    for d in docs:
        if d.when != when:
            when = d.when
            lines += ["", f"with {when}:"] if when else [""]
        default = "required" if d.default == "required" else f"= {d.default}"
        lines += [f"{d.key}  {d.type}  {default}", f"    {d.doc}"]
        width = max((len(name) for name, _ in d.names), default=0)
        lines += [f"      {name:<{width}}  {text}" for name, text in d.names]
    return "\n".join(lines).lstrip("\n")


def _section(cls: type, prefix: str, when: str) -> list[KeyDoc]:
    docs: list[KeyDoc] = []
    for field in dataclasses.fields(cls):
        if field.name not in field_types(cls):
            continue
        key = prefix + field.name
        annotation = field_types(cls)[field.name]
        if not dataclasses.is_dataclass(annotation):
            kind, names = _type(cls, field.name, annotation)
            text = _docs(cls)[field.name]
            if prefix.removesuffix(".") in SELECTORS and field.name == "name":
                text = "Selects the class of this section, and with it which other keys it has."
            docs.append(KeyDoc(key, kind, _default(field), text, when, names))
        elif key in SELECTORS:
            docs += _polymorphic(key, when)
        elif isinstance(annotation, type):
            docs += _section(annotation, key + ".", when)
    return docs


def _polymorphic(section: str, when: str) -> list[KeyDoc]:
    """The keys that all classes of the section have, with the default class's defaults, then each class's own."""
    registry, default = SELECTORS[section]
    shared = set.intersection(*(set(field_types(c)) for c in registry.values()))
    common = [d for d in _section(registry[default], section + ".", when) if _first(d.key, section) in shared]
    names = f"Literal[{', '.join(map(repr, registry))}]"
    rows = tuple((name, _summary(cls)) for name, cls in registry.items())
    docs = [dataclasses.replace(d, type=names, names=rows) if d.key == f"{section}.name" else d for d in common]
    for name, cls in registry.items():
        condition = ", ".join(filter(None, [when, f"{section}.name={name}"]))
        docs += [d for d in _section(cls, section + ".", condition) if _first(d.key, section) not in shared]
    return docs


def _summary(cls: type) -> str:
    """The first paragraph of a class's docstring in one line, without its full stop."""
    return " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split()).removesuffix(".")


def _first(key: str, section: str) -> str:
    return key.removeprefix(section + ".").split(".")[0]


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    if value is dataclasses.MISSING:
        return "required"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


@cache
def _docs(cls: type) -> dict[str, str]:
    """Field name to the string under it, from the source of the class and its bases."""
    return {name: doc for name, (_, doc) in _declarations(cls).items()}


def _type(cls: type, name: str, annotation: Any) -> tuple[str, tuple[tuple[str, str], ...]]:
    """A key's type as declared, and the names that it chooses from, where these are rows of a table."""
    inner, nullable = optional(annotation)
    mark = named(inner)
    if mark is None:
        written = _declarations(cls)[name][0]
        return f"{written[8:-1]} | None" if written.startswith("Derived[") else written, ()
    kind = f"Literal[{', '.join(map(repr, mark.table))}]" + (f" | '…{mark.file}'" if mark.file else "")
    return f"{kind} | None" if nullable else kind, tuple((row, found.text) for row, found in mark.table.items())


@cache
def _declarations(cls: type) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (tree,) = ast.parse(inspect.cleandoc(inspect.getsource(base))).body
        body = tree.body if isinstance(tree, ast.ClassDef) else []
        for statement, following in zip(body, [*body[1:], ast.Pass()], strict=True):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                text = following.value.value if _is_text(following) else ""  # type: ignore[union-attr]
                found[statement.target.id] = (ast.unparse(statement.annotation), " ".join(str(text).split()))
    return found


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
