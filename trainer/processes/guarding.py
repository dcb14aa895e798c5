"""Where a launcher's process becomes the guardian of its rank, so that the launcher does not hear of mended faults."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from ...configs.schema import Config

GUARDED = "pentad.launch.supervise.guarded"
"""The module that is a guardian; a string, for this room knows nothing of the one above it."""


def guardable(env: Mapping[str, str]) -> bool:
    """Whether a fault can be mended behind this launcher's back: torchrun's agent has the store, and all ranks are on
    this host."""
    one_host = env.get("LOCAL_WORLD_SIZE") == env.get("WORLD_SIZE")
    return sys.platform == "linux" and one_host and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def become_guardian(cfg: Config, argv: Sequence[str]) -> None:
    """Makes this process the guardian of the rank that it was to be; does not return.

    Args:
        cfg: the job.
        argv: of the rank.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", GUARDED, str(cfg.faults.spares), *argv])
