"""The batch script of a job: readable, in one piece, and right without this program.

It starts the ranks with srun, one task each, and decides by srun's exit code what becomes of the job:

    0            done
    STOP_CODE    the ranks were told to leave (time is up, preemption) and have saved: back into the queue
    2            a mistake of the user's: over
    others       a fault: again at once from the newest checkpoint; without progress since the last fault first from
                 the queue, on whatever nodes it gives, and at the third time over

A job that mends its faults itself (faults.recover) goes on without a node that is lost. The tasks there end badly all
the same, so that the run's events say how the job has ended.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...trainer.run_folder import RunFile
from .request import SlurmRequest

STOP_CODE = 75
"""What ranks leave with that were told to (`faults.stop_code`); EX_TEMPFAIL of BSD's sysexits.h."""
LOG, RANK_LOG = "job.log", "rank-%t.log"
FIRST_RANK_LOG = "rank-0.log"
CANCELLED, FAULTS = "cancelled", "faults"
SCRIPT, CONFIG, CODE = "job.sbatch", "job.yaml", "code"

_BODY = r"""
# The ranks get the signals of SLURM themselves; this script only waits for them.
trap : TERM USR1

folder={folder}
checkpoints={checkpoints}
export PYTHONPATH="$folder/{code}${{PYTHONPATH:+:$PYTHONPATH}}"
{environment}
newest() {{ ls "$checkpoints" 2>/dev/null | grep '^step-[0-9]*$' | tail -n 1; }}
say() {{ echo "$(date '+%F %T') job $SLURM_JOB_ID start ${{SLURM_RESTART_COUNT:-0}}: $*"; }}
to_queue() {{ say "back into the queue: $*"; scontrol requeue "$SLURM_JOB_ID" && sleep 600; exit 1; }}
# srun in the background: a signal then reaches this script at once. "wait" ends early with it, and once more tells the
# true code, or 127 where it had told it already.
step() {{
    srun "$@" &
    local pid=$! code=0 again
    while :; do wait "$pid"; code=$?; kill -0 "$pid" 2>/dev/null || break; done
    wait "$pid"; again=$?
    [ "$again" = 127 ] || code=$again
    return "$code"
}}

{setup}say "on $SLURM_JOB_NODELIST, newest checkpoint: $(newest)"
echo "$SLURM_JOB_ID" > "$folder/shared"
step --ntasks={nodes} --ntasks-per-node=1 {check} || {{ say "a node is not as it must be"; exit 2; }}

while :; do
    [ -e "$folder/{cancelled}" ] && {{ say "cancelled"; exit 0; }}
{before}    step --kill-on-bad-exit=0 {keep}--open-mode=append --output={rank_log} {ranks}
    code=$?
{after}    case "$code" in
        0) say "done"; exit 0 ;;
        {stop}) [ -e "$folder/{cancelled}" ] && {{ say "cancelled, and saved"; exit 0; }}
            to_queue "stopped and saved, newest checkpoint $(newest)" ;;
        2) say "a mistake in the config: see $folder/{first}"; exit 2 ;;
    esac
    # A fault. How many there were since the newest checkpoint: "COUNT CHECKPOINT" in a file, which outlives a requeue.
    now=$(newest)
    read -r count known 2>/dev/null < "$folder/{faults}" || count=0 known=
    [ "$known" = "${{now:-none}}" ] && count=$((count + 1)) || count=1
    echo "$count ${{now:-none}}" > "$folder/{faults}"
    say "exit code $code, fault $count since checkpoint ${{now:-none}}: see $folder/{first}"
    case "$count" in
        1) {again}say "again on the same nodes" ;;
        2) to_queue "perhaps to better nodes" ;;
        *) say "no progress in $count starts: over"; exit "$code" ;;
    esac
done
"""


_BEFORE = """    told=$(cat {events} 2>/dev/null | wc -l)
"""
_AGAIN = '[ -n "$(sinfo -h -n "$SLURM_JOB_NODELIST" -t down,fail -o %n)" ] && to_queue "a node is lost"; '
_AFTER = r"""    # Tasks of a node that was lost end badly however the job went on.
    case "$code" in
        0 | {stop} | 2) ;;
        *) ended=$(tail -n "+$((told + 1))" {events} 2>/dev/null | grep -o '"event": "\(end\|stopped\)"' | tail -n 1)
            case "$ended" in
                *end*) say "the job went on without ranks that were lost (exit code $code)"; code=0 ;;
                *stopped*) code={stop} ;;
            esac ;;
    esac
"""


@dataclass(frozen=True, kw_only=True)
class ScriptFacts:
    """What a script is made of besides what is asked for.

    Args:
        name: of the job.
        folder: where script, code, config and logs are; absolute, on storage that all nodes share.
        run, checkpoints: folders of the run and of its checkpoints; absolute.
        work: the folder from which relative paths of the config are read.
        python: the interpreter of the nodes, or in the container.
        options: arguments of a rank before the config (`--import MODULE`).
        overrides: keys after it.
        command: with which the script was made.
        recovers: whether the job goes on when a node is lost.
    """

    name: str
    folder: Path
    run: Path
    checkpoints: Path
    work: Path
    python: str
    options: Sequence[str] = ()
    overrides: Sequence[str] = ()
    command: str = ""
    recovers: bool = False


def batch_script(request: SlurmRequest, facts: ScriptFacts) -> str:
    """The script's text."""
    options = {
        "job-name": facts.name,
        "nodes": request.nodes,
        "ntasks-per-node": request.tasks,
        "gpus-per-node": request.gpus_per_node or None,
        "cpus-per-task": request.cpus_per_rank,
        "time": request.time,
        "partition": request.partition,
        "account": request.account,
        "qos": request.qos,
        "chdir": facts.work,
        "output": str(facts.folder / LOG).replace("%", "%%"),  # sbatch puts numbers in place of %j and its like
        "open-mode": "append",
        "signal": f"USR1@{request.notice}" if request.notice else None,
    }
    lines = ["#!/bin/bash", f"# Written by: {' '.join(facts.command.split())}"]
    lines += [f"#SBATCH {_quoted(f'--{key}={value}')}" for key, value in options.items() if value is not None]
    lines += [
        "#SBATCH --requeue",
        *(["#SBATCH --no-kill"] if facts.recovers else []),
        *(f"#SBATCH {option}" for option in request.sbatch),
    ]
    inside = _inside(request, facts)
    rank = ["-m", "pentad.trainer", *facts.options, str(facts.folder / CONFIG), *facts.overrides]
    check = ["-m", "pentad.launch.slurm.environment", str(request.gpus_per_node), str(facts.folder), str(facts.run)]
    events = shlex.quote(str(facts.run / RunFile.EVENTS))
    body = _BODY.format(
        folder=shlex.quote(str(facts.folder)),
        checkpoints=shlex.quote(str(facts.checkpoints)),
        code=CODE,
        environment=_environment(request),
        setup="".join(f"{line}\n" for line in request.setup),
        nodes=request.nodes,
        check=shlex.join([*inside, facts.python, *check]),
        ranks=shlex.join([*inside, facts.python, *rank]),
        cancelled=CANCELLED,
        rank_log=shlex.quote(f"{facts.folder}/".replace("%", "%%")) + RANK_LOG,
        before=_BEFORE.format(events=events) if facts.recovers else "",
        keep="--no-kill " if facts.recovers else "",
        after=_AFTER.format(events=events, stop=STOP_CODE) if facts.recovers else "",
        again=_AGAIN if facts.recovers else "",
        first=FIRST_RANK_LOG,
        faults=FAULTS,
        stop=STOP_CODE,
    )
    return "\n".join(lines) + "\n" + body


def _quoted(option: str) -> str:
    """An option as sbatch reads it in a script, where it knows quotes as a shell does."""
    if re.fullmatch(r"[\w@%+=:,./-]+", option):
        return option
    return '"' + option.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _environment(request: SlurmRequest) -> str:
    """What ranks find set, where the user has not set it."""
    if request.cpus_per_rank is None:
        return ""
    count = request.cpus_per_rank
    # srun no longer takes it over from sbatch.
    return f'export SRUN_CPUS_PER_TASK={count} OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{count}}}"\n'


def _inside(request: SlurmRequest, facts: ScriptFacts) -> list[str]:
    """What puts a command into the container: options of srun, or a command of its own."""
    image = request.container
    if image is None:
        return []
    folders = sorted({str(facts.work), str(facts.folder), str(facts.run), str(facts.checkpoints)})
    if image.endswith(".sif"):
        gpus = ["--nv"] if request.gpus_per_node else []
        return ["apptainer", "exec", *gpus, *(f"--bind={folder}" for folder in folders), image]
    mounts = ",".join(f"{folder}:{folder}" for folder in folders)
    return [f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={facts.work}"]
