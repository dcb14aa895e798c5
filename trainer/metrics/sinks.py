"""Where step metrics go: `metrics.jsonl`, the console, Weights & Biases, TensorBoard; and `events.jsonl`.

Made and called by rank 0 only. Tracker keys: docs/metrics.md.
"""

from __future__ import annotations

import netrc
import os
import re
import secrets
import sys
import time
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import urlparse

from ...configs.errors import UserError
from ...configs.schema import LogConfig
from ...configs.strict_json import JsonError, expect_int, expect_object, parse_json, read_bytes
from ..preflight import missing_packages
from . import routing
from .line_file import LineFile
from .notices import warn
from .routing import HeatMap
from .step import Pace, StepMetrics, console_header, console_line, use_color


@dataclass(frozen=True)
class SampleText:
    """A prompt and what the model makes of it, as a value for trackers."""

    prompt: str
    text: str

    @property
    def line(self) -> str:
        """On one line."""
        return f"{self.prompt} … {self.text}".replace("\n", "\\n")


class Sink(Protocol):
    """A consumer of step metrics."""

    def log(self, m: StepMetrics, extra: Mapping[str, Any]) -> None:
        """Take one step.

        extra: further values by tracker key (`optim/lr/GROUP`, `progress/eta_s`): scalars, or a `HeatMap`.
        """
        ...

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Take what became known of the last logged step after it was logged, by tracker key (`loss/val`)."""
        ...

    def close(self) -> None:
        """Write out what is buffered."""
        ...


class JsonlSink:
    """`metrics.jsonl`: one object a step, in the file at once, each step there once however often the run resumes."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        """resume_step: newest step already trained; later lines are dropped. 0 moves an old file aside."""
        if resume_step:
            _keep_until(path, resume_step)
        elif path.exists():
            os.replace(path, path.with_suffix(".previous.jsonl"))
        self._file = LineFile(path)

    def log(self, m: StepMetrics, extra: Mapping[str, Any]) -> None:
        self._file.write(m.to_dict())

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Nothing: evaluations are in `events.jsonl`."""

    def close(self) -> None:
        self._file.close()


class EventLog:
    """`events.jsonl`: faults, restarts, checkpoints, evaluations; `{"time": Unix seconds, "event": …, …}` a line."""

    def __init__(self, path: Path) -> None:
        """Appends; several processes of a node may hold the same file."""
        self._file = LineFile(path)

    def log(self, event: str, **fields: Any) -> None:
        """Append one event."""
        self._file.write({"time": time.time(), "event": event, **fields})

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class ConsoleSink:
    """One line a step; the titles first, and again every 40 lines on a terminal."""

    def __init__(self, total_steps: int, every: int = 1, stream: IO[str] | None = None) -> None:
        """every: steps between lines; the first of this process, the last and skipped steps are always shown."""
        self._stream = stream if stream is not None else sys.stdout
        self._total, self._every = total_steps, max(1, every)
        self._color = use_color(self._stream)
        self._lines = 0
        self._skipped: int | None = None

    def log(self, m: StepMetrics, extra: Mapping[str, Any]) -> None:
        # A resumed run starts with a count; only its growth tells that this step was skipped.
        skipped = m.skipped > (m.skipped if self._skipped is None else self._skipped)
        self._skipped = m.skipped
        if self._lines and m.step % self._every and m.step != self._total and not skipped:
            return
        if not self._lines or (self._stream.isatty() and self._lines % 40 == 0):
            print(console_header(self._total, m.moe is not None), file=self._stream)
        self._lines += 1
        eta_s = extra.get("progress/eta_s")
        line = console_line(m, self._total, eta_s=eta_s, skipped=skipped, color=self._color)
        print(line, file=self._stream, flush=True)

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        if "loss/val" in values:
            print(f"held-out loss after step {step}: {values['loss/val']:.4f}", file=self._stream, flush=True)
        for value in values.values():
            if isinstance(value, SampleText):
                print(f"sample: {value.line}", file=self._stream, flush=True)

    def close(self) -> None:
        self._stream.flush()


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
        self.run.define_metric("progress/tokens")
        self.run.define_metric("loss/*", step_metric="progress/tokens")

    def log(self, m: StepMetrics, extra: Mapping[str, Any]) -> None:
        values = tracker_values(m, extra)
        for key, value in values.items():
            if isinstance(value, HeatMap):
                values[key] = self._wandb.Image(routing.image(value))
        self.run.log(values, step=m.step)

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        shown = {key: value.line if isinstance(value, SampleText) else value for key, value in values.items()}
        self.run.log(shown, step=step)  # W&B writes a step's row when the next step or the end comes

    def close(self) -> None:
        self.run.finish()


class TensorBoardSink:
    """TensorBoard event files, with the same keys as W&B."""

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Events of steps after the one resumed from are hidden by TensorBoard.
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None, flush_secs=10)

    def log(self, m: StepMetrics, extra: Mapping[str, Any]) -> None:
        for key, value in tracker_values(m, extra).items():
            if isinstance(value, HeatMap):
                self._writer.add_image(key, routing.image(value), m.step, dataformats="HWC")
            elif isinstance(value, (int, float)):
                self._writer.add_scalar(key, value, m.step)

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, SampleText):
                self._writer.add_text(key, value.line, step)
            else:
                self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class SinkSet:
    """All sinks of a run; adds `progress/pct` and `progress/eta_s` to every step's extras."""

    def __init__(self, sinks: list[Sink], total_steps: int) -> None:
        self.sinks = sinks
        self._total = total_steps
        self._pace = Pace(total_steps)
        self._silent: list[Sink] = []
        """Those whose trouble has been told."""

    def log(self, m: StepMetrics, extra: Mapping[str, Any] | None = None) -> None:
        """Give one step to every sink; called once for each step."""
        progress: dict[str, Any] = {"progress/pct": 100.0 * m.step / max(1, self._total)}
        eta_s = self._pace.eta_s(m)
        if eta_s is not None:
            progress["progress/eta_s"] = eta_s
        for sink in self.sinks:
            with self._spared(sink):
                sink.log(m, {**progress, **(extra or {})})

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Give every sink further values of the step that was logged last."""
        for sink in self.sinks:
            with self._spared(sink):
                sink.add(step, values)

    @contextmanager
    def _spared(self, sink: Sink) -> Generator[None, None, None]:
        """A report that a full disk or a lost network does not take is no reason to end a training run."""
        try:
            yield
        except BrokenPipeError:  # whoever read the run's output has left
            raise
        except OSError as error:
            if sink not in self._silent:
                self._silent.append(sink)
                warn(
                    f"{type(sink).__name__} cannot be written ({error.strerror or error}); training goes on without it"
                )

    def close(self) -> None:
        """Close every sink, also where one of them fails; then that one's error is raised."""
        failures: list[Exception] = []
        for sink in self.sinks:
            try:
                sink.close()
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]


def make_sinks(
    cfg: LogConfig, run_dir: Path, config_dict: Mapping[str, Any], total_steps: int, resume_step: int = 0
) -> SinkSet:
    """The sinks that the config asks for, on rank 0.

    config_dict: the resolved config, recorded by trackers; resume_step: step of the checkpoint, 0 for a new run.
    Raises UserError naming every tracker whose package is missing, before anything is opened.
    """
    problems = missing_packages(cfg)
    if problems:
        raise UserError(*problems)
    run_dir.mkdir(parents=True, exist_ok=True)
    sinks: list[Sink] = [JsonlSink(run_dir / "metrics.jsonl", resume_step), ConsoleSink(total_steps, cfg.every)]
    if cfg.wandb:
        sinks.append(WandbSink(cfg.wandb_project, run_dir, config_dict, resume_step))
    if cfg.tensorboard:
        sinks.append(TensorBoardSink(run_dir / "tensorboard", resume_step))
    return SinkSet(sinks, total_steps)


def tracker_values(m: StepMetrics, extra: Mapping[str, Any]) -> dict[str, Any]:
    """W&B and TensorBoard values of a step by key; what is not known is left out."""
    values: dict[str, Any] = {
        "loss/train": m.loss,
        "optim/grad_norm": m.grad_norm,
        "optim/skipped": m.skipped,
        "perf/mfu": m.mfu,
        "perf/mfu_full": m.mfu_full,
        "perf/hfu": m.hfu,
        "perf/tflops_per_gpu": m.tflops_per_device,
        "perf/tokens_per_s": m.tokens_per_s,
        "perf/tokens_per_s_per_gpu": m.tokens_per_s_per_device,
        "perf/step_s": m.step_time_s,
        "perf/data_s": m.data_s,
        "perf/data_pct": 100.0 * m.data_s / m.step_time_s,
        "mem/active_gib": m.memory_gib,
        "progress/tokens": m.tokens,
    }
    moe = None if m.moe is None else routing.tracker_values(m.moe)
    for prefix, group in (("waterfall", m.waterfall), ("straggler", m.straggler), ("moe", moe)):
        values.update({f"{prefix}/{key}": value for key, value in (group or {}).items()})
    values.update(extra)
    if not any(key.startswith("optim/lr/") for key in values):
        values["optim/lr/all"] = m.lr
    return {key: value for key, value in values.items() if value is not None}


def _known_id(file: Path) -> str:
    """The W&B run that the folder belongs to; a new one where the file holds no id."""
    try:
        text = read_bytes(file, max_bytes=256).decode().strip()
    except (OSError, ValueError):
        text = ""
    return text if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", text) else secrets.token_hex(4)


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines after `step`, a half-written one, and repetitions, by atomic replacement."""
    if not path.exists():
        return
    kept: dict[int, bytes] = {}
    for line in path.read_bytes().splitlines():
        try:
            at = expect_int(expect_object(parse_json(line), "a line", ("step",))["step"], "step")
        except JsonError:
            continue
        if at <= step:
            kept[at] = line
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        file.writelines(kept[at] + b"\n" for at in sorted(kept))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


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
