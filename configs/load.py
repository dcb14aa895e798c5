"""From a YAML file, presets and `key=value` overrides to one resolved and validated `Config`.

Order, later wins: schema defaults < presets/families/FAMILY.yaml < presets/models and presets/hardware < the file <
the overrides. Sections with a `name` (optim, optim.schedule, data) take the class that the merged name selects; keys
of the file that only the class of an earlier layer's name has are dropped when an override selects another class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import Problem, UserError
from .fields import SELECTORS, coerce, describe, field_types, flatten_schema, is_mapping, nearest, nearest_key, short
from .resolve import resolve
from .schema import Config
from .sources import Given, Layer, find_config, find_preset, read_overrides, read_yaml, select
from .validate import check_files, validate

T = TypeVar("T")


@dataclass
class _Reading:
    """What is known so far: the problems, and the keys whose values cannot be trusted because of one."""

    problems: list[Problem] = field(default_factory=list)
    untrusted: set[str] = field(default_factory=set)

    def reject(self, key: str, message: str, where: str = "") -> None:
        self.problems.append(Problem(key, f"{message} ({where})" if where else message))
        self.untrusted.add(key)


def load(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    world_size: int | None = None,
) -> Config:
    """Read, merge, resolve and validate a job's configuration.

    Args:
        path: a YAML file, the name of a job in presets/jobs, or None for the overrides alone.
        overrides: `section.key=value` arguments, values in YAML.
        world_size: number of ranks, where it is known; `parallel.dp` is derived from it.

    Returns:
        The configuration with every derivable value filled in.

    Raises:
        UserError: all problems found, each one line with the key, the value, what is allowed and where it was given.
    """
    reading = _Reading()
    user = _user_layers(path, overrides, reading)
    layers = _preset_layers(user, reading) + user
    chosen = _choose_classes(layers, reading)
    values = _merge(layers, chosen, reading)
    config = _build(values, chosen, reading)
    config = resolve(config, world_size)
    found = validate(config, world_size) + check_files(config)
    reading.problems += [_located(p, values) for p in found if not _consequence(p, reading.untrusted)]
    if reading.problems:
        raise UserError(*reading.problems)
    return config


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML; `load` of it gives an equal configuration."""
    return OmegaConf.to_yaml(OmegaConf.create(_escape(dataclasses.asdict(config))))


def given_yaml(path: str | Path | None, overrides: Sequence[str] = ()) -> str:
    """What the user gave, as YAML that loads to the same configuration: the file as it is, or merged with overrides.

    Raises:
        UserError: the file or an override cannot be read.
    """
    if path is not None and not overrides:
        file = find_config(path)
        if isinstance(file, Path):
            return file.read_text(encoding="utf-8")
    reading = _Reading()
    layers = _user_layers(path, overrides, reading)
    chosen = _choose_classes(layers, reading)
    values = _merge(layers, chosen, reading)
    if reading.problems:
        raise UserError(*reading.problems)
    tree: dict[str, Any] = {}
    for key, given in values.items():
        node = tree
        *sections, leaf = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = given.value
    source = "the command line alone" if path is None else str(path)
    header = f"# {source}" + "".join(f"\n#   {' '.join(o.split())}" for o in overrides)
    return f"{header}\n{OmegaConf.to_yaml(OmegaConf.create(tree))}"


def _user_layers(path: str | Path | None, overrides: Sequence[str], reading: _Reading) -> list[Layer]:
    command_line, problems = read_overrides(overrides)
    if path is None:
        reading.problems += problems
        return [command_line]
    file = find_config(path)
    content = file if isinstance(file, Problem) else read_yaml(file, str(path))
    if isinstance(content, Problem):
        raise UserError(content, *problems)
    reading.problems += problems
    return [content, command_line]


def _preset_layers(user: list[Layer], reading: _Reading) -> list[Layer]:
    """The layers of the presets that the user's layers name, lowest first."""
    model = _preset("models", "model.preset", user, reading)
    hardware = _preset("hardware", "hardware.preset", user, reading)
    dtype = select(user, "train.dtype") or "bf16"
    hardware = [_for_dtype(g, dtype) for g in hardware if len(g.key) == 2 or g.key[2] == dtype]
    family = select([model, *user], "model.family") or "llama"
    defaults = find_preset("families", str(family))
    base = read_yaml(defaults, f"family {family}", ("model",)) if isinstance(defaults, Path) else []
    return [_trusted(base), model, hardware]


def _preset(kind: str, key: str, user: list[Layer], reading: _Reading) -> Layer:
    name = select(user, key)
    if name is None:
        return []
    file = find_preset(kind, str(name))
    if isinstance(file, str):
        where = next((g.where for layer in reversed(user) for g in layer if g.name == key), "")
        reading.reject(key, f"there is no preset {short(str(name))}; {file}", where)
        # Without the preset its section is empty, and every key of it would be reported as missing.
        reading.untrusted.add(key.split(".")[0])
        return []
    return _trusted(read_yaml(file, f"preset {name}", (key.split(".")[0],)))


def _trusted(layer: Layer | Problem) -> Layer:
    if isinstance(layer, Problem):
        raise UserError(layer)
    return layer


def _for_dtype(given: Given, dtype: str) -> Given:
    """`peak_tflops: {bf16: …, fp32: …}` of a hardware preset as the one value for this job's dtype."""
    nested = given.key[1] == "peak_tflops" and given.key[2:] == (dtype,)
    return dataclasses.replace(given, key=given.key[:2]) if nested else given


def _choose_classes(layers: list[Layer], reading: _Reading) -> dict[str, type]:
    chosen: dict[str, type] = {}
    for section, (registry, default) in SELECTORS.items():
        key = f"{section}.name"
        name = select(layers, key)
        if name is not None and str(name) not in registry:
            hint = nearest(str(name), registry)
            meant = f"; did you mean {hint}?" if hint else ""
            where = next((g.where for layer in reversed(layers) for g in layer if g.name == key), "")
            reading.reject(key, f"expected one of {', '.join(registry)}, got {short(name)}{meant}", where)
            reading.untrusted.add(section)
        chosen[section] = registry.get(str(name), registry[default])
    return chosen


def _other_class(key: str, chosen: Mapping[str, type]) -> tuple[str, str] | None:
    """(section, class name) of the class that has this key when the chosen class of its section does not."""
    for section, (registry, _) in SELECTORS.items():
        name = key.removeprefix(section + ".").split(".")[0]
        if key.startswith(section + ".") and name not in field_types(chosen[section]):
            return next(((section, n) for n, cls in registry.items() if name in field_types(cls)), None)
    return None


def _merge(layers: list[Layer], chosen: Mapping[str, type], reading: _Reading) -> dict[str, Given]:
    """The last given value of every key, converted; keys that the schema does not have are reported and left out."""
    keys, sections = flatten_schema(chosen)
    mappings = [k for k, a in keys.items() if is_mapping(a)]
    values: dict[str, Given] = {}
    for depth, layer in enumerate(layers):
        for given in layer:
            name = given.name
            owner = next((m for m in mappings if name.startswith(m + ".")), None)
            if owner is not None:
                free = name.removeprefix(owner + ".")
                before = values[owner].value if owner in values else {}
                given = dataclasses.replace(given, key=tuple(owner.split(".")), value={**before, free: given.value})
                name = owner
            if name in keys:
                converted = coerce(keys[name], given.value, given.text)
                values[name] = dataclasses.replace(given, value=converted)
            elif name in sections:
                if given.value is not None:
                    inner = ", ".join(field_types(sections[name]))
                    reading.reject(name, f"is a section with {inner}; got {short(given.value)}", given.where)
            elif not _superseded(name, layers[depth + 1 :], chosen, reading):
                reading.reject(name, _unknown(name, keys, sections, chosen), given.where)
    return values


def _superseded(key: str, later: list[Layer], chosen: Mapping[str, type], reading: _Reading) -> bool:
    """Whether the key belongs to a class that a later layer's name (or a wrong name) has replaced."""
    other = _other_class(key, chosen)
    if other is None:
        return False
    section = other[0]
    return section in reading.untrusted or any(g.name == f"{section}.name" for layer in later for g in layer)


def _unknown(key: str, keys: Mapping[str, Any], sections: Mapping[str, type], chosen: Mapping[str, type]) -> str:
    other = _other_class(key, chosen)
    if other is not None:
        section, name = other
        current = next((n for n, cls in SELECTORS[section][0].items() if cls is chosen[section]), "")
        return f"is a key of {section}.name={name}, but {section}.name is {current}"
    parent = next((k for k in keys if key.startswith(k + ".")), None)
    if parent is not None:
        return f"{parent} has no keys; expected {describe(keys[parent])}"
    if "[" in key:
        return f"lists are replaced whole: {key.partition('[')[0]}=[…]"
    if key in {k.rpartition(".")[2] for k in keys} and "." not in key:
        return f"unknown key; did you mean {nearest_key(key, keys)}?"
    section = key.partition(".")[0]
    if section not in sections and section not in keys:
        hint = nearest(section, sections)
        return f"unknown section; did you mean {hint}?" if hint else f"unknown key; sections: {_top(sections)}"
    hint = nearest_key(key, keys)
    if hint is not None:
        return f"unknown key; did you mean {hint}?"
    return f"unknown key; {section} has {', '.join(k for k in keys if k.startswith(section + '.'))}"


def _top(sections: Mapping[str, type]) -> str:
    return ", ".join(s for s in sections if "." not in s)


def _build(values: Mapping[str, Given], chosen: Mapping[str, type], reading: _Reading) -> Config:
    """Type-check the values one by one, so that all wrong ones are reported, and make the dataclasses."""
    keys, sections = flatten_schema(chosen)
    root = OmegaConf.structured(Config)
    OmegaConf.set_readonly(root, False)
    for section, cls in sections.items():
        OmegaConf.update(root, section, OmegaConf.structured(cls), merge=False)
        node = OmegaConf.select(root, section)
        # Frozen dataclasses make read-only nodes.
        OmegaConf.set_readonly(node, False)
    for key, given in values.items():
        default = _raw(root, key)
        try:
            OmegaConf.update(root, key, given.value, merge=False)
            OmegaConf.select(root, key)
        except OmegaConfBaseException as error:
            if f"{key.rpartition('.')[0]}" in SELECTORS and key.endswith(".name"):
                continue
            reading.reject(key, _type_message(keys[key], given.value, error), given.where)
            _set_default(root, key, default, keys[key])
    for key in sorted(OmegaConf.missing_keys(root)):
        if key.split(".")[0] not in reading.untrusted:
            instead = ", or a model.preset" if key.startswith("model.") else ""
            reading.reject(key, f"missing; expected {describe(keys[key])}{instead}")
        reading.untrusted.add(key)
        OmegaConf.update(root, key, _placeholder(keys[key]))
    config = OmegaConf.to_object(root)
    if not isinstance(config, Config):
        raise TypeError(f"OmegaConf built {type(config)} instead of Config")
    return config


def _type_message(annotation: Any, value: Any, error: OmegaConfBaseException) -> str:
    if isinstance(value, str) and "${" in value:
        return f"{short(value)} cannot be resolved: {short(str(error).splitlines()[0])}"
    return f"expected {describe(annotation)}, got {short(value)}"


def _raw(root: DictConfig, key: str) -> Any:
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(root, parent) if parent else root
    child = node._get_node(leaf)
    return child._value() if child is not None else MISSING


def _set_default(root: DictConfig, key: str, default: Any, annotation: Any) -> None:
    OmegaConf.update(root, key, _placeholder(annotation) if default == MISSING else default)


def _placeholder(annotation: Any) -> Any:
    """A value of the right type, for going on looking for problems after a missing or wrong one."""
    return coerce(
        annotation, {int: 1, float: 1.0, bool: False, str: ""}.get(annotation, {} if is_mapping(annotation) else ())
    )


def _consequence(problem: Problem, untrusted: set[str]) -> bool:
    """Whether a cross-field problem only follows from a value that was already reported (or is a stand-in for it)."""
    text = f"{problem.key} {problem.message}"
    suspects = {k for k in untrusted if "." in k} | {f"{k}." for k in untrusted if "." not in k}
    # Sizes of a model are derived from each other, so one wrong size makes all of them suspect.
    suspects |= {"model."} if any(k.startswith("model.") for k in untrusted) else set()
    return any(s in text for s in suspects)


def _located(problem: Problem, values: Mapping[str, Given]) -> Problem:
    given = values.get(problem.key)
    return Problem(problem.key, f"{problem.message} ({given.where})") if given is not None else problem


def _escape(value: T) -> T:
    """The value with `${` written so that reading it back is not an interpolation."""
    if isinstance(value, str):
        return value.replace("${", "\\${")  # type: ignore[return-value]
    if isinstance(value, dict):
        return {_escape(k): _escape(v) for k, v in value.items()}  # type: ignore[return-value]
    if isinstance(value, (list, tuple)):
        return [_escape(v) for v in value]  # type: ignore[return-value]
    return value
