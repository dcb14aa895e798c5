"""Weights & Biases."""

from __future__ import annotations

import netrc
import os
import re
import secrets
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from ....configs.strict_json import read_bytes
from ..metric import Picture
from ..report import Report


class WandbSink:
    """Weights & Biases: one row a step; offline without an API key; a resumed run goes on as the same run."""

    def __init__(
        self, project: str, run_dir: Path, config: Mapping[str, Any], resume_step: int = 0, name: str | None = None
    ) -> None:
        import wandb

        self._wandb = wandb
        # Made absolute: wandb resolves it against its own process's folder.
        folder = run_dir.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / "wandb.id"
        resumed = bool(resume_step) and id_file.exists()
        run_id = _known_id(id_file) if resumed else secrets.token_hex(4)
        id_file.write_text(run_id + "\n")
        options: dict[str, Any] = {
            "project": project,
            "dir": str(folder),
            "config": dict(config),
            "id": run_id,
            "name": name or folder.name,
            "resume": "allow" if resumed else None,
        }
        offline = "WANDB_MODE" not in os.environ and not _has_wandb_key()
        try:
            self.run = wandb.init(**options, mode="offline" if offline else None)
        except wandb.Error as error:
            # A tracker out of reach must not stop a training run.
            warnings.warn(f"W&B: {error}; logging offline, send it later with `wandb sync`", stacklevel=2)
            self.run = wandb.init(**options, mode="offline")
        self._axes: set[str] = set()
        """Keys of the metrics that it was told what to draw over."""

    def log(self, report: Report) -> None:
        for metric in (shown.metric for shown in report.shown):
            if metric.tracker and metric.over and metric.key not in self._axes:
                self._axes.add(metric.key)
                self.run.define_metric(metric.over)
                self.run.define_metric(metric.tracker, step_metric=metric.over)
        shown = {
            key: self._wandb.Image(value.pixels) if isinstance(value, Picture) else value
            for key, value in report.tracked.items()
        }
        self.run.log(shown, step=report.step)
        for alert in report.alerts:
            self.run.alert(alert.title, alert.text, level="WARN")

    def add(self, report: Report) -> None:
        self.log(report)  # W&B writes a step's row when the next step or the end comes

    def close(self) -> None:
        self.run.finish()


def _known_id(file: Path) -> str:
    """The W&B run that the folder belongs to; a new one where the file holds no id."""
    try:
        text = read_bytes(file, max_bytes=256).decode().strip()
    except (OSError, ValueError):
        text = ""
    return text if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", text) else secrets.token_hex(4)


def _has_wandb_key() -> bool:
    """Whether wandb would find credentials by itself; asking wandb would prompt, in some versions."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    files = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for file in files:
        try:
            if netrc.netrc(os.path.expanduser(file)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
