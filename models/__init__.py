"""Single-device model maths, a declarative sharding plan per family, and Hugging Face names."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..trainer.text.model_source import load_checkpoint
    from .hf.folder import load_hf
    from .transformer import Transformer

__all__ = ["Transformer", "load_checkpoint", "load_hf"]

# Checkpoints belong to the trainer's room, which this one does not know otherwise: for users the name stands here,
# beside `load_hf`.
_WHERE = {"Transformer": ".transformer", "load_hf": ".hf.folder", "load_checkpoint": "..trainer.text.model_source"}


def __getattr__(name: str) -> Any:
    """Imports torch with the first name that needs it; counting parameters and FLOPs (`costs`) does not."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name], __name__), name)
