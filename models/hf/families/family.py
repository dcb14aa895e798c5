"""What a model family is: everything that Pentad knows of it beyond its defaults in presets/families/NAME.yaml."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....configs.errors import Problem
from ....configs.schema import ModelConfig
from ....parallel.sharding_rules import Plan
from ..expressible import Allowed, Check, no_linear_attention, value_obstacles
from ..links import Link
from ..names import decoder_links
from ..reader import Reader

_ABSENT: Mapping[str, Any] = {"initializer_range": 0.02, "tie_word_embeddings": False}


def _reads_all(cfg: ModelConfig, name: str) -> str:
    return ""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture of Hugging Face's, and how the model computes what it computes.

    A relative of a known family is made with `dataclasses.replace`.
    """

    name: str
    """`model.family`."""
    text: str = ""
    """One line on it, for `pentad show --keys`, for a family from outside Pentad."""
    architecture: str
    """Its class in transformers, by which config.json names it."""
    model_type: str = ""
    """Of config.json; empty: the name."""
    defaults: Mapping[str, Any] | Path = field(default_factory=dict)
    """Keys of the `model` section, nested, and their values, or a YAML file of them, for a family from outside Pentad;
    those of its own families are in presets/families."""
    absent: Mapping[str, Any] = field(default_factory=dict)
    """What transformers assumes for keys that config.json leaves out; sizes are never assumed."""
    read: Callable[[Reader], Mapping[str, Any]]
    """Keys of ModelConfig, less `tied`, `init_std` and `family`, of a config.json; problems go to the reader."""
    write: Callable[[ModelConfig], Mapping[str, Any]]
    """config.json of a model that it can express, less what all families write alike."""
    links: Callable[[ModelConfig, bool], Iterable[Link]] = decoder_links
    """Every tensor; the second argument: the experts of a layer are in one tensor per matrix."""
    backbone: str = "model."
    """What precedes the names of all tensors but the head; a folder of the bare backbone lacks it."""
    passed_over: Callable[[ModelConfig, str], str] = _reads_all
    """What a tensor of a folder belongs to that is not read, for the notice that says so; empty: it is read."""
    values: Allowed = field(default_factory=dict)
    """The values that it can express, by key of `model`; keys that are not named are free."""
    checks: tuple[Check, ...] = ()
    """What it asks of several keys together."""
    sharding: Plan | None = None
    """How tensor parallelism cuts it; none: like all (`models.sharding`)."""

    def reader(self, config: Mapping[str, Any]) -> Reader:
        """A reader of a config.json that knows what absent keys mean."""
        return Reader(config, {**_ABSENT, **self.absent})

    def obstacles(self, cfg: ModelConfig) -> list[Problem]:
        """Why the architecture cannot express a resolved model; empty if it can."""
        found = value_obstacles(cfg, self.values, self.architecture)
        for check in (no_linear_attention, *self.checks):
            found += check(cfg, self.architecture)
        return found
