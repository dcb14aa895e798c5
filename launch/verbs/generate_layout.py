"""`pentad generate RUN --layout run`: text from a run's ranks, through its evaluation program."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import yaml

from ...configs import Problem, UserError, load
from ...configs.tables.imports import import_arguments
from ...trainer.run_folder import RunFile
from ...trainer.text.sample_run import ANSWER, REQUEST
from ..supervise.launcher import rank_environment, uses_gpus, world_size
from ..supervise.supervisor import supervise


def answers_in_layout(run: Path, checkpoint: Path, prompts: list[list[int]], texts: list[str], count: int) -> list[Any]:
    """What the run's layout makes of each prompt: objects with `prompt`, `text` and `tokens`.

    Args:
        run: the run's folder, whose resolved configuration says the layout.
        checkpoint: the weights.
        prompts: token ids, to see that they fit.
        texts: the same, as text.
        count: most tokens of each.

    Raises:
        UserError: the run's configuration cannot be used, or a prompt fills its sequences.
    """
    with tempfile.TemporaryDirectory(prefix="pentad-") as name:
        folder = Path(name)
        (folder / "ranks").mkdir()
        config = _write_job(folder, run, checkpoint)
        cfg = load(config, [])
        for text, prompt in zip(texts, prompts, strict=True):
            if len(prompt) >= cfg.train.seq_len:
                message = f"{text[:40]!r} has {len(prompt)} tokens, the run's sequences have {cfg.train.seq_len}"
                raise UserError(Problem("--prompt", f"{message}; shorten it, or leave out --layout run"))
        (folder / REQUEST).write_text(json.dumps({"prompts": texts, "count": count}))
        ranks = world_size(cfg)
        worker = [
            "pentad.launch.supervise.sample_worker",
            str(folder / "ranks"),
            *import_arguments(),
            str(config),
        ]
        code = supervise(folder / "ranks", ranks, worker, rank_environment(ranks, cuda=uses_gpus(cfg, ranks)))
        if code:
            raise SystemExit(code)
        return json.loads((folder / ANSWER).read_text())


def _write_job(folder: Path, run: Path, checkpoint: Path) -> Path:
    """The run's configuration without its data, its folders and its trackers."""
    resolved = run / RunFile.RESOLVED
    try:
        given = yaml.safe_load(resolved.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{resolved} cannot be read: {error}; --layout run needs the folder of a run") from None
    if not isinstance(given, dict):
        raise UserError(f"{resolved} is no configuration; --layout run needs the folder of a run")
    for suffix in (".bin", ".idx"):
        (folder / f"none{suffix}").touch()  # no data is read, and the run's may be gone
    sections = ("model", "parallel", "memory", "hardware", "train", "optim", "faults")
    kept = {key: given[key] for key in sections if key in given}
    job = {
        **kept,
        "name": "generate",
        "runs_dir": str(folder / "runs"),
        "data": {"name": "bin", "paths": [str(folder / "none")]},
        "checkpoint": {"init": str(checkpoint.absolute()), "final": False},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path
