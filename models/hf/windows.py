"""Sliding attention windows of a config.json, both ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...configs.schema import ModelConfig
from .reader import Reader


def no_window(reader: Reader) -> dict[str, Any]:
    """For architectures whose code does not know a window: a file that has one is refused."""
    reader.only("sliding_window")
    return {}


def read_window(reader: Reader, slides: Callable[[int], bool], *, listed: bool = True) -> dict[str, Any]:
    """The window, and every how many layers it holds, from the first on; another pattern is a problem.

    Args:
        reader: of config.json.
        slides: whether a layer has the window, as transformers derives it from the other keys.
        listed: the architecture's code reads `layer_types`, which says so for each layer.
    """
    layers = reader.integer("num_hidden_layers")
    given = reader.listed("layer_types") if listed and reader.value("layer_types") is not None else None
    if given is None:
        sliding = [slides(i) for i in range(layers)]
    else:
        for kind in sorted({str(kind) for kind in given} - {"full_attention", "sliding_attention"}):
            reader.problem("layer_types", f"{kind!r} is not supported, only full_attention and sliding_attention")
        sliding = [kind == "sliding_attention" for kind in given]
    if not any(sliding):
        return {}
    every = sliding.index(True, 1) if any(sliding[1:]) else len(sliding)
    if sliding != [i % every == 0 for i in range(len(sliding))] or len(sliding) != layers:
        key = "layer_types" if "layer_types" in reader.config else "max_window_layers"
        kinds = f"{sliding.count(False)} × full_attention, {sliding.count(True)} × sliding_attention"
        pattern = "layers of different attention are not supported, unless sliding ones are every n-th from the first"
        reader.problem(key, f"{pattern}; found {kinds} of {layers} layers")
        return {}
    return {"window": reader.integer("sliding_window"), "window_every": every}


def read_switched_window(reader: Reader, slides: Callable[[int, int], bool]) -> dict[str, Any]:
    """As `read_window`, for Qwen 2's keys: `use_sliding_window` turns it on, `max_window_layers` says where.

    Args:
        reader: of config.json.
        slides: whether a layer, its first argument, has the window; the second is `max_window_layers`.
    """
    on = bool(reader.value("use_sliding_window"))
    border = reader.integer("max_window_layers", zero=True) if on and reader.value("max_window_layers") else 0
    return read_window(reader, lambda layer: on and slides(layer, border))


def write_switched_window(cfg: ModelConfig) -> dict[str, Any]:
    """Qwen 2's keys, and the kind of every layer, which wins over them where transformers knows it."""
    slides = cfg.window is not None
    return {
        "use_sliding_window": slides,
        "sliding_window": cfg.window,
        "max_window_layers": cfg.layers if not slides else 0,
        "layer_types": attention_kinds(cfg),
    }


def attention_kinds(cfg: ModelConfig) -> list[str]:
    """`layer_types`: what every layer attends to."""
    return ["full_attention" if cfg.window_of(i) is None else "sliding_attention" for i in range(cfg.layers)]
