"""From a YAML file, presets and `key=value` overrides to one resolved and validated `Config`.

Order, later wins: schema defaults < presets/families/FAMILY.yaml < presets/models and presets/hardware < the file <
the overrides. Sections with a `name` (optim, optim.schedule, data) take the class that the merged name selects; keys
of the file that only the class of an earlier layer's name has are dropped when an override selects another class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from .errors import Problem, UserError, nearest
from .fields import SELECTORS, describe, field_types, flatten_schema, is_mapping, nearest_key, optional
from .output import hide
from .paths import check_files
from .reading.build import KnownProblems, build, convert_all, defaults
from .reading.convert import display, odd_character
from .reading.hints import foreign_key, foreign_value, meant
from .reading.interpolation import is_interpolated
from .reading.written import Argument, Node, Unreadable, flow, is_mapping_text
from .reading.yaml_file import read_text
from .resolve import resolve
from .schedule_length import fit_schedule
from .schema import Config
from .sources import (
    Given,
    Layer,
    comes_with_pentad,
    find_config,
    find_preset,
    given_values,
    locate,
    plain,
    read_overrides,
    read_yaml,
    select,
    shown,
)
from .tables.families import FAMILIES
from .tables.imports import OPTION, give_again, imported, missing_in_checkpoints
from .tables.named import named
from .validation.general import validate


def load(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    world_size: int | None = None,
) -> Config:
    """Read, merge, resolve and validate a job's configuration.

    Args:
        path: a YAML file, the name of a job in presets/jobs, or None for the overrides alone.
        overrides: `section.key=value` arguments; the key's type says how the value is read.
        world_size: number of ranks, where it is known; `parallel.dp` is derived from it.

    Returns:
        The configuration with every derivable value filled in.

    Raises:
        UserError: all problems found, each one line with the key, the value, what is allowed and where it was given.
    """
    reading = KnownProblems()
    user = _user_layers(path, overrides, reading)
    layers = _preset_layers(user, reading) + user
    chosen = _choose_classes(layers, reading)
    given = _merge(layers, chosen, reading)
    values, origin = convert_all(given, chosen, reading)
    values, notes = fit_schedule(values, given, defaults(chosen))
    config = build(values, chosen, reading)
    presets = layers[: len(layers) - (1 if comes_with_pentad(path) else len(user))]
    origin = dataclasses.replace(
        origin,
        notes=notes,
        given=tuple(key for key, last in given.items() if last.layer >= len(presets)),
        otherwise=_otherwise(presets, chosen),
        imports=imported(),
    )
    config = dataclasses.replace(config, origin=origin)
    config = resolve(config, world_size)
    found = validate(config, world_size) + check_files(config)
    reading.problems += [
        Problem(p.key, hide(config, _located(p, given).message))
        for p in found
        if not _consequence(p, reading.untrusted)
    ]
    if reading.problems:
        raise UserError(*_brought_by_imports(reading.problems, given, chosen, config))
    return config


def _brought_by_imports(
    problems: Sequence[Problem], given: Mapping[str, Given], chosen: Mapping[str, type], config: Config
) -> list[Problem]:
    """The problems, with the modules that names which are not known came from, where the job's checkpoints say so."""
    keys, c = flatten_schema(chosen)[0], config.checkpoint
    told: list[Problem] = []
    for problem in problems:
        if problem.key in given and _is_no_name(problem.key, str(plain(given[problem.key].node)), keys):
            earlier = c.resume if c.resume != "latest" else None
            missing = missing_in_checkpoints(earlier, c.init, c.dir)
            if missing:
                message = give_again(display(given[problem.key].node), missing)
                problem = dataclasses.replace(problem, message=message)
        told.append(problem)
    return told


def _is_no_name(key: str, text: str, keys: Mapping[str, Any]) -> bool:
    """Whether the key chooses from a table, and the text is none of its names."""
    section, _, leaf = key.rpartition(".")
    if leaf == "name" and section in SELECTORS:
        return text not in SELECTORS[section][0]
    mark = named(optional(keys[key])[0])
    return mark is not None and not mark.takes(text)


def given_yaml(path: str | Path | None, overrides: Sequence[str] = ()) -> str:
    """What the user gave, as YAML that loads to the same configuration: the file as it is, or merged with overrides.

    Raises:
        UserError: the file or an override cannot be read.
    """
    options = [f"{OPTION} {name}" for name in imported()]
    if path is not None and not overrides:
        file = find_config(path)
        if isinstance(file, Path):
            return "".join(f"# {option}\n" for option in options) + read_text(file, str(path))
    reading = KnownProblems()
    layers = _user_layers(path, overrides, reading)
    chosen = _choose_classes(layers, reading)
    given = _merge(layers, chosen, reading)
    values, _ = convert_all(given, chosen, reading)
    if reading.problems:
        raise UserError(*reading.problems)
    fitted, _ = fit_schedule(values, given, defaults(chosen))
    tree: dict[str, Any] = {}
    for key in {**given, **fitted}:
        node = tree
        *sections, leaf = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        changed = key in fitted and fitted[key] != values.get(key)
        node[leaf] = fitted[key] if changed or key not in given else _yaml_value(given[key], fitted.get(key))
    source = "the command line alone" if path is None else str(path)
    header = f"# {source}" + "".join(f"\n#   {' '.join(o.split())}" for o in [*options, *overrides])
    return f"{header}\n{yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)}"


def _yaml_value(given: Given, value: Any) -> Any:
    """The value as it was written where it has interpolations, otherwise as it was read."""
    written = plain(given.node)
    return written if is_interpolated(written) else list(value) if isinstance(value, tuple) else value


def _otherwise(presets: list[Layer], chosen: Mapping[str, type]) -> dict[str, Any]:
    """The value of every key that has one where nobody but these layers gives any."""
    unheard = KnownProblems()  # whatever is wrong with a preset's value, the whole has been told
    values, _ = convert_all(_merge(presets, chosen, unheard), chosen, unheard)
    return {**defaults(chosen), **values}


def _user_layers(path: str | Path | None, overrides: Sequence[str], reading: KnownProblems) -> list[Layer]:
    command_line, problems = read_overrides(overrides)
    if path is None:
        reading.problems += problems
        return [command_line]
    file = find_config(path)
    if isinstance(file, Problem):
        raise UserError(file, *problems)
    try:
        content = read_yaml(file, str(path))
    except UserError as error:
        raise UserError(*error.problems, *problems) from None
    reading.problems += problems
    return [content, command_line]


def _preset_layers(user: list[Layer], reading: KnownProblems) -> list[Layer]:
    """The layers of the presets that the user's layers name, lowest first."""
    model = _preset("models", "model.preset", user, reading)
    dtype = select(user, "train.dtype") or "bf16"
    hardware = [_for_dtype(g, dtype) for g in _preset("hardware", "hardware.preset", user, reading)]
    family = select([model, *user], "model.family") or "llama"
    return [_family(family, reading), model, [g for g in hardware if g is not None]]


def _family(name: str, reading: KnownProblems) -> Layer:
    """The defaults of a family; the conversion of `model.family` will report a name that there is not."""
    family = FAMILIES.get(name)
    if family is None:
        reading.untrusted.add("model")  # which keys its defaults would have given is not known
        return []
    if isinstance(family.values, Path):
        return read_yaml(family.values, f"family {name}", "model.")
    return given_values(family.values, f"family {name}", "model")


def _preset(kind: str, key: str, user: list[Layer], reading: KnownProblems) -> Layer:
    name = select(user, key)
    if name is None:
        return []
    file = find_preset(kind, name)
    if isinstance(file, str):
        reading.reject(key, f"there is no preset {shown(user, key)}; {file}", locate(user, key))
        # Without the preset its section is empty, and every key of it would be reported as missing.
        reading.untrusted.add(key.split(".")[0])
        return []
    return read_yaml(file, f"preset {name}", key.split(".")[0] + ".")


def _for_dtype(given: Given, dtype: str) -> Given | None:
    """`peak_tflops: {bf16: …, fp32: …}` of a hardware preset as the one value for this job's dtype."""
    key, dot, suffix = given.key.partition("peak_tflops.")
    if not dot:
        return given
    return dataclasses.replace(given, key=key + dot[:-1]) if suffix == dtype else None


def _choose_classes(layers: list[Layer], reading: KnownProblems) -> dict[str, type]:
    chosen: dict[str, type] = {}
    for section, (registry, default) in SELECTORS.items():
        key = f"{section}.name"
        name = select(layers, key)
        if name is not None and name not in registry:
            hint = foreign_value(key, str, name) or meant(nearest(name, registry))
            message = f"expected one of {', '.join(registry)}, got {shown(layers, key)}{hint}"
            reading.reject(key, message, locate(layers, key))
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


def _merge(layers: list[Layer], chosen: Mapping[str, type], reading: KnownProblems) -> dict[str, Given]:
    """What was given last for every key; keys that the schema does not have are reported and left out."""
    keys, sections = flatten_schema(chosen)
    mappings = [k for k, a in keys.items() if is_mapping(a)]
    last: dict[str, Given] = {}
    for depth, layer in enumerate(layers):
        for given in (dataclasses.replace(g, layer=depth) for g in layer):
            name = given.key
            owner = next((m for m in mappings if name == m or name.startswith(m + ".")), None)
            if owner is not None:
                last[owner] = dataclasses.replace(given, key=owner, node=_merged(last.get(owner), given, owner))
            elif name in keys:
                last[name] = given
            elif name in sections:
                if plain(given.node) is not None:
                    reading.reject(name, _no_section(name, given, sections[name]), given.where)
            elif not _superseded(name, layers[depth + 1 :], chosen, reading):
                reading.reject(name, _unknown(name, keys, sections, chosen), given.where)
    return last


def _no_section(section: str, given: Given, cls: type) -> str:
    """The message for a value where a section belongs: often that of its `name` or `preset`."""
    shown, word = display(given.node), str(plain(given.node))
    if section in SELECTORS and word in SELECTORS[section][0]:
        return f"is a section, got {shown}; did you mean {section}.name={word}?"
    if "preset" in field_types(cls):
        file = find_preset("models" if section == "model" else section, word)
        if isinstance(file, Path) or file.startswith("did you mean"):
            return f"is a section, got {shown}; set {section}.preset={word if isinstance(file, Path) else file[13:-1]}"
    return f"is a section with {', '.join(field_types(cls))}; got {shown}"


def _merged(before: Given | None, given: Given, owner: str) -> Node:
    """A mapping with free keys, together with what was given for it: one of its keys, several, or something else."""
    entries: Node = {given.key.removeprefix(owner + "."): given.node} if given.key != owner else given.node
    if isinstance(entries, Argument) and is_mapping_text(entries.text):
        with suppress(Unreadable):
            entries = flow(entries.text)
    if before is None or not isinstance(entries, dict) or not isinstance(before.node, dict):
        return entries
    return {**before.node, **entries}


def _superseded(key: str, later: list[Layer], chosen: Mapping[str, type], reading: KnownProblems) -> bool:
    """Whether the key belongs to a class that a later layer's name (or a wrong name) has replaced."""
    other = _other_class(key, chosen)
    if other is None:
        return False
    section = other[0]
    return section in reading.untrusted or any(g.key == f"{section}.name" for layer in later for g in layer)


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
    odd = odd_character(key)
    if ":" in key:
        odd += "; YAML needs a space behind the colon, key: value"
    foreign = foreign_key(key)
    if foreign is not None:
        return f"unknown key; {foreign}{odd}"
    section = key.partition(".")[0]
    if key not in {k.rpartition(".")[2] for k in keys} and section not in sections and section not in keys:
        hint = nearest(section, sections)
        return (
            f"unknown section; did you mean {hint}?{odd}" if hint else f"unknown key; sections: {_top(sections)}{odd}"
        )
    hint = nearest_key(key, keys)
    if hint is not None:
        return f"unknown key; did you mean {hint}?{odd}"
    return f"unknown key; {section} has {', '.join(k for k in keys if k.startswith(section + '.'))}{odd}"


def _top(sections: Mapping[str, type]) -> str:
    return ", ".join(s for s in sections if "." not in s)


def _consequence(problem: Problem, untrusted: set[str]) -> bool:
    """Whether a cross-field problem only follows from a value that was already reported (or is a stand-in for it)."""
    # Sizes of a model are derived from each other, so one wrong size makes all of them suspect.
    suspects = untrusted | ({"model"} if any(key.startswith("model.") for key in untrusted) else set())
    return any(key == suspect or key.startswith(f"{suspect}.") for key in problem.keys for suspect in suspects)


def _located(problem: Problem, values: Mapping[str, Given]) -> Problem:
    given = values.get(problem.key)
    return Problem(problem.key, f"{problem.message} ({given.where})") if given is not None else problem
