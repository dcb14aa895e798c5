"""Where configuration comes from: YAML files, presets and the command line, read into flat lists of given values."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import Problem, UserError, nearest
from .fields import all_keys, section_keys, short
from .paths import RUN_CONFIG
from .reading.convert import display, raw, written
from .reading.interpolation import is_interpolated
from .reading.written import Argument, Node, Unreadable, flow, is_mapping_text, unquote
from .reading.yaml_file import read_entries

PRESETS = Path(__file__).parent / "presets"
_HYDRA_SIGNS = ("+", "~")


@dataclass(frozen=True)
class Given:
    """What somebody wrote for one key."""

    key: str
    """The dotted key."""
    node: Node
    where: str
    """For messages: `job.yaml:12`, `command line`, `preset llama3_8b`."""
    layer: int = 0
    """How late it was given: presets, the file, the command line."""


Layer = list[Given]


def preset_names(kind: str) -> list[str]:
    """Names in presets/KIND (models, hardware, jobs)."""
    return sorted(p.name.removesuffix(".yaml") for p in (PRESETS / kind).glob("*.yaml"))


def find_config(path: str | Path) -> Path | Problem:
    """The file that CONFIG means: a path, or the name of a job in presets/jobs."""
    given = str(path)
    file = Path(os.path.expanduser(given))
    if os.path.isfile(file):
        return file
    if given in preset_names("jobs"):
        return PRESETS / "jobs" / f"{given}.yaml"
    return Problem(given, _no_config(given, file))


def comes_with_pentad(path: str | Path | None) -> bool:
    """Whether CONFIG is a job of presets/jobs, which no user wrote."""
    file = None if path is None else find_config(path)
    return isinstance(file, Path) and file.resolve().parent == (PRESETS / "jobs").resolve()


def _no_config(given: str, file: Path) -> str:
    """Why there is no job by this name, and what to give instead."""
    jobs = preset_names("jobs")
    if os.path.isdir(file):
        for name, what in (
            (RUN_CONFIG, "a run's folder"),
            ("state.json", "a checkpoint"),
            ("config.json", "a model"),
        ):
            if os.path.isfile(file / name):
                instead = f"give {file / name}" if name == RUN_CONFIG else f"give a job, and checkpoint.init={given}"
                return f"is {what}, not a job's YAML file; {instead}"
        inside = sorted(p.name for p in file.glob("*.y*ml"))[:5]
        return f"is a folder; give a YAML file in it{', ' if inside else ''}{' or '.join(inside)}"
    if given in preset_names("models"):
        return f"is a model, not a job; make one: echo 'model: {{preset: {given}}}' > job.yaml && pentad train job.yaml"
    if given in preset_names("hardware"):
        return f"is a device, not a job; give a job, and hardware.preset={given}"
    if "=" in given:
        return f"is an override, and CONFIG comes before it: a YAML file, or {', '.join(jobs)}"
    folder = file.parent
    around = {str(folder / p.name) if folder != Path() else p.name for p in folder.glob("*.y*ml")}
    hint = nearest(given, [*around, *jobs])
    if hint is None and (model := nearest(given, preset_names("models"))):
        return f"no such file; {model} is a model: echo 'model: {{preset: {model}}}' > job.yaml makes a job of it"
    return "no such file" + (f"; did you mean {hint}?" if hint else f"; jobs that come with Pentad: {', '.join(jobs)}")


def read_yaml(file: Path, label: str, prefix: str = "") -> Layer:
    """All values of a YAML file.

    Args:
        file: the file.
        label: what messages call it; `:LINE` is appended for files that are not presets.
        prefix: put before every key.

    Raises:
        UserError: the file cannot be read.
    """
    lines = not label.startswith(("preset ", "family "))
    return [
        Given(prefix + entry.key, entry.node, f"{label}:{entry.line}" if lines else label)
        for entry in read_entries(file, label)
    ]


def read_overrides(overrides: Sequence[str]) -> tuple[Layer, list[Problem]]:
    """The `key=value` arguments of a command line; the key's type will say what the value is."""
    layer: Layer = []
    problems: list[Problem] = []
    for argument in _pieces(overrides, problems):
        try:
            layer += _override(argument)
        except UserError as error:
            problems += error.problems
    return layer, problems


def _pieces(overrides: Sequence[str], problems: list[Problem]) -> Iterator[str]:
    """The overrides without those that came in several pieces (`key value`, `key= value`), which are reported."""
    rest = list(overrides)
    leaves = {key.rpartition(".")[2]: key for key in sorted(all_keys(), key=lambda k: k.startswith("train."))}
    while rest:
        first = rest.pop(0)
        key = first.rstrip("=")
        broken = "=" not in key and key.rpartition(".")[2].isidentifier()
        if broken and rest and rest[0].startswith("=") and len(rest[0]) > 1:  # key =value
            value = rest.pop(0)[1:]
        elif broken and rest and (rest[0] == "=" or first.endswith("=")) and len(rest) > (rest[0] == "="):
            rest = rest[rest[0] == "=" :]  # key = value, key= value
            value = rest.pop(0)
        elif broken and ("." in key or key in leaves) and "=" not in first and rest and "=" not in rest[0]:  # key value
            value = rest.pop(0)
        else:
            yield first
            continue
        whole = leaves.get(key, key)
        message = f"an override is key=value in one piece; write {whole}={shlex.quote(value)} (command line)"
        problems.append(Problem(key, message))


def _override(argument: str) -> Iterator[Given]:
    key, equals, text = argument.partition("=")
    bare = key.lstrip("-")
    if key.startswith("-"):
        shown = f"{bare}={text}" if equals else f"{bare}=VALUE"
        raise UserError(Problem(argument, f"configuration keys have no leading dashes; write {shown}"))
    if key.startswith(_HYDRA_SIGNS):
        raise UserError(Problem(argument, f"keys have no leading {key[0]}; write {key[1:]}=VALUE"))
    if not equals:
        raise UserError(Problem(argument, f"an override is key=value; write {argument}=VALUE (command line)"))
    if not all(key.split(".")) and not key.startswith("data.weights."):
        raise UserError(Problem(argument, "an override is section.key=value (command line)"))
    if not text:
        message = f"has no value (an empty variable of your shell?); write {key}=VALUE, or null for none (command line)"
        raise UserError(Problem(key, message))
    if key in section_keys() and is_mapping_text(text):
        try:
            return iter(_leaves(flow(text), key))
        except Unreadable as error:
            raise UserError(Problem(key, f"{short(text)} is no mapping: {error} (command line)")) from None
    return iter([Given(key, Argument(text), "command line")])


def _leaves(node: Node, key: str, where: str = "command line") -> Layer:
    if isinstance(node, dict):
        return [leaf for name, inner in node.items() for leaf in _leaves(inner, f"{key}.{name}", where)]
    return [Given(key, node, where)]


def given_values(values: Mapping[str, Any], label: str, section: str) -> Layer:
    """Values from Python as if they had been written in a section; `label` is what messages call them."""
    return _leaves(written(dict(values)), section, label)


def select(layers: Sequence[Layer], key: str) -> str | None:
    """The text that `key` has in the layers, interpolations resolved; None when absent, null or not resolvable."""
    last = {given.key: given for layer in layers for given in layer}
    if key not in last:
        return None
    value = plain(last[key].node)
    if is_interpolated(value):
        from .reading.evaluation import lookup

        value = lookup({name: plain(given.node) for name, given in last.items()}, key)
    return None if value is None else str(value)


def plain(node: Node) -> object:
    """What was written as plain texts, lists and mappings, of an override without the quotes around all of it."""
    return raw(unquote(node.text) if isinstance(node, Argument) else node)


def shown(layers: Sequence[Layer], key: str) -> str:
    """The value of `key` as it was written, for messages."""
    return next((display(g.node) for layer in reversed(layers) for g in reversed(layer) if g.key == key), "nothing")


def locate(layers: Sequence[Layer], key: str) -> str:
    """Where the value of `key` was written; empty when nowhere."""
    return next((given.where for layer in reversed(layers) for given in reversed(layer) if given.key == key), "")


def find_preset(kind: str, name: str) -> Path | str:
    """The file of a preset, or a hint (`did you mean …`) for a name that does not exist."""
    names = preset_names(kind)
    if name in names:
        return PRESETS / kind / f"{name}.yaml"
    word = name.lower().replace("-", "_")
    longer = [n for n in names if word and n.startswith(word)]
    if longer:
        return f"there are {', '.join(longer)}"
    hint = nearest(word, names)
    return f"did you mean {hint}?" if hint else f"there are {', '.join(names)}"
