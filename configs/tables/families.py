"""The one list of model families, and what a family's name alone sets in the `model` section. No torch here.

For a row there is presets/families/NAME.yaml, the defaults, and models/hf/families/NAME.py, everything else. A family
from outside is added by its module (`--import`), through `models.hf.families.register`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Problem, UserError

_PRESETS = Path(__file__).parents[1] / "presets" / "families"
_NAME = re.compile(r"[a-z][a-z0-9_.-]*")


@dataclass(frozen=True)
class Defaults:
    """What a family sets.

    Args:
        text: one line on the family.
        values: keys of the `model` section, nested, and their values; or a YAML file of them.
    """

    text: str
    values: Mapping[str, Any] | Path


# In the order in which an export looks for one that can express the model, if its own cannot.
_LIST = {
    "llama": "Llama 2 and 3",
    "mistral": "Mistral",
    "qwen2": "Qwen 2 and 2.5",
    "qwen3": "Qwen 3",
    "gpt2": "GPT-2",
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen 2 with experts",
    "qwen3_moe": "Qwen 3 with experts",
    "olmoe": "OLMoE",
    "deepseek_v2": "DeepSeek V2",
    "deepseek_v3": "DeepSeek V3, Kimi K2",
    "gpt_oss": "GPT-OSS",
}
BUILT_IN = tuple(_LIST)
FAMILIES = {name: Defaults(text, _PRESETS / f"{name}.yaml") for name, text in _LIST.items()}
"""By name; imported modules add to it."""


def register_family(name: str, defaults: Defaults) -> None:
    """Adds a name, for the life of the process.

    Args:
        name: small letters, digits, `_`, `.` and `-`.
        defaults: what it sets.

    Raises:
        UserError: the name cannot be, or is taken.
    """
    if not _NAME.fullmatch(name):
        raise UserError(Problem(f"family {name!r}", "a name has small letters, digits, _, . and -, a letter first"))
    if name in FAMILIES:
        raise UserError(Problem(f"family {name}", "there is one of this name already; give another name"))
    FAMILIES[name] = defaults
