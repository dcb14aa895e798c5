"""Single-device model maths, a declarative sharding plan per family, and Hugging Face names."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .hf import load_hf
    from .transformer import Transformer

__all__ = ["Transformer", "load_hf"]

_WHERE = {"Transformer": ".transformer", "load_hf": ".hf"}


def __getattr__(name: str) -> Any:
    """Imports torch with the first name that needs it; counting parameters and FLOPs (`flops`) does not."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name], __name__), name)
