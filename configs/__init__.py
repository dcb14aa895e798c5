"""Configuration: schema, presets, loading and validation. Imports no torch."""

from .advice import warnings
from .errors import Problem, UserError
from .keys import KeyDoc, document, render
from .load import given_yaml, load
from .output import as_dict, hide, to_yaml
from .paths import check_files
from .resolve import resolve, resolve_model
from .schema import Config, ModelConfig
from .sources import preset_names
from .validation.general import validate

__all__ = [
    "Config",
    "KeyDoc",
    "ModelConfig",
    "Problem",
    "UserError",
    "as_dict",
    "check_files",
    "document",
    "given_yaml",
    "hide",
    "load",
    "preset_names",
    "render",
    "resolve",
    "resolve_model",
    "to_yaml",
    "validate",
    "warnings",
]
