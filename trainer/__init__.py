"""Training: one rank's session, the step, data, checkpoints, metrics."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .text.model_source import load_checkpoint

__all__ = ["load_checkpoint"]


def __getattr__(name: str) -> Any:
    """Imports torch with the first name that needs it; what reads a run's folder does not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".text.model_source", __name__), name)
