"""Modules from outside that add to the tables: `--import MODULE` on a command line, and never because a file says so.

A run writes their names into its checkpoints, so that whoever goes on without them can be told which are missing. The
names are read for that message only.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import Problem, UserError, nearest
from ..strict_json import JsonError, read_json

OPTION = "--import"
_WRITTEN = re.compile(r"[\w./-]{1,200}")
_imported: list[str] = []


def import_modules(names: Sequence[str]) -> None:
    """Imports modules, which add what they have to the tables; each once, in their order.

    Args:
        names: dotted names, found as Python finds them and in the current folder; or paths of .py files.

    Raises:
        UserError: one is not there, or failed.
    """
    folder = os.getcwd()
    if names and folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)  # as `python -m` has it, which ranks are started with
    for name in names:
        if name not in _imported:
            _import(name)
            _imported.append(name)


def imported() -> tuple[str, ...]:
    """What was imported, as it was written."""
    return tuple(_imported)


def import_arguments() -> list[str]:
    """The arguments by which a process that this one starts imports the same."""
    return [argument for name in _imported for argument in (OPTION, name)]


def take_imports(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The modules that a command line names, and the rest of it.

    Raises:
        UserError: the option has no module.
    """
    names: list[str] = []
    rest: list[str] = []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        option, equals, name = argument.partition("=")
        if option != OPTION:
            rest.append(argument)
            continue
        if not equals:
            name = left.pop(0) if left else ""
        if not name:
            raise UserError(Problem(OPTION, "which module? write --import MODULE"))
        names.append(name)
    return names, rest


def _import(name: str) -> None:
    try:
        if name.endswith(".py"):
            _import_file(Path(name))
        else:
            importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except UserError as error:
        raise UserError(*(Problem(f"{OPTION} {name}", str(problem)) for problem in error.problems)) from error
    except BaseException as error:  # a module may even call sys.exit
        raise UserError(Problem(f"{OPTION} {name}", _why(name, error))) from error


def _import_file(path: Path) -> ModuleType:
    """A file as the module of its name, so that importing it by that name gives the same one."""
    found = sys.modules.get(path.stem)
    if found is not None:
        if getattr(found, "__file__", None) and os.path.samefile(str(found.__file__), path):
            return found
        raise UserError(f"there is another module {path.stem}; rename the file")
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file")
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def _why(name: str, error: BaseException) -> str:
    """Why a module could not be imported, in one line."""
    if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
        around = [file.stem for file in Path().glob("*.py")]
        hint = nearest(name, around)
        return f"there is no module {error.name} here or on Python's path" + (f"; did you mean {hint}?" if hint else "")
    told = " ".join(f"{type(error).__name__}: {error}".split())
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    inside = [frame for frame in frames if frame.filename != __file__]
    where = f" ({inside[-1].filename}:{inside[-1].lineno})" if inside and not isinstance(error, SyntaxError) else ""
    return f"cannot be imported: {told}{where}"


def missing_imports(noted: Any) -> list[str]:
    """Those of the modules noted in a checkpoint's state that are not imported here."""
    names = noted if isinstance(noted, list) else []
    written = [name for name in names if isinstance(name, str) and _WRITTEN.fullmatch(name)]
    return [name for name in written if name not in _imported]


def give_again(value: str, missing: Sequence[str]) -> str:
    """The message for a name that an imported module had brought."""
    options = " ".join(f"{OPTION} {name}" for name in missing)
    return f"{value} is not known; the run was started with {options}; give it again"


def missing_in_checkpoints(*folders: str | Path | None) -> list[str]:
    """`missing_imports` of the first of these that is a checkpoint, or a folder of checkpoints: of its newest one."""
    for folder in folders:
        if folder is None:
            continue
        inside = sorted(Path(folder).glob("step-*/state.json"), reverse=True)
        for file in [Path(folder) / "state.json", *inside]:
            try:
                state = read_json(file)
            except (OSError, JsonError):
                continue
            return missing_imports(state.get("imports") if isinstance(state, dict) else None)
    return []
