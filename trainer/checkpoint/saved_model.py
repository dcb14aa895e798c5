"""The model of a checkpoint, as its state describes it, beside the model of a job. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from ...configs.errors import Problem, UserError, nearest
from ...configs.fields import field_types, optional, short
from ...configs.inert import differences
from ...configs.reading.convert import WrongType, convert, expected, written
from ...configs.resolve import resolve_model
from ...configs.schema import ModelConfig
from ...configs.tables.imports import give_again, missing_imports
from ...configs.tables.named import named

Section = TypeVar("Section")


def model_config_from_state(state: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a checkpoint's state; keys newer than the checkpoint have their defaults.

    Raises:
        UserError: a key that no model has, one that is missing, or a value that it cannot have: one problem for each.
    """
    problems: list[Problem] = []
    config = _built(ModelConfig, state.get("model"), "model", problems, missing_imports(state.get("imports")))
    if problems:
        raise UserError(*problems)
    return resolve_model(config, config.max_positions or 1)


def _built(kind: type[Section], values: Any, key: str, problems: list[Problem], missing: list[str]) -> Section:
    """A dataclass with the dataclasses inside it; `missing`: modules that names in it may have come from."""
    if not isinstance(values, Mapping):
        problems.append(Problem(key, f"the checkpoint has {short(values)} in its state.json, not a model"))
        return _built(kind, {}, key, [], missing)
    types, given = field_types(kind), {}
    for name, value in values.items():
        where = f"{key}.{name}"
        if name not in types:
            hint = nearest(name, types)
            also = f"; the nearest one is {hint}" if hint else ""
            problems.append(Problem(short(where), f"the checkpoint has this key, which no model has here{also}"))
        elif dataclasses.is_dataclass(types[name]):
            given[name] = _built(types[name], value, where, problems, missing)
        else:
            try:
                given[name] = convert(types[name], written(value))
            except WrongType as error:
                if missing and named(optional(types[name])[0]) is not None:
                    message = give_again(short(value), missing)
                else:
                    message = f"in the checkpoint: {expected(types[name], written(value), str(error))}"
                problems.append(Problem(where, message))
    wrong = bool(problems)  # a key that is spelt wrongly explains one that is missing
    for field in dataclasses.fields(cast(Any, kind)):
        if field.default is field.default_factory and field.name not in given:  # neither a default nor a value
            if not wrong:
                problems.append(Problem(f"{key}.{field.name}", "is missing in the checkpoint's state.json"))
            given[field.name] = 1
    return kind(**given)


def check_same_model(given: ModelConfig, job: ModelConfig, path: Path) -> None:
    """Refuse weights of a network that computes something else than the job's.

    Raises:
        UserError: one problem per key that differs.
    """
    if job.moe.experts and not given.moe.experts:
        message = f"{job.moe.experts}, but checkpoint.init={path} is a dense model; set model.moe.experts=0, or "
        raise UserError(Problem("model.moe.experts", f"{message}checkpoint.upcycle=true to make the experts of it"))
    problems = [
        Problem(f"model.{key}", f"{found}, but checkpoint.init={path} has {value}; set model.{key}={value}")
        for key, (value, found) in differences(given, job, padded=True).items()
    ]
    if problems:
        raise UserError(*problems)
