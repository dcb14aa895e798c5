"""Where configuration comes from: YAML files, presets and the command line, read into flat lists of given values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import Problem
from .fields import nearest, short

PRESETS = Path(__file__).parent / "presets"
_HYDRA_SIGNS = ("+", "~")


@dataclass(frozen=True)
class Given:
    """One value that somebody wrote."""

    key: tuple[str, ...]
    value: Any
    text: str | None
    """The scalar as written, where it had no quotes."""
    where: str
    """For messages: `job.yaml:12`, `command line`, `preset llama3_8b`."""

    @property
    def name(self) -> str:
        """The dotted key."""
        return ".".join(self.key)


Layer = list[Given]


def preset_names(kind: str) -> list[str]:
    """Names in presets/KIND (models, families, hardware, jobs)."""
    return sorted(p.name.removesuffix(".yaml") for p in (PRESETS / kind).glob("*.yaml"))


def find_config(path: str | Path) -> Path | Problem:
    """The file that CONFIG means: a path, or the name of a job in presets/jobs."""
    given = str(path)
    file = Path(path).expanduser()
    if file.is_file():
        return file
    if given in preset_names("jobs"):
        return PRESETS / "jobs" / f"{given}.yaml"
    if file.is_dir():
        return Problem(given, "is a folder; give a YAML file in it")
    folder = file.parent
    around = {str(folder / p.name) if folder != Path() else p.name for p in folder.glob("*.y*ml")}
    hint = nearest(given, [*around, *preset_names("jobs")])
    tail = f"; did you mean {hint}?" if hint else f"; jobs that come with Pentad: {', '.join(preset_names('jobs'))}"
    return Problem(given, f"no such file{tail}")


def read_yaml(file: Path, label: str, prefix: tuple[str, ...] = ()) -> Layer | Problem:
    """All values of a YAML file.

    Args:
        file: the file.
        label: what messages call it; `:LINE` is appended for files that are not presets.
        prefix: put before every key.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return Problem(label, f"cannot be read: {short(str(error))}")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = OmegaConf.to_container(OmegaConf.create(text)) if isinstance(root, yaml.MappingNode) else {}
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        return Problem(f"{label}{line}", f"not valid YAML: {error.problem or error.context}")
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        return Problem(label, f"not valid: {short(str(error).splitlines()[0])}")
    except RecursionError:
        return Problem(label, "not valid: an anchor contains itself")
    if root is not None and not isinstance(root, yaml.MappingNode):
        return Problem(label, "must hold `section: {key: value}` at its top level, not a list or a single value")
    marks: dict[tuple[str, ...], tuple[int, str | None]] = {}
    _collect_marks(root, (), marks)
    layer: Layer = []
    for key, value in _leaves(tree if isinstance(tree, dict) else {}):
        line, scalar = marks.get(key, (0, None))
        where = f"{label}:{line}" if line and not label.startswith("preset ") else label
        layer.append(Given(prefix + key, value, scalar, where))
    return layer


def _collect_marks(node: Any, path: tuple[str, ...], marks: dict[tuple[str, ...], tuple[int, str | None]]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*path, str(key.value))
            plain = isinstance(value, yaml.ScalarNode) and value.style is None
            marks[inner] = (key.start_mark.line + 1, value.value if plain else None)
            _collect_marks(value, inner, marks)


def _leaves(tree: Mapping[Any, Any], path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    out: list[tuple[tuple[str, ...], Any]] = []
    for key, value in tree.items():
        inner = (*path, str(key))
        if isinstance(value, dict) and value:
            out += _leaves(value, inner)
        elif value != {}:
            out.append((inner, value))
    return out


def read_overrides(overrides: Sequence[str]) -> tuple[Layer, list[Problem]]:
    """The `key=value` arguments of a command line; values are YAML, a list or a mapping in flow style."""
    layer: Layer = []
    problems: list[Problem] = []
    for argument in overrides:
        key, equals, text = argument.partition("=")
        bare = key.lstrip("-")
        if key.startswith("-"):
            problems.append(Problem(argument, f"configuration keys have no leading dashes; write {bare}=VALUE"))
        elif key.startswith(_HYDRA_SIGNS):
            problems.append(Problem(argument, f"keys have no leading {key[0]}; write {key[1:]}=VALUE"))
        elif not equals:
            problems.append(Problem(argument, f"an override is key=value; write {argument}=VALUE (command line)"))
        elif not all(key.split(".")):
            problems.append(Problem(argument, "an override is section.key=value (command line)"))
        else:
            try:
                parsed = OmegaConf.from_dotlist([f"value={text}"])
                value = OmegaConf.to_container(parsed)["value"]  # type: ignore[index]
            except (yaml.YAMLError, OmegaConfBaseException) as error:
                reason = (isinstance(error, yaml.MarkedYAMLError) and error.problem) or str(error).splitlines()[0]
                problems.append(Problem(key, f"{short(text)} is not valid YAML: {reason} (command line)"))
                continue
            path = tuple(key.split("."))
            if isinstance(value, dict):
                layer += [Given((*path, *inner), leaf, None, "command line") for inner, leaf in _leaves(value)]
            else:
                layer.append(Given(path, value, text, "command line"))
    return layer, problems


def nest(layers: Sequence[Layer]) -> dict[str, Any]:
    """The layers' values as one tree; later ones win."""
    tree: dict[str, Any] = {}
    for given in (g for layer in layers for g in layer):
        node = tree
        for part in given.key[:-1]:
            child = node.get(part)
            if not isinstance(child, dict):
                child = node[part] = {}
            node = child
        node[given.key[-1]] = given.value
    return tree


def select(layers: Sequence[Layer], key: str) -> Any:
    """The value that `key` has in the layers, interpolations resolved; None when absent or not resolvable."""
    try:
        value = OmegaConf.select(OmegaConf.create(nest(layers)), key)
    except OmegaConfBaseException:
        return None
    return None if isinstance(value, DictConfig) else value


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
