"""The command line: `pentad VERB …`. Every import that takes time happens inside the verb that needs it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ..configs import UserError
from ..configs.tables.families import BUILT_IN
from ..configs.tables.imports import OPTION, import_modules
from ..configs.tables.schedules import SCHEDULES
from .mistakes import unknown_arguments, unknown_verb
from .verbs.checkpoint import checkpoint_parser
from .verbs.generate import generate_parser
from .verbs.report import report_parser
from .verbs.slurm import slurm_parser, slurm_run
from .verbs.watch import watch_parser

_OVERRIDES = "config keys to change, e.g. train.steps=100 parallel.tp=2"
_IMPORT = "first import a module, which may bring schedules, families, data sources and metrics of your own; repeated"
_UPCYCLE = {"experts": True, "top_k": True, "granularity": False}
"""Keys of --upcycle, and whether they must be given."""
_DTYPES = ("bf16", "fp16", "fp32", "fp64")


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line like every other mistake: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.replace(', key=value', '')}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
        argv: the arguments; none: the command line's.

    Returns:
        The exit code: 0, 2 for a mistake of the user's (one line per problem on stderr), others as the verb says.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args = _parse(argv)
        args.argv = argv
        if args.run is not _train:  # which lets the ranks of a launcher do it, one of which speaks for all
            import_modules(getattr(args, "imports", ()))
        return args.run(args)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {' '.join(str(problem).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (head, less) has left; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser, verbs = _parser()
    if not argv:
        raise UserError(f"which command? one of {', '.join(verbs)}; see pentad --help")
    if not argv[0].startswith("-") and argv[0] not in verbs:
        raise UserError(unknown_verb(argv[0], verbs))
    args, rest = parser.parse_known_args(argv)
    if rest and hasattr(args, "overrides"):
        # argparse does not look for overrides behind an option.
        args.overrides += [a for a in rest if not a.startswith("-")]
        rest = [a for a in rest if a.startswith("-")]
    if rest:
        raise UserError(unknown_arguments(args.verb, rest, takes_keys=hasattr(args, "overrides")))
    return args


def _parser() -> tuple[argparse.ArgumentParser, list[str]]:
    parser = _Parser(prog="pentad", description="Distributed training of transformers.")
    parser.add_argument("--version", action="version", version=f"pentad {_version()}")
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True, parser_class=_Parser)

    def job(verb: str, text: str, *, optional: bool = False) -> argparse.ArgumentParser:
        made = verbs.add_parser(verb, help=text, description=text)
        made.add_argument("config", metavar="CONFIG", nargs="?" if optional else None, help="a YAML file, or demo")
        made.add_argument("overrides", metavar="key=value", nargs="*", help=_OVERRIDES)
        return made

    train = job("train", "Run a job, on this machine or as a rank of torchrun, srun or mpirun.")
    train.add_argument("--fresh", action="store_true", help="move an earlier run in its folder aside, to NAME.1 …")
    train.set_defaults(run=_train)
    check = job("check", "Validate a job and print its layout, parameters, FLOPs and memory.")
    check.add_argument("--svg", metavar="FILE", help="write the memory of the ranks as a picture")
    check.set_defaults(run=_check)
    show = job("show", "Print the resolved config, or what its keys mean.", optional=True)
    show.add_argument("--keys", metavar="SECTION", nargs="?", const="", help="document every key of a section, or all")
    show.set_defaults(run=_show)
    rehearsal = job("rehearse", "Run a job, make faults happen to it, and say what became of it.")
    what = "kill, stop or hang; node=N: kill; repeated"
    rehearsal.add_argument("--fault", metavar="KIND:rank=R@step=S", action="append", default=[], help=what)
    rehearsal.add_argument("--nodes", metavar="N", type=int, default=1, help="spread over so many, all on this machine")
    rehearsal.add_argument("--json", action="store_true", help="one JSON object at the end")
    rehearsal.set_defaults(run=_rehearse)

    flops = verbs.add_parser("flops", help="Count a model's parameters and FLOPs per token.")
    flops.add_argument("model", metavar="MODEL", help="a preset, or a job's YAML file")
    flops.add_argument("--seq-len", metavar="S", type=int, required=True, help="tokens per sequence")
    flops.add_argument("--json", action="store_true", help="one JSON object")
    flops.set_defaults(run=_flops)

    _schedule_parser(verbs.add_parser("schedule", help="Make, check, simulate and draw the program of a pipeline."))
    _tokenize_parser(verbs.add_parser("tokenize", help="Turn text, JSONL or parquet into PREFIX.bin and PREFIX.idx."))
    import_hf = verbs.add_parser("import-hf", help="Turn a Hugging Face folder into a checkpoint.")
    import_hf.add_argument("directory", metavar="DIR", help="folder with config.json and *.safetensors")
    import_hf.add_argument("out", metavar="OUT", help="the checkpoint's folder")
    import_hf.add_argument(
        "--upcycle",
        metavar="experts=E,top_k=K[,granularity=G]",
        help="make experts of the dense model's feed-forward networks, each 1/G of one (1)",
    )
    import_hf.set_defaults(run=_import_hf)

    export_hf = verbs.add_parser("export-hf", help="Turn a run or a checkpoint into a Hugging Face folder.")
    export_hf.add_argument("source", metavar="RUN|CHECKPOINT", help="a run (its newest checkpoint) or a checkpoint")
    export_hf.add_argument("out", metavar="OUT", help="a new folder")
    export_hf.add_argument("--dtype", choices=_DTYPES, help="type of the written tensors (as in the checkpoint)")
    export_hf.set_defaults(run=_export_hf)
    made = job("slurm", "Write a job's batch script for SLURM, submit it, follow it, end it.")
    slurm_parser(made)
    made.set_defaults(run=slurm_run)
    _observing_parsers(verbs, job)
    checkpoint_parser(verbs.add_parser("checkpoint", help="List, verify, reshard and average checkpoints."))
    generate_parser(verbs.add_parser("generate", help="Text from a run, a checkpoint or a Hugging Face folder."))
    for verb, made in verbs.choices.items():
        if verb != "tokenize":
            made.add_argument(OPTION, metavar="MODULE", action="append", default=[], dest="imports", help=_IMPORT)
    return parser, list(verbs.choices)


def _observing_parsers(verbs: Any, job: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """The commands that say how a job or a machine does."""
    profile = job(
        "profile", "The time of a job's steps, which it runs, or of a run's, by module; held against the roofline."
    )
    profile.add_argument("--json", action="store_true", help="one JSON object")
    profile.set_defaults(run=_profile)

    text = "Try out the matrix products of all ranks and the links between them, and name who falls short."
    probe = verbs.add_parser("probe", help=text, description=text)
    probe.add_argument("--ranks", metavar="N", type=int, help="on this machine (one for each GPU; on a CPU 2)")
    probe.add_argument("--dtype", choices=("bf16", "fp32", "fp64"), help="of the products (bf16; on a CPU fp32)")
    probe.add_argument("--json", action="store_true", help="one JSON object")
    probe.set_defaults(run=_probe)
    text = "Why a job ended or hangs: which rank, in which operation, and what to do about it."
    diagnose = verbs.add_parser("diagnose", help=text, description=text)
    diagnose.add_argument("folder", metavar="RUN", help="the run's folder, or its name in runs/")
    diagnose.add_argument("--json", action="store_true", help="one JSON object")
    diagnose.set_defaults(run=_diagnose)
    report_parser(verbs.add_parser("report", help="Write runs as one page that opens offline: RUN/report.html."))
    watch_parser(verbs.add_parser("watch", help="A live view of a run: what each rank is at, in this terminal."))


def _tokenize_parser(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Turn text, JSON lines or parquet, also compressed, into PREFIX.bin and PREFIX.idx, and say how in "
        "PREFIX.meta.json. With --verify, compare such files with their checksums."
    )
    parser.add_argument(
        "inputs", metavar="INPUT", nargs="+", help="files, folders or glob patterns; of --verify: PREFIX"
    )
    parser.add_argument("--tokenizer", metavar="T", help="byte, or a tokenizer.json or its folder")
    parser.add_argument("--out", metavar="PREFIX", help="where to write, without extension")
    kinds = ("auto", "text", "jsonl", "parquet")
    parser.add_argument(
        "--kind", choices=kinds, default="auto", help="of the files; auto: by suffix, else by content (auto)"
    )
    parser.add_argument("--field", metavar="NAME", default="text", help="key or column of the text (text)")
    parser.add_argument("--eod", metavar="TOKEN", help="end-of-document token of the tokenizer.json")
    parser.add_argument(
        "--workers", metavar="N", type=int, default=1, help="processes (1); what is written is the same"
    )
    parser.add_argument("--verify", action="store_true", help="compare PREFIX.bin and .idx with their checksums")
    parser.set_defaults(run=_tokenize)


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("pentad")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _schedule_parser(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(SCHEDULES)
    parser.description = (
        "Make, check, simulate and draw the program of a pipeline. Times are for one microbatch of one rank's whole "
        "share, in any one unit: a chunk takes 1/chunks of F, B and W, a fused backward pass takes B + W."
    )
    parser.add_argument(
        "name",
        metavar="NAME",
        help=f"{names}; a program's FILE.json; or a run's folder: planned and real",
    )
    parser.add_argument("--ranks", metavar="P", type=int, help="pipeline ranks")
    parser.add_argument("--microbatches", metavar="M", type=int, help="microbatches per step")
    parser.add_argument("--step", metavar="N", type=int, help="of a run: which step, from 1 (the last one recorded)")
    parser.add_argument("--chunks", metavar="V", type=int, help="stages per rank (what the schedule needs, else 2)")
    parser.add_argument("--group", metavar="G", type=int, help="interleaved, gis: microbatches per chunk in turn (P)")
    parser.add_argument(
        "--parts", metavar="N", type=int, default=1, help="part-stages that each stage is refined into (1)"
    )
    parser.add_argument("--vocab", choices=("ends", "balanced"), default="ends", help="where embedding and head run")
    parser.add_argument(
        "--vocab-barriers", metavar="1|2", type=int, default=1, help="balanced: barriers of the head (1)"
    )
    parser.add_argument(
        "--time",
        metavar="K=V",
        action="append",
        default=[],
        help="F, B, W (1), S, T, IF, IB: passes; offload, reload: copies of activations; comm: latency of a hop; "
        "link: a message's time on its link; collective: of the vocabulary's (0); repeated",
    )
    parser.add_argument(
        "--one-copy-engine", action="store_true", help="po-h, po-f: copies to and from the host one at a time"
    )
    parser.add_argument("--times-file", metavar="FILE", help='JSON of times, numbers or one per rank: {"F": [1, 2]}')
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--svg", metavar="FILE", help="write the timeline as a picture")
    parser.add_argument("--png", metavar="FILE", help="write the timeline as a picture")
    parser.add_argument("--trace", metavar="FILE", help="write a trace for chrome://tracing or Perfetto")
    parser.add_argument("--program", metavar="FILE", help="write the program as JSON")
    parser.add_argument("--width", metavar="N", type=int, help="columns of the printed timeline (the terminal's)")
    parser.set_defaults(run=_schedule)


def _train(args: argparse.Namespace) -> int:
    from .supervise.launcher import train

    return train(args.config, args.overrides, fresh=args.fresh, imports=args.imports)


def _rehearse(args: argparse.Namespace) -> int:
    from .verbs.rehearse import rehearse

    return rehearse(args.config, args.overrides, args.fault, nodes=args.nodes, imports=args.imports, as_json=args.json)


def _profile(args: argparse.Namespace) -> int:
    from .verbs.profile import profile

    return profile(args.config, args.overrides, imports=args.imports, as_json=args.json)


def _probe(args: argparse.Namespace) -> int:
    from .verbs.probe import probe_machine

    return probe_machine(args.ranks, args.dtype, as_json=args.json)


def _check(args: argparse.Namespace) -> int:
    from pathlib import Path

    from .verbs.check import check

    check(args.config, args.overrides, None if args.svg is None else Path(args.svg))
    return 0


def _show(args: argparse.Namespace) -> int:
    from ..configs import document, load, render, to_yaml

    if args.keys is not None:
        print(render(document(args.keys or None)))
        return 0
    if args.config is None:
        raise UserError("show needs a CONFIG, or --keys SECTION")
    print(to_yaml(load(args.config, args.overrides)), end="")
    return 0


def _flops(args: argparse.Namespace) -> int:
    from ..models.costs.flops import report

    result = report(args.model, args.seq_len)
    if args.json:
        print(json.dumps(result, indent=2))
        return 0
    from .verbs.tables import print_flops

    print_flops(result)
    return 0


def _schedule(args: argparse.Namespace) -> int:
    from .verbs.schedule import schedule

    return schedule(args)


def _diagnose(args: argparse.Namespace) -> int:
    from .verbs.diagnose import show_diagnosis

    return show_diagnosis(args.folder, as_json=args.json)


def _tokenize(args: argparse.Namespace) -> int:
    from ..trainer.data.tokenize import tokenize, tokenized_lines, verify_tokens

    if args.verify:
        verify_tokens(args.inputs, print)
        return 0
    absent = [f"--{option}" for option in ("tokenizer", "out") if getattr(args, option) is None]
    if absent:
        raise UserError(f"the following arguments are required: {', '.join(absent)}; see pentad tokenize --help")
    kind = None if args.kind == "auto" else args.kind
    done = tokenize(
        args.inputs, args.tokenizer, args.out, field=args.field, eod=args.eod, kind=kind, workers=args.workers
    )
    print("\n".join(tokenized_lines(done)))
    return 0


def _import_hf(args: argparse.Namespace) -> int:
    from ..trainer.checkpoint.hugging_face import Upcycle, import_hf

    upcycle = None if args.upcycle is None else Upcycle(**_numbers("--upcycle", args.upcycle, _UPCYCLE))
    model = import_hf(args.directory, args.out, upcycle)
    experts = f", {model.moe.experts} experts, {model.moe.top_k} per token" if model.moe.experts else ""
    print(f"{args.out}: {model.family}, {model.layers} layers{experts}; start a job with checkpoint.init={args.out}")
    return 0


def _numbers(option: str, text: str, keys: dict[str, bool]) -> dict[str, int]:
    """K=V,K=V with integers from 1 on; `keys` says which must be there."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    wrong = [f"{key}={value}" for key, _, value in pairs if key not in keys or not value.isdecimal() or int(value) < 1]
    absent = [key for key, needed in keys.items() if needed and key not in [pair[0] for pair in pairs]]
    if wrong or absent:
        what = f"cannot use {', '.join(wrong)}" if wrong else f"needs {', '.join(absent)}"
        raise UserError(f"{option}: {what}; for example {option} experts=8,top_k=2,granularity=1")
    return {key: int(value) for key, _, value in pairs}


def _export_hf(args: argparse.Namespace) -> int:
    import torch

    from ..trainer.checkpoint.hugging_face import export_hf

    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
    model = export_hf(args.source, args.out, types[args.dtype] if args.dtype else None)
    loads = "; transformers loads it with AutoModelForCausalLM" if model.family in BUILT_IN else ""
    print(f"{args.out}: {model.family}, {model.layers} layers{loads}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
