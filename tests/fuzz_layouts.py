"""Random jobs under random layouts, held against one process: `python -m tests.fuzz_layouts --help`.

Every case trains a random model on one process and under two random layouts: the first from the start, the second from
a checkpoint of the first. Everything is compared: losses, gradient norms, held-out losses, what the routers did,
parameters, optimizer states. What `check` accepts has to run, and to train the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from omegaconf import OmegaConf

from tests.distributed import close_pool
from tests.fuzz.cases import Case, draw_case
from tests.fuzz.corpora import make_corpora
from tests.fuzz.run import run_case
from tests.fuzz.tally import Tally, line_of

RENEW_AFTER = 50
"""Cases after which new worker processes are started: torch keeps every fsdp job's process groups and threads."""


def main(argv: list[str] | None = None) -> int:
    """0: every case trained the same under its layouts."""
    args = _arguments(argv)
    if args.summary:
        print(Tally(args.tally).summary())
        return 0
    work = Path(tempfile.mkdtemp(prefix="pentad-fuzz-"))
    try:
        make_corpora(work / "corpora")
        failures = _repeat(args, work) if args.seed is not None else _go_on(args, work)
    finally:
        close_pool()
        if args.keep:
            print(f"files are in {work}")
        else:
            shutil.rmtree(work, ignore_errors=True)
    return min(failures, 1)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_layouts", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to run new cases")
    parser.add_argument("--cases", type=int, help="how many at most")
    parser.add_argument("--seed", type=int, help="repeat one case and print it")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="with --seed: keys of the job to change"
    )
    parser.add_argument("--tally", type=Path, default=Path("runs/fuzz/tally.jsonl"), help="goes on where it stopped")
    parser.add_argument("--again", action="store_true", help="run the tally's failures again first")
    parser.add_argument("--summary", action="store_true", help="only print what the tally holds")
    parser.add_argument("--keep", action="store_true", help="keep the files of the runs")
    return parser.parse_args(argv)


def _repeat(args: argparse.Namespace, work: Path) -> int:
    changes = {
        text.partition("=")[0]: OmegaConf.from_dotlist([f"value={text.partition('=')[2]}"]).value for text in args.set
    }
    case = draw_case(args.seed, work / "corpora" / "case", changes)
    print(_shown(case), flush=True)
    outcome = run_case(case, work / "case")
    print(f"seed {args.seed}: {outcome.reason or 'passed'} in {outcome.seconds:.1f} s, rounding {outcome.rounding:.1e}")
    return int(outcome.reason is not None)


def _shown(case: Case) -> str:
    lines = [case.yaml()]
    for name, layout in (("first", case.first), ("second", case.second)):
        lines.append(f"{name}: {layout.world} ranks, {' '.join(layout.overrides())}")
    how = "a checkpoint" if case.stopped_rank is None else f"a signal to rank {case.stopped_rank}"
    return "\n".join([*lines, f"the second goes on after {how} in step {case.resume}; first weights: {case.start}"])


def _go_on(args: argparse.Namespace, work: Path) -> int:
    tally, until, failures, count = Tally(args.tally), time.monotonic() + 60 * args.minutes, 0, 0
    again = sorted({line.seed: line for line in tally.lines if line.reason is not None}) if args.again else []
    while time.monotonic() < until and count != args.cases:
        seed = again.pop(0) if again else tally.next_seed
        case = draw_case(seed, work / "corpora" / "case")
        outcome = run_case(case, work / "case")
        tally.add(line_of(case, outcome))
        count += 1
        if count % RENEW_AFTER == 0:
            close_pool()
        if outcome.reason is not None:
            failures += 1
            print(f"seed {seed} failed: {'  '.join(outcome.reason.splitlines()[-4:])}", file=sys.stderr, flush=True)
        elif count % 10 == 0:
            print(json.dumps({"cases": count, "seed": seed, "failures": failures}), flush=True)
    print(tally.summary())
    return failures


if __name__ == "__main__":
    sys.exit(main())
