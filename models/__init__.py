"""Single-device model maths, how each kind of layer is sharded, and Hugging Face folders."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .hf.folder import load_hf
    from .transformer import Transformer

__all__ = ["Transformer", "load_hf"]

_WHERE = {"Transformer": ".transformer", "load_hf": ".hf.folder"}


def __getattr__(name: str) -> Any:
    """Imports torch with the first name that needs it; counting parameters and FLOPs (`costs`) does not."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name], __name__), name)
