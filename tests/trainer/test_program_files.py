"""Programs from files: they train like one process, and what is wrong with one is a line before any rank starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pentad.configs import UserError, load
from pentad.launch.cli import main
from pentad.parallel.pipeline.lower import lower
from pentad.parallel.pipeline.offload import offload
from pentad.parallel.pipeline.program import Program, update
from pentad.parallel.pipeline.schedules import generate
from pentad.parallel.pipeline.times import Times
from pentad.parallel.pipeline.vocabulary import balanced
from tests.jobs import DENSE
from tests.same_training import check

Content = dict[str, Any]


def depth_first(placement: tuple[int, ...], microbatches: int) -> Content:
    """Any placement: each microbatch through all stages, then back, as plain JSON."""
    stages = range(len(placement))
    forward = [(f"F{i}@{s}", s) for i in range(microbatches) for s in stages]
    backward = [(f"BW{i}@{s}", s) for i in range(microbatches) for s in reversed(stages)]
    ranks = [[token for token, s in forward + backward if placement[s] == rank] for rank in range(max(placement) + 1)]
    return {"microbatches": microbatches, "placement": list(placement), "vocab_barriers": 0, "ranks": ranks}


def _write(folder: Path, content: Content | str) -> str:
    file = folder / "program.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


def _of(program: Program, buckets: int = 0) -> Content:
    content = json.loads(program.to_json())
    for ops in content["ranks"] if buckets else ():
        ops += map(str, update(buckets))
    return content


BALANCED = balanced("1f1b", ranks=2, microbatches=3, barriers=2)
OFFLOADED = offload(
    lower(generate("gis", ranks=2, microbatches=4)), [(0, 0), (1, 1), (2, 3)], Times(offload=(0.1,), reload=(0.1,))
)
TRAINED = {
    "stages in any order": depth_first((0, 1, 1, 0, 1), 3),
    "unequal ranks": depth_first((0, 1, 0), 2),
    "compute of a schedule": _of(generate("zb-v", ranks=2, microbatches=4)),
    "with communication": _of(lower(generate("gis", ranks=2, microbatches=3))),
    "with an update of other buckets": _of(lower(generate("1f1b", ranks=2, microbatches=2)), buckets=2),
    "with copies to the host": _of(OFFLOADED),
    "balanced": _of(BALANCED),
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", TRAINED)
def test_it_trains_like_one_process(name: str, tmp_path: Path) -> None:
    content = TRAINED[name]
    barriers = content["vocab_barriers"]
    pipeline: dict[str, Any] = {"schedule": _write(tmp_path, content)}
    pipeline["chunks"] = max(content["placement"].count(rank) for rank in range(2))
    if barriers:
        pipeline |= {"vocab": "balanced", "vocab_barriers": barriers}
    check(pp=2, dp=2, model={"layers": 5}, pipeline=pipeline, steps=3, global_batch=4 * content["microbatches"])


GOOD = depth_first((0, 1, 0, 1), 4)
JOB = ["parallel.tp=1", "parallel.dp=1", "parallel.pp=2", "train.global_batch=16", "model.layers=4"]


def _changed(**values: Any) -> Content:
    return {**GOOD, **values}


def _ops(change: Callable[[list[list[str]]], object]) -> Content:
    ranks = [list(ops) for ops in GOOD["ranks"]]
    change(ranks)
    return {**GOOD, "ranks": ranks}


def _swap(ops: list[str], one: str, other: str) -> None:
    i, j = ops.index(one), ops.index(other)
    ops[i], ops[j] = other, one


LOWERED = lower(generate("1f1b", ranks=2, microbatches=4))


def _stuck() -> Content:
    """Each rank waits for the other: a backward pass of the last stage stands before a forward pass that it needs."""
    crossed = depth_first((0, 1), 4)
    first, last = crossed["ranks"]
    _swap(first, "F1@0", "BW0@0")
    _swap(last, "BW0@1", "BW3@1")
    return crossed


BROKEN: list[tuple[Content | str, list[str], list[str]]] = [
    ("{", [], ["is no program", "no JSON"]),
    ("[1]", [], ["not an object"]),
    (json.dumps({**GOOD, "microbatches": 4})[:-1] + ', "microbatches": 4}', [], ["'microbatches' is there twice"]),
    ({key: GOOD[key] for key in GOOD if key != "placement"}, [], ["lacks placement"]),
    (_changed(colour="red"), [], ["no key 'colour'", "microbatches, placement"]),
    ({**GOOD, "ops": [], "ranks": 2}, [], ["--program FILE"]),
    (_changed(microbatches="4"), [], ["microbatches is '4'", "not an integer"]),
    (_changed(microbatches=10**15), [], ["1000000000000000 microbatches x 4 stages", "32 operations"]),
    (_changed(placement=[0, 2, 0, 1]), [], ["placement is 2", "between 0 and 1"]),
    (_changed(placement=[]), [], ["no stage"]),
    (_changed(vocab_barriers=3), [], ["vocab_barriers is 3"]),
    (_ops(lambda r: r[0].append("Q0@0")), [], ["'Q' is no kind of operation"]),
    (_ops(lambda r: r[0].append("F0@0; rm")), [], ["'F0@0; rm' is not an operation"]),
    (_ops(lambda r: r[0].append("F0@7")), [], ["F0@7 is at stage 7 of 4"]),
    (_ops(lambda r: r[0].append("F9@0")), [], ["cannot run", "F9@0 does not belong", "4 microbatches"]),
    (_ops(lambda r: r[0].append("RG0")), [], ["cannot run", "AG0 is listed 0 times", "2 more like it"]),
    (_ops(lambda r: r[1].remove("F2@3")), [], ["cannot run", "F2@3 is listed 0 times"]),
    (_ops(lambda r: r[1].append("F2@3")), [], ["cannot run", "F2@3 is listed 2 times"]),
    (
        _ops(lambda r: (r[0].remove("F0@0"), r[1].append("F0@0"))),
        [],
        ["F0@0 is listed 0 times", "1 more like it"],
    ),
    (_ops(lambda r: _swap(r[0], "F0@0", "BW0@0")), [], ["cannot run", "BW0@0 (operation 0) comes before F0@0"]),
    (_stuck(), [], ["cannot run", "waits for"]),
    (_ops(lambda r: r[0].append("SF0@0")), [], ["cannot run", "listed 0 times"]),
    (_of(LOWERED) | {"ranks": [list(ops) for ops in _of(LOWERED)["ranks"]][::-1]}, [], ["cannot run"]),
    (_changed(ranks=[[t for t in ops if t[0] == "F"] for ops in GOOD["ranks"]]), [], ["no backward passes"]),
    (depth_first((1, 1), 4), [], ["no stage on rank 0"]),
    (depth_first((0, 1, 2), 4), [], ["parallel.pp: 2", "has 3 ranks", "parallel.pp=3"]),
    (depth_first((0, 1), 3), [], ["train.global_batch: 16", "4 microbatches", "has 3", "train.global_batch=12"]),
    (GOOD, ["parallel.pipeline.chunks=3"], ["parallel.pipeline.chunks: 3", "2 stages"]),
    (
        _of(OFFLOADED),
        ["memory.offload_activations=auto", "parallel.pipeline.chunks=2"],
        ["memory.offload_activations: auto", "3 offloads of its own", "memory.offload_activations=none"],
    ),
    (GOOD, ["parallel.pipeline.group=2"], ["parallel.pipeline.group: ", "without groups"]),
    (GOOD, ["parallel.pipeline.layers=[1, 3]"], ["parallel.pipeline.layers: ", "2 counts", "4 stages"]),
    (GOOD, ["parallel.pipeline.layers=[1, 1, 1, 3]"], ["sums to 6", "model.layers=4"]),
    (GOOD, ["parallel.pipeline.vocab=balanced"], ["parallel.pipeline.vocab: ", "vocab_barriers 0", "ends"]),
    (_of(balanced("1f1b", ranks=2, microbatches=4)), [], ["parallel.pipeline.vocab: ends", "vocab=balanced"]),
    (
        _of(balanced("1f1b", ranks=2, microbatches=4)),
        ["parallel.pipeline.vocab=balanced", "parallel.pipeline.vocab_barriers=2"],
        ["parallel.pipeline.vocab_barriers: 2", "has 1"],
    ),
]


@pytest.mark.parametrize(("content", "keys", "says"), BROKEN, ids=[" ".join(says)[:60] for *_, says in BROKEN])
def test_a_broken_file_is_one_line_before_any_rank_starts(
    content: Content | str, keys: list[str], says: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _write(tmp_path, content)
    job = [*JOB, *keys, f"parallel.pipeline.schedule={file}", f"runs_dir={tmp_path}"]
    for verb in ("check", "train"):
        assert main([verb, DENSE, *job]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        for words in (*says, file):
            assert words in lines[0] or (words is file and "parallel.pipeline.layers" in lines[0]), lines
    assert not list(tmp_path.glob("*/events.jsonl"))


def test_paths_are_those_of_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, GOOD)
    monkeypatch.setenv("HOME", str(tmp_path))
    pipeline = load(DENSE, [*JOB, "parallel.pipeline.schedule=~/program.json"]).parallel.pipeline
    assert (pipeline.schedule, pipeline.chunks, pipeline.group) == (f"{tmp_path}/program.json", 2, None)
    for file, says in (("~/progran.json", "did you mean .*program.json"), ("~/no/program.json", "there is no folder")):
        with pytest.raises(UserError, match=says) as caught:
            load(DENSE, [*JOB, f"parallel.pipeline.schedule={file}"])
        assert [problem.key for problem in caught.value.problems] == ["parallel.pipeline.schedule"]
    alone = load(DENSE, ["parallel.tp=1", "parallel.dp=1", "parallel.pipeline.schedule=absent.json"])
    assert alone.parallel.pipeline.chunks == 1  # without effect with one rank, like the rest of the section


def test_schedule_draws_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = _write(tmp_path, GOOD)
    assert main(["schedule", file, "--time", "F=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ranks"], found["microbatches"], found["chunks"], found["placement"]) == (2, 4, 2, [0, 1, 0, 1])
    assert any(op.startswith("SF") for op in found["ops"][0]) and found["work"] == [16, 16]
    assert main(["schedule", file, "--ranks", "2", "--vocab", "balanced"]) == 2
    assert [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()] == ["--ranks", "--vocab"]
    assert main(["schedule", _write(tmp_path, _stuck())]) == 2
    assert "waits for" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_resumes_with_the_program_of_another(tmp_path: Path) -> None:
    """A run's program.json, update and all, is a program for another job."""
    sizes = ["train.seq_len=32", "train.micro_batch=2", "train.global_batch=8", "model.hidden=64", "model.ffn=64"]
    sizes += ["model.layers=4", "train.device=cpu", "optim.schedule.warmup_steps=1", f"runs_dir={tmp_path}"]
    layout = ["parallel.tp=1", "parallel.dp=1", "parallel.pp=2", "optim.schedule.name=constant"]
    plain = [DENSE, *layout, *sizes, "train.steps=4"]
    assert main(["train", *plain, "name=whole", "parallel.pipeline.schedule=zb-h1"]) == 0
    program = tmp_path / "mine.json"
    program.write_bytes((tmp_path / "whole" / "program.json").read_bytes())
    mine = [*plain, "name=mine", f"parallel.pipeline.schedule={program}", "checkpoint.every=2"]
    assert main(["train", *mine, "train.steps=2"]) == 0
    assert main(["train", *mine, "checkpoint.resume=latest"]) == 0
    losses = _losses(tmp_path / "mine")
    assert len(losses) == 4 and losses == pytest.approx(_losses(tmp_path / "whole"), rel=1e-6)
    hashes = {json.loads(line).get("program") for line in (tmp_path / "mine" / "events.jsonl").open()} - {None}
    assert hashes == {Program.from_json(program.read_text()).hash}


def _losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()]
