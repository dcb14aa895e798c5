"""Each method of the table has its core, and nothing else is taken for one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pentad.configs.schema_parallel import ContextConfig
from pentad.configs.tables.context_methods import CONTEXT_METHODS
from pentad.parallel.context.make import make_core, make_latent_core
from pentad.parallel.kernels.plain_maths import PlainMaths

MESH: Any = SimpleNamespace(axis=lambda name: name)


@pytest.mark.parametrize("name", [name for name in CONTEXT_METHODS if name != "auto"])
def test_every_method_has_its_core(name: str) -> None:
    method, context = CONTEXT_METHODS[name], ContextConfig(method=name)
    core, latent = make_core(context, MESH, PlainMaths()), make_latent_core(context, MESH, PlainMaths())
    assert method.name == name and method.text
    assert type(core).__name__ == method.core.partition(".")[2]
    assert (type(latent).__name__ if latent else "") == method.latent_core.partition(".")[2]


@pytest.mark.parametrize(("name", "error"), [("auto", ValueError), ("rings", KeyError)])
def test_nothing_else_is_taken_for_a_method(name: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        make_core(ContextConfig(method=name), MESH, PlainMaths())
