"""`pentad schedule`: makes, checks, simulates and draws the program of a pipeline. Imports no torch."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ...configs import Problem, UserError
from ...configs.errors import nearest
from ...configs.fields import short
from ...configs.tables.schedules import SCHEDULES, default_chunks, find_schedule, is_program, schedule_problems
from ...parallel.pipeline.check import check_program
from ...parallel.pipeline.communication import is_lowered
from ...parallel.pipeline.lower import lower
from ...parallel.pipeline.memory import ActivationBytes, peak_activations, peak_host_bytes
from ...parallel.pipeline.offload import first_chunks, offload
from ...parallel.pipeline.program import Program
from ...parallel.pipeline.program_file import read_program
from ...parallel.pipeline.readings import Bubble, Utilization, bubbles, critical_path, utilization
from ...parallel.pipeline.refine import refine
from ...parallel.pipeline.schedules import generate
from ...parallel.pipeline.simulate import Timeline, simulate
from ...parallel.pipeline.times import Times, by_rank
from ...parallel.pipeline.vocabulary import balanced
from ...trainer.pipeline.real_step import read_real_step
from ...trainer.run_folder import RunFile

_PER_RANK = {
    "F": "forward",
    "B": "backward",
    "W": "weight",
    "S": "head",
    "T": "head_grad",
    "IF": "embed",
    "IB": "embed_grad",
    "offload": "offload",
    "reload": "reload",
}
"""Names of times that may differ between ranks, and the fields of `Times` that they fill."""
"""Where a run keeps its program."""
_LATENCIES = {"comm": "hop", "link": "link", "collective": "collective"}
_NAMES = (*_PER_RANK, *_LATENCIES)
_PER_STAGE = ("F", "B", "W", "offload", "reload")
_OPTIONS = {
    "parallel.pp": "--ranks",
    "parallel.pipeline.schedule": "NAME",
    "parallel.pipeline.chunks": "--chunks",
    "parallel.pipeline.group": "--group",
    "parallel.pipeline.vocab": "--vocab",
    "parallel.pipeline.vocab_barriers": "--vocab-barriers",
}
"""The option of the command line that stands for a key of the configuration."""


@dataclass(frozen=True)
class SimulatedProgram:
    """A program and how it runs.

    Args:
        name: of its schedule.
        timeline: the lowered program's simulated run.
        use: spans, work and bubbles of the timeline.
        peaks: activations of each rank, in microbatches of its whole share.
        plain_peak: the highest peak of any rank under the same schedule with `ends`; None where it is not known.
        actual: what a run really did, in seconds.
    """

    name: str
    timeline: Timeline
    use: Utilization
    peaks: tuple[float, ...]
    plain_peak: float | None
    actual: Timeline | None = None

    @property
    def program(self) -> Program:
        return self.timeline.program

    @property
    def extra(self) -> float | None:
        """Activations that the balanced vocabulary adds to the peak; None where it is not known."""
        return None if self.plain_peak is None else max(self.peaks) - self.plain_peak


def schedule(args: argparse.Namespace) -> int:
    """Runs the verb; `args` as `cli` declares them.

    Raises:
        UserError: what is wrong with the arguments, or a file that cannot be read or written.
    """
    plan = make(args)
    _write_files(plan, args)
    if args.json:
        print(json.dumps(as_json(plan)))
        return 0
    from ...parallel.pipeline import draw

    width = args.width if args.width is not None else shutil.get_terminal_size((120, 24)).columns
    print(_summary(plan))
    print(draw.terminal(plan.timeline, width, colour=sys.stdout.isatty()), end="")
    return 0


def make(args: argparse.Namespace) -> SimulatedProgram:
    """The program that the arguments ask for, checked and simulated."""
    if (Path(args.name) / RunFile.PROGRAM).is_file():
        return of_run(Path(args.name), args.step)
    if is_program(args.name):
        return of_file(args)
    if args.name not in SCHEDULES and (os.sep in args.name or os.path.isdir(args.name)):
        raise UserError(
            Problem(args.name, f"no run has its {RunFile.PROGRAM} there; give a run's folder or a schedule's name")
        )
    missing = [option for option in ("ranks", "microbatches") if getattr(args, option) is None]
    if missing:
        raise UserError(
            *(Problem(f"--{option}", f"is missing: how many {option}? for example --{option} 4") for option in missing)
        )
    find_schedule(args.name, "NAME")
    size = {
        "ranks": args.ranks,
        "chunks": default_chunks(args.name) if args.chunks is None else args.chunks,
        "group": args.group,
    }
    barriers = args.vocab_barriers if args.vocab == "balanced" else None
    problems = schedule_problems(args.name, **size, barriers=barriers, called=_OPTIONS)
    problems += [
        Problem(option, f"must be at least 1, got {value}")
        for option, value in (
            ("--microbatches", args.microbatches),
            ("--parts", args.parts),
            ("--width", args.width),
        )
        if value is not None and value < 1
    ]
    if problems:
        raise UserError(*problems)
    size["microbatches"] = args.microbatches
    given = _given_times(args.times_file, args.time, args.ranks)
    program = plain = generate(args.name, **size)
    if barriers is not None:
        program = balanced(args.name, **size, barriers=barriers, times=_times(given, plain))
    parts = (args.parts,) * program.stages
    program, plain = refine(program, parts), refine(plain, parts)
    times = replace(_times(given, plain), one_engine=args.one_copy_engine)
    program = lower(program, times=times)
    if SCHEDULES[args.name].offloads:
        program = offload(program, first_chunks(program, SCHEDULES[args.name].offloads, parts), times)
    check_program(program)
    timeline = simulate(program, times)
    return SimulatedProgram(
        args.name, timeline, utilization(timeline), peak_activations(program), max(peak_activations(plain))
    )


def of_file(args: argparse.Namespace) -> SimulatedProgram:
    """The program of a file, lowered where it has compute alone, and simulated with the times that were given.

    Raises:
        UserError: the file is no program, or an option says what the file does.
    """
    said = {"--ranks": args.ranks, "--microbatches": args.microbatches, "--chunks": args.chunks, "--group": args.group}
    given = [option for option, value in said.items() if value is not None]
    given += ["--vocab"] * (args.vocab != "ends")
    problems = [Problem(option, f"is what {args.name} says itself; leave it out") for option in given]
    if args.parts < 1:
        problems.append(Problem("--parts", f"must be at least 1, got {args.parts}"))
    if problems:
        raise UserError(*problems)
    try:
        program = read_program(os.path.expanduser(args.name), whole=True)
    except UserError as error:
        raise UserError(*(Problem("NAME", problem.message) for problem in error.problems)) from None
    program = refine(program, (args.parts,) * program.stages)
    given_times = _given_times(args.times_file, args.time, len(program.ranks))
    times = replace(_times(given_times, program), one_engine=args.one_copy_engine)
    if not is_lowered(program):
        program = lower(program, times=times)
    timeline, peaks = simulate(program, times), peak_activations(program)
    plain = None if program.vocab_barriers else max(peaks)
    return SimulatedProgram(args.name, timeline, utilization(timeline), peaks, plain)


def of_run(folder: Path, step: int | None) -> SimulatedProgram:
    """The program of a run, simulated with the median times of one recorded step, and that step.

    Args:
        folder: of the run.
        step: counted from 1; None: the last one of which every rank has a complete record.

    Raises:
        UserError: the record does not hold the step.
    """
    found = read_real_step(folder, step)
    timeline = found.planned
    peaks = peak_activations(timeline.program)
    plain = None if timeline.program.vocab_barriers else max(peaks)
    return SimulatedProgram(str(folder), timeline, utilization(timeline), peaks, plain, found.actual)


def as_json(plan: SimulatedProgram) -> dict[str, Any]:
    """What `--json` prints: times in the unit of those given, activations in microbatches of a rank's whole share."""
    program, use = plan.program, plan.use
    return {
        "schedule": plan.name,
        "ranks": len(program.ranks),
        "microbatches": program.microbatches,
        "chunks": program.chunks,
        "vocab": "balanced" if program.vocab_barriers else "ends",
        "vocab_barriers": program.vocab_barriers,
        "makespan": use.makespan,
        "span": max(use.span),
        "bubble_rate": use.bubble_rate,
        "bubble_rate_makespan": use.bubble_rate_makespan,
        "spans": use.span,
        "work": use.work,
        "idle": use.idle,
        "bubbles": [asdict(bubble) for bubble in bubbles(plan.timeline)],
        "critical_path": [[step.rank, str(step.op), str(step.edge)] for step in critical_path(plan.timeline)],
        "peak_activations": plan.peaks,
        "peak_host_activations": _on_host(program),
        "extra_activations_for_vocab": plan.extra,
        "hash": program.hash,
        "placement": program.placement,
        "ops": [[str(op) for op in ops] for ops in program.ranks],
        **({"actual": asdict(utilization(plan.actual))} if plan.actual is not None else {}),
    }


def _on_host(program: Program) -> tuple[float, ...]:
    """The most activations of each rank that are on the host at once, in microbatches of its whole share."""
    return peak_host_bytes(program, ActivationBytes(activation=(1 / program.chunks,)))


def _summary(plan: SimulatedProgram) -> str:
    program, use = plan.program, plan.use
    barriers = f"{program.vocab_barriers} barrier{'s' if program.vocab_barriers > 1 else ''}"
    vocab = f"vocabulary balanced, {barriers}" if program.vocab_barriers else "vocabulary at the ends"
    causes = bubbles(plan.timeline)
    total = {f.name: sum(getattr(bubble, f.name) for bubble in causes) / len(causes) for f in fields(Bubble)}
    parts = ", ".join(f"{name.replace('_', '-')} {value:.4g}" for name, value in total.items() if value > 1e-9)
    worst = plan.peaks.index(max(plan.peaks))
    extra = f", {plan.extra:+.4g} for the vocabulary" if program.vocab_barriers and plan.extra is not None else ""
    about = f": {SCHEDULES[plan.name].text}" if plan.name in SCHEDULES else ""
    rows = [
        ("schedule", f"{plan.name}, {vocab}{about}"),
        ("program", f"{program.hash}, {sum(map(len, program.ranks)):,} operations, checked"),
        ("longest span", f"{max(use.span):.6g} on rank {use.longest}, of which idle {use.idle[use.longest]:.6g}"),
        ("bubble", f"{use.bubble_rate:.4f} of that span, {use.bubble_rate_makespan:.4f} of the makespan"),
        ("by cause", f"{parts or 'none'} (mean over the ranks)"),
        ("peak", f"{plan.peaks[worst]:.4g} activations on rank {worst}{extra}; lowest {min(plan.peaks):.4g}"),
    ]
    if any(_on_host(program)):
        rows.append(("on the host", f"at most {max(_on_host(program)):.4g} activations of a rank"))
    if plan.actual is not None:
        real = utilization(plan.actual)
        bubble = 1 - real.work[use.longest] / real.makespan  # of the rank of the planned bubble, not of another one
        text = f"{real.makespan:.6g} s, planned {use.makespan:.6g} s; bubble {bubble:.4f} of it on rank {use.longest}"
        rows.append(("real step", text))
    return "\n".join(f"{name:<14}{text}" for name, text in rows)


def _write_files(plan: SimulatedProgram, args: argparse.Namespace) -> None:
    from ...parallel.pipeline import draw

    title = f"{plan.name}, vocabulary balanced" if plan.program.vocab_barriers else plan.name
    unit, drawn = ("s", plan.actual) if plan.actual is not None else ("ms", plan.timeline)
    look: dict[str, Any] = {"title": title, "actual": plan.actual, "unit": "s" if plan.actual is not None else ""}
    writers: list[tuple[str | None, Callable[[Path], object]]] = [
        (args.program, lambda path: path.write_text(plan.program.to_json() + "\n", encoding="utf-8")),
        (args.svg, lambda path: path.write_text(draw.svg(plan.timeline, **look), encoding="utf-8")),
        (args.png, lambda path: draw.png(plan.timeline, path, **look)),
        (args.trace, lambda path: path.write_text(json.dumps(draw.chrome_trace(drawn, unit)), encoding="utf-8")),
    ]
    for name, write in writers:
        if name is None:
            continue
        try:
            write(Path(name).expanduser())
        except OSError as error:
            raise UserError(Problem(name, f"cannot be written: {error.strerror or error}")) from None


def _times(given: Mapping[str, tuple[float, ...]], program: Program) -> Times:
    """Times per stage and rank; those of a rank's whole share are divided among its chunks."""
    values: dict[str, Any] = {}
    for name, per_rank in given.items():
        if name in _PER_STAGE:
            values[_PER_RANK[name]] = by_rank(program.placement, program.chunks, per_rank)
        elif name in _PER_RANK:
            values[_PER_RANK[name]] = per_rank
        else:
            values[_LATENCIES[name]] = per_rank[0]
    return Times(**values)


def _given_times(file: str | None, options: Sequence[str], ranks: int) -> dict[str, tuple[float, ...]]:
    """Every time that was given, and 1 for F, B and W; a tuple of one element holds for all ranks.

    Raises:
        UserError: every problem of the file and of the options.
    """
    found: dict[str, tuple[float, ...]] = {name: (1.0,) for name in ("F", "B", "W")}
    problems: list[Problem] = []
    for name, value in _read(file).items() if file is not None else ():
        _take(found, problems, f"{file}: {name}", name, value, ranks)
    for option in options:
        name, equals, text = option.partition("=")
        if not equals:
            problems.append(Problem("--time", f"expected K=V, for example F=1.5; got {short(option)}"))
            continue
        try:
            value: object = float(text)
        except ValueError:
            value = text
        _take(found, problems, f"--time {name}", name, value, ranks)
    if problems:
        raise UserError(*problems)
    return found


def _take(
    found: dict[str, tuple[float, ...]], problems: list[Problem], key: str, name: str, value: object, ranks: int
) -> None:
    if name not in _NAMES:
        hint = nearest(name.lower(), [n.lower() for n in _NAMES])
        meant = next((n for n in _NAMES if n.lower() == hint), None)
        tail = f"did you mean {meant}?" if meant else f"there are {', '.join(_NAMES)}"
        problems.append(Problem(key, f"no such time; {tail}"))
        return
    values: list[Any] = value if isinstance(value, list) and name in _PER_RANK else [value]
    if values is value and len(values) != ranks:
        problems.append(
            Problem(key, f"has {len(values)} values, but --ranks is {ranks}; give one per rank, or a number")
        )
        return
    wrong = [v for v in values if isinstance(v, bool) or not isinstance(v, (int, float)) or not 0 <= v < math.inf]
    if wrong:
        problems.append(Problem(key, f"must be a number of at least 0, got {short(wrong[0])}"))
        return
    found[name] = tuple(map(float, values))


def _read(file: str) -> Mapping[str, object]:
    path = Path(file).expanduser()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(Problem("--times-file", f"no such file: {file}")) from None
    except OSError as error:
        raise UserError(Problem("--times-file", f"{file} cannot be read: {error.strerror or error}")) from None
    except ValueError as error:
        raise UserError(Problem("--times-file", f"{file} is not JSON: {error}")) from None
    if not isinstance(content, dict):
        raise UserError(Problem("--times-file", f'{file} must hold an object of times, {{"F": [1, 1], …}}'))
    return content
