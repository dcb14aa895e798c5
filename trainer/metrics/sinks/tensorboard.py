"""TensorBoard."""

from __future__ import annotations

from pathlib import Path

from ..metric import Picture
from ..report import Report


class TensorBoardSink:
    """TensorBoard event files, with the same keys as W&B."""

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Events of steps after the one resumed from are hidden by TensorBoard.
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None, flush_secs=10)

    def log(self, report: Report) -> None:
        for key, value in report.tracked.items():
            if isinstance(value, Picture):
                self._writer.add_image(key, value.pixels, report.step, dataformats="HWC")
            elif isinstance(value, str):
                self._writer.add_text(key, value, report.step)
            elif isinstance(value, (int, float)):
                self._writer.add_scalar(key, value, report.step)

    def add(self, report: Report) -> None:
        self.log(report)

    def close(self) -> None:
        self._writer.close()
