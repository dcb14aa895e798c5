"""Single-device model maths, a declarative sharding plan per family, and Hugging Face names."""

from .hf import load_hf
from .transformer import Transformer

__all__ = ["Transformer", "load_hf"]
