"""`pentad checkpoint …`: looks after the checkpoints of runs. Imports no torch but where tensors are written."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...configs import Problem, UserError

if TYPE_CHECKING:
    from ...trainer.checkpoint.listing import ListedCheckpoint
    from ...trainer.checkpoint.verification import Verification

_TITLES = ("step", "saved", "size", "layout", "dtype", "held-out", "state")
_RIGHT = {0, 2, 5}
"""Columns of numbers."""


def checkpoint_parser(parser: argparse.ArgumentParser) -> None:
    """Describes the verb's arguments."""
    parser.description = "Look after the checkpoints of runs."
    verbs = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    listing = verbs.add_parser("list", help="what there is, and which one checkpoint.resume=latest takes")
    listing.add_argument("--verify", action="store_true", help="read every byte of each, too")
    verifying = verbs.add_parser("verify", help="read every byte, and account for every element of every tensor")
    for made, run in ((listing, list_checkpoints), (verifying, verify_checkpoints)):
        made.add_argument(
            "sources", metavar="RUN|FOLDER", nargs="+", help="a run, a folder of checkpoints, or one checkpoint"
        )
        made.add_argument("--json", action="store_true", help="one JSON object a checkpoint, a line each")
        made.set_defaults(run=run)

    resharding = verbs.add_parser("reshard", help="write a checkpoint as other ranks would have written it")
    resharding.add_argument("source", metavar="SOURCE", help="one checkpoint")
    resharding.add_argument("target", metavar="TARGET", help="a new folder")
    resharding.add_argument(
        "--layout",
        metavar="KEY=VALUE,…",
        required=True,
        help="keys of parallel: tp=2,pp=4,dp=2,sharding=zero1,vocab=balanced; any layout loads the files of any",
    )
    resharding.set_defaults(run=reshard_checkpoint)
    averaging = verbs.add_parser("average", help="the mean of checkpoints of one model")
    averaging.add_argument(
        "sources", metavar="SOURCE", nargs="+", help="checkpoints; of a run, or a folder, all of them"
    )
    averaging.add_argument("--out", metavar="TARGET", required=True, help="a new folder")
    averaging.add_argument("--weights", metavar="W,W,…", help="of each source (all alike); divided by their sum")
    averaging.add_argument(
        "--keep-state", action="store_true", help="keep moments and progress of the last one (weights alone)"
    )
    averaging.set_defaults(run=average_checkpoints)


def reshard_checkpoint(args: argparse.Namespace) -> int:
    """Writes a checkpoint as other ranks would have, and prints where.

    Raises:
        UserError: a wrong layout or source, or a target that is there already.
    """
    given = sources([args.source])
    if len(given) > 1:
        raise UserError(Problem(args.source, f"holds {len(given)} checkpoints; name one, such as {given[-1]}"))
    from ...trainer.checkpoint.rewriting.rewrite import reshard

    return _said(args.target, lambda: reshard(given[0], Path(args.target), args.layout, _advance(given)))


def average_checkpoints(args: argparse.Namespace) -> int:
    """Writes the mean of checkpoints, and prints where.

    Raises:
        UserError: sources that do not belong together, wrong weights, or a target that is there already.
    """
    try:
        weights = None if args.weights is None else [float(word) for word in args.weights.split(",")]
    except ValueError:
        raise UserError(Problem("--weights", f"{args.weights} is not a list of numbers, such as 1,2,1")) from None
    given = sources(args.sources)
    from ...trainer.checkpoint.rewriting.rewrite import average

    target, keep, advance = Path(args.out), args.keep_state, _advance(given)
    return _said(args.out, lambda: average(given, target, weights, keep_state=keep, advance=advance))


def _said(target: str, write: Callable[[], int]) -> int:
    from ...trainer.checkpoint.team import CheckpointError

    try:
        print(f"{target}: {_size(write())}")
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _advance(given: Sequence[Path]) -> Callable[[int], object]:
    from ...trainer.metrics.notices import ProgressLine

    nbytes = sum(file.stat().st_size for path in given for file in path.iterdir() if file.is_file())
    return ProgressLine(
        f"reading {len(given)} checkpoints" if len(given) > 1 else f"reading {given[0]}", nbytes
    ).advance


def verify_checkpoints(args: argparse.Namespace) -> int:
    """Prints what is wrong with each checkpoint; 0 where nothing is, 1 otherwise.

    Raises:
        UserError: a source is no checkpoint and holds none.
    """
    bad = 0
    for path in sources(args.sources, nodes=True):
        found = _read_whole(path)
        bad += bool(found.problems)
        if args.json:
            print(json.dumps({"path": str(path), "ok": not found.problems, **dataclasses.asdict(found)}), flush=True)
            continue
        if found.problems:
            print("\n  ".join((f"{path}: damaged", *found.problems)), flush=True)
        else:
            whole = f"{found.tensors} tensors in {found.boxes} boxes, each element once, {_size(found.nbytes)}"
            whole += f"; the part of one of {len(found.hosts)} nodes" if found.hosts else ""
            print(f"{path}: verified, {whole}", flush=True)
        for name in found.strays:
            print(f"  {name} is not part of it (manifest.json does not list it)")
    return 1 if bad else 0


def list_checkpoints(args: argparse.Namespace) -> int:
    """Prints a line for each checkpoint; 0, or 1 where one is damaged.

    Raises:
        UserError: a source is no checkpoint and holds none.
    """
    from ...trainer.checkpoint.listing import latest_of, listed_checkpoint

    found: dict[Path, list[ListedCheckpoint]] = {}
    verified: set[Path] = set()
    for path in sources(args.sources, nodes=True):
        one = listed_checkpoint(path)
        if args.verify and one.problem is None:
            problems = _read_whole(path).problems
            one = dataclasses.replace(one, problem="; ".join(problems) or None)
            verified |= set() if problems else {path}
        found.setdefault(path.parent, []).append(one)
    for directory, ones in found.items():
        latest = latest_of(directory, {one.path for one in ones if one.problem is not None})
        own = any(one.of_node for one in ones)
        if args.json:
            for one in ones:
                more = {"path": str(one.path), "verified": one.path in verified, "latest": one.path == latest}
                print(json.dumps(dataclasses.asdict(one) | more))
            continue
        print(f"{directory}{', of this node' if own else ''}")
        mark = "newest here" if own else "latest"
        rows = [_TITLES, *(_row(one, one.path in verified, mark if one.path == latest else "") for one in ones)]
        print("\n".join(_aligned_lines(rows)))
        if latest is not None and all(one.path != latest for one in ones):
            print(f"  latest: {latest.name}")
    return int(any(one.problem is not None for ones in found.values() for one in ones))


def sources(given: Sequence[str], *, nodes: bool = False) -> list[Path]:
    """The checkpoints that the arguments mean: runs also by their names in runs/.

    Args:
        given: the arguments.
        nodes: of a run those too that this node keeps for itself.

    Raises:
        UserError: for each that means none.
    """
    from ...trainer.checkpoint.listing import checkpoints_on_node, named_checkpoints

    found: list[Path] = []
    problems: list[Problem] = []
    for name in given:
        path = next((p for p in (Path(name).expanduser(), Path("runs", name)) if p.is_dir()), Path(name))
        try:
            found += named_checkpoints(path)
        except UserError as error:
            if not (nodes and checkpoints_on_node(path)):
                problems += error.problems
        found += checkpoints_on_node(path) if nodes else []
    if problems:
        raise UserError(*problems)
    return list(dict.fromkeys(found))


def _read_whole(path: Path) -> Verification:
    from ...trainer.checkpoint.verification import verification

    return verification(path, _advance([path]))


def _row(one: ListedCheckpoint, verified: bool, mark: str) -> tuple[str, ...]:
    state = "verified" if verified else "complete"
    state += "" if one.finite else ", holds NaN or infinite values"
    state = state if one.problem is None else f"damaged: {one.problem}"
    return (
        "-" if one.step is None else str(one.step),
        "-" if one.saved_at is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.saved_at)),
        "-" if one.nbytes is None else _size(one.nbytes),
        one.layout or "-",
        one.dtype or "-",
        "-" if one.held_out is None else f"{one.held_out:.4f}",
        f"{state} ({mark})" if mark else state,
    )


def _aligned_lines(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines: list[str] = []
    for row in rows:
        pairs = enumerate(zip(row, widths, strict=True))
        cells = [cell.rjust(width) if column in _RIGHT else cell.ljust(width) for column, (cell, width) in pairs]
        lines.append("  ".join(["", *cells]).rstrip())
    return lines


def _size(nbytes: int) -> str:
    for factor, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if nbytes >= factor:
            return f"{nbytes / factor:.1f} {unit}"
    return f"{nbytes} B"
