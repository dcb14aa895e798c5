"""`pentad slurm CONFIG`: a job's batch script, its way into the queue, its output, its end. Imports no torch."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

from ...configs import Config, Problem, UserError, given_yaml, load
from ...configs.tables.imports import import_arguments
from ...trainer.run_folder import checkpoint_folder, run_folder, used_folder
from ..slurm import queue
from ..slurm.request import SlurmRequest
from ..slurm.script import (
    CANCELLED,
    CONFIG,
    FIRST_RANK_LOG,
    LOG,
    SCRIPT,
    STOP_CODE,
    ScriptFacts,
    batch_script,
)
from ..slurm.snapshot import job_folders, next_folder, take_snapshot

_JOB = "job"
"""The file in a job's folder that names its number in the queue."""
_LOOK_S, _ASK_S = 1.0, 5.0
"""Between two looks at the output, and two questions to SLURM, which has others to serve."""


def slurm_parser(parser: argparse.ArgumentParser) -> None:
    """Describes the verb's options; CONFIG and overrides are there."""
    parser.description = (
        "Write the batch script of a job, with a copy of this program and of the config, into RUN/slurm; with --submit "
        "also put it into the queue. The ranks save before time is up and the job goes on from there by itself."
    )
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--nodes", **number, help="how many")
    parser.add_argument("--gpus-per-node", **number, default=0, help="of each (0: on CPUs)")
    parser.add_argument("--ranks-per-node", **number, help="on each (one for each GPU)")
    parser.add_argument("--cpus-per-rank", **number, help="for each (what the cluster gives)")
    parser.add_argument("--time", metavar="T", help="limit of one start, HOURS:MINUTES:SECONDS (the partition's)")
    parser.add_argument("--partition", metavar="P", help="of the cluster (its default)")
    parser.add_argument("--account", metavar="A", help="which pays")
    parser.add_argument("--qos", metavar="Q", help="quality of service")
    parser.add_argument("--notice", metavar="S", type=int, default=300, help="seconds to save before the limit (300)")
    parser.add_argument("--container", metavar="IMAGE", help="FILE.sif: by Apptainer; others: by pyxis")
    parser.add_argument("--python", metavar="P", default=sys.executable, help="of the nodes (this one)")
    parser.add_argument("--setup", metavar="LINE", action="append", default=[], help="of the shell, before the ranks")
    parser.add_argument("--sbatch", metavar="OPTION", action="append", default=[], help="one more, as --sbatch=--mem=0")
    parser.add_argument("--submit", action="store_true", help="put the job into the queue")
    parser.add_argument("--attach", action="store_true", help="follow the job: its state, and the first rank's output")
    parser.add_argument("--cancel", action="store_true", help="end it; one that runs saves first; twice: at once")


def slurm_run(args: argparse.Namespace) -> int:
    """Does what the options say.

    Returns:
        0, or of a job that was followed to an end that is not good 1.

    Raises:
        UserError: what is wrong with config or options, or what SLURM has against it.
    """
    cfg = load(args.config, args.overrides)
    if args.cancel:
        if args.submit:
            raise UserError(Problem("--cancel", "does not go with --submit"))
        return _cancel(_newest_job(cfg))
    if args.attach and not args.submit:
        return _follow(_newest_job(cfg))
    if args.submit:
        _refuse_second(cfg)
    folder = _write(cfg, args)
    if not args.submit:
        print(f"wrote {folder / SCRIPT}; sbatch {shlex.quote(str(folder / SCRIPT))} starts it")
        return 0
    job = queue.submit(folder / SCRIPT)
    (folder / _JOB).write_text(job + "\n")
    print(f"job {job}: {folder / SCRIPT}\nits output: {folder / FIRST_RANK_LOG}, what became of it: {folder / LOG}")
    return _follow(folder) if args.attach else 0


def _write(cfg: Config, args: argparse.Namespace) -> Path:
    """Writes script, config and code into a new folder."""
    if args.nodes is None:
        raise UserError(Problem("--nodes", "is not given"))
    fields = SlurmRequest.__dataclass_fields__
    asked = {name: value for name, value in vars(args).items() if name in fields}
    request = SlurmRequest(**{**asked, "setup": tuple(args.setup), "sbatch": tuple(args.sbatch)})
    load(args.config, args.overrides, world_size=request.world)
    earlier = used_folder(cfg)
    if earlier is not None:
        raise UserError(earlier)
    given = given_yaml(args.config, args.overrides)
    folder = next_folder(run_folder(cfg).resolve())
    try:
        return _fill(folder, cfg, args, request, given)
    except (OSError, shutil.Error) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"{folder} cannot be written ({error}); set another name= or runs_dir=") from None


def _fill(folder: Path, cfg: Config, args: argparse.Namespace, request: SlurmRequest, given: str) -> Path:
    """Writes what the job is started from; the folder."""
    (folder / CONFIG).write_text(given)
    version = take_snapshot(folder)
    resume = [] if cfg.checkpoint.resume else ["checkpoint.resume=latest"]
    facts = ScriptFacts(
        name=cfg.name,
        folder=folder,
        run=run_folder(cfg).resolve(),
        checkpoints=checkpoint_folder(cfg).resolve(),
        work=Path.cwd(),
        python=args.python,
        options=import_arguments(),
        overrides=[*resume, f"faults.stop_code={STOP_CODE}"],
        command=f"pentad {shlex.join(args.argv)} ({version})",
        recovers=cfg.faults.recover,
    )
    (folder / SCRIPT).write_text(batch_script(request, facts))
    return folder


def _newest_job(cfg: Config) -> Path:
    """The folder of the run's newest job that was put into the queue."""
    for folder in reversed(job_folders(run_folder(cfg))):
        if (folder / _JOB).exists():
            return folder
    raise UserError(f"no job of {run_folder(cfg)} was put into the queue; pentad slurm … --submit does that")


def _number_of(folder: Path) -> str:
    """The number in the queue of the job of a folder."""
    number = (folder / _JOB).read_text().strip()
    if not number.isascii() or not number.isdecimal():
        raise UserError(f"{folder / _JOB} holds no number of a job")
    return number


def _refuse_second(cfg: Config) -> None:
    for folder in job_folders(run_folder(cfg)):
        if (folder / _JOB).exists():
            job = _number_of(folder)
            found, _ = queue.state(job)
            if not queue.is_over(found):
                raise UserError(f"job {job} of this run is {found}; end it with --cancel, or set another name=")


def _cancel(folder: Path) -> int:
    job = _number_of(folder)
    found, _ = queue.state(job)
    if queue.is_over(found):
        print(f"job {job} is over: {found}")
        return 0
    mark = folder / CANCELLED
    asked = mark.exists()
    mark.touch()  # before the signal: the script looks for it once the ranks have left
    queue.cancel(job, running=found == "RUNNING" and not asked)
    how = "saves and leaves; once more ends it at once" if found == "RUNNING" and not asked else "was taken out"
    print(f"job {job} ({found}) {how}")
    return 0


def _follow(folder: Path) -> int:
    """Prints what the job's first rank does, and every change of its state, until it is over; Ctrl-C only leaves."""
    job = _number_of(folder)
    logs = [_Tail(folder / LOG), _Tail(folder / FIRST_RANK_LOG)]
    said, asked = "", -math.inf
    found = reason = ""
    try:
        while True:
            if time.monotonic() - asked >= _ASK_S:
                found, reason = queue.state(job)
                asked = time.monotonic()
            if (line := f"job {job}: {found}{f' ({reason})' if reason else ''}") != said:
                print(line, flush=True)
                said = line
            for log in logs:
                log.show()
            if queue.is_over(found):
                return 0 if found == "COMPLETED" else 1
            time.sleep(_LOOK_S)
    except KeyboardInterrupt:
        print(f"\njob {job} goes on; --attach follows it again, --cancel ends it")
        return 0


class _Tail:
    """What is added to a file, from its last lines on."""

    def __init__(self, file: Path, last: int = 4096) -> None:
        self._file, self._at = file, 0
        if file.exists():
            self._at = max(0, file.stat().st_size - last)

    def show(self) -> None:
        """Prints what is new."""
        try:
            with open(self._file, "rb") as opened:
                opened.seek(self._at)
                new = opened.read()
        except OSError:
            return
        self._at += len(new)
        os.write(sys.stdout.fileno(), new)
