"""What to say about a command line that cannot be read."""

from __future__ import annotations

from collections.abc import Sequence

from ..configs.errors import nearest

_ELSEWHERE = {
    "train": "run launch fit pretrain finetune start resume",
    "slurm": "sbatch submit srun salloc queue",
    "check": "validate dry-run dryrun test plan estimate memory",
    "show": "config print keys list",
    "flops": "params parameters count mfu",
    "tokenize": "preprocess prepare data encode",
    "import-hf": "import convert from-hf",
    "export-hf": "export to-hf save",
    "generate": "sample infer inference chat",
    "schedule": "pipeline draw",
    "diagnose": "debug why hang stuck blame flight-recorder",
}
"""What other tools call our commands."""


def unknown_verb(word: str, verbs: Sequence[str]) -> str:
    """The message for a first argument that is no command."""
    meant = next((verb for verb, words in _ELSEWHERE.items() if word.lower() in words.split() and verb in verbs), None)
    meant = meant or nearest(word.lower().replace("_", "-"), verbs)
    if meant is None and (word.endswith((".yaml", ".yml")) or word == "demo"):
        return f"no command {word}; to run that job, write pentad train {word}"
    return f"no command {word}; " + (f"did you mean {meant}?" if meant else f"one of {', '.join(verbs)}")


def unknown_arguments(verb: str, rest: Sequence[str], *, takes_keys: bool) -> str:
    """The message for arguments that a command does not have; config keys with dashes are the usual ones."""
    keys = ""
    if takes_keys:
        named = [a.lstrip("-") for a in rest if "." in a or "=" in a]
        written = " ".join(a if "=" in a else f"{a}=VALUE" for a in named)
        keys = "; config keys are given as key=value, without dashes" + (f": {written}" if written else "")
    return f"unknown argument {' '.join(rest)}{keys}; see pentad {verb} --help"
