"""`pentad report RUN…`: runs as one HTML file that opens offline. Imports no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...configs import Problem, UserError

_MOST_RUNS = 8


def report_parser(parser: argparse.ArgumentParser) -> None:
    """Describes the verb's arguments."""
    parser.description = (
        "Write one HTML file that opens offline: loss, throughput, MFU, where the time went, a step planned and real, "
        "stragglers, memory, expert load, events; several runs in the same charts."
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="the runs' folders, or their names in runs/")
    parser.add_argument("--out", metavar="FILE", help="where to write (report.html in the folder of the first run)")
    parser.add_argument("--step", metavar="N", type=int, help="of the first run: the step to draw, from 1 (the last)")
    parser.set_defaults(run=report_runs)


def report_runs(args: argparse.Namespace) -> int:
    """Writes the page and prints where it is.

    Raises:
        UserError: what is wrong with the runs, or where the page should go.
    """
    from ...trainer.metrics.page import write_page

    if len(args.runs) > _MOST_RUNS:
        raise UserError(Problem("RUN", f"a page has at most {_MOST_RUNS} runs, got {len(args.runs)}"))
    folders = [folder_of(name) for name in args.runs]
    out = None if args.out is None else Path(args.out).expanduser()
    try:
        print(write_page(folders, out, step=args.step))
    except OSError as error:
        raise UserError(Problem("--out", f"{out or folders[0]} cannot be written: {error.strerror or error}")) from None
    return 0


def folder_of(run: str) -> Path:
    """The folder of a run, which may be given by its name in runs/.

    Raises:
        UserError: there is none.
    """
    found = next((path for path in (Path(run).expanduser(), Path("runs", run)) if path.is_dir()), None)
    if found is None:
        raise UserError(Problem("RUN", f"there is no folder {run}; give the folder of a run, runs/NAME"))
    return found
