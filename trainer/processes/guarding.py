"""Where a launcher's process becomes the guardian of its rank, so that the launcher does not hear of mended faults."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from ...configs.schema import Config

GUARDED = "pentad.launch.supervise.guarded"
"""The module that is a guardian; a string, for this room knows nothing of the one above it."""


def guardable(env: Mapping[str, str], given: Mapping[str, str] = os.environ) -> bool:
    """Whether a fault can be mended behind this launcher's back.

    Args:
        env: with torch's names for what the launcher says.
        given: as it was before those were added. Where nobody says which of its host's ranks this is, none of them
            can begin with what they share.
    """
    told = "LOCAL_RANK" in given or "RANK" not in given
    return sys.platform == "linux" and told and int(env.get("WORLD_SIZE", 1)) > 1


def become_guardian(cfg: Config, argv: Sequence[str], env: Mapping[str, str]) -> None:
    """Makes this process the guardian of the rank that it was to be; does not return.

    Args:
        cfg: the job.
        argv: of the rank.
        env: its environment, with torch's names for what the launcher says.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, "-m", GUARDED, str(cfg.faults.spares), *argv], dict(env))
