"""`pentad schedule`: what it prints and writes, its figures, and how it answers mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from pentad.launch.cli import main
from pentad.parallel.pipeline.check import check_program
from pentad.parallel.pipeline.program import Op, Program


def _run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, list[str]]:
    code = main(["schedule", *argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()


def _json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    code, out, err = _run(capsys, *argv, "--json")
    assert (code, err) == (0, [])
    return json.loads(out)


def _times(**times: float) -> list[str]:
    return [word for name, value in times.items() for word in ("--time", f"{name}={value}")]


def test_closed_form_of_1f1b(capsys: pytest.CaptureFixture[str]) -> None:
    p, m, f, b, w = 4, 8, 2.0, 3.0, 1.0
    found = _json(capsys, "1f1b", "--ranks", "4", "--microbatches", "8", *_times(F=f, B=b, W=w))
    bubble, work = (p - 1) * (f + b + w), m * (f + b + w)
    assert (found["ranks"], found["microbatches"], found["chunks"]) == (p, m, 1)
    assert found["makespan"] == found["span"] == work + bubble
    assert found["bubble_rate"] == found["bubble_rate_makespan"] == pytest.approx(bubble / (work + bubble))
    assert found["idle"] == [bubble - r * (f + b + w) for r in range(p)]
    assert found["peak_activations"] == [4, 3, 2, 1]
    assert found["extra_activations_for_vocab"] == 0
    ops = [[Op.parse(token) for token in rank] for rank in found["ops"]]
    assert [sum(op.kind.token == "F" for op in rank) for rank in ops] == [m] * p
    # Without latency nothing but computation is on the way from the first start to the last end.
    lengths = {"F": f, "BW": b + w}
    path = [Op.parse(token).kind.token for _, token, _ in found["critical_path"]]
    assert sum(lengths.get(kind, 0.0) for kind in path) == found["makespan"]
    # Rank 0 neither receives forward nor sends backward.
    assert {op.kind.token for op in ops[0]} == {"F", "BW", "SF", "RB"}


def test_published_bubble_rate(capsys: pytest.CaptureFixture[str]) -> None:
    # Zero Bubble, Tables 5 and 9: 14.6B, 48 microbatches.
    times = _times(F=11.347, B=11.248, W=8.132, comm=0.377)
    for name, rate in (("1f1b", 0.2552), ("zb-h1", 0.1397), ("zb-h2", 0.0672)):
        found = _json(capsys, name, "--ranks", "16", "--microbatches", "48", *times)
        assert round(found["bubble_rate"], 4) == rate


def test_a_chunk_takes_its_part_of_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    size = ("--ranks", "4", "--microbatches", "8")
    found = _json(capsys, "interleaved", *size, "--chunks", "2", *_times(F=1, B=1, W=1))
    assert found["work"] == [24.0] * 4
    assert found["makespan"] == 24 + 3 * 3 / 2
    assert found["peak_activations"][0] == (4 + 2 * 3 + 1) / 2


@pytest.mark.parametrize(("barriers", "extra"), [("1", 1), ("2", 2)])
def test_balanced_vocabulary(capsys: pytest.CaptureFixture[str], barriers: str, extra: int) -> None:
    size, times = ("--ranks", "4", "--microbatches", "12"), _times(F=1, B=1, W=1, S=0.25, T=0.25)
    plain = _json(capsys, "1f1b", *size, *times)
    found = _json(capsys, "1f1b", *size, *times, "--vocab", "balanced", "--vocab-barriers", barriers)
    assert found["extra_activations_for_vocab"] == extra
    assert found["peak_activations"][0] == plain["peak_activations"][0] + extra
    assert found["work"] == [w + 12 * 0.5 for w in plain["work"]]
    assert found["vocab_barriers"] == int(barriers)
    assert {"S3", "T3", "IF3", "IB3", "CX3", "CS3"} <= set(found["ops"][2])
    assert ("CD3" in found["ops"][2]) == (barriers == "2")


def test_times_of_a_file_differ_between_ranks_and_options_win(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "times.json"
    file.write_text(json.dumps({"F": [1, 2], "B": 5, "W": [0, 0], "S": [1, 3], "comm": 0.5, "collective": 0}))
    size = ("--ranks", "2", "--microbatches", "3", "--times-file", str(file), "--time", "B=4", "--time", "T=0.5")
    assert _json(capsys, "1f1b", *size)["work"] == [3 * (1 + 4), 3 * (2 + 4)]
    balanced = _json(capsys, "1f1b", *size, "--vocab", "balanced")
    assert balanced["work"] == [3 * (1 + 4 + 1 + 0.5), 3 * (2 + 4 + 3 + 0.5)]
    # With two chunks a rank's time is shared by its stages, wherever these are.
    for name in ("gis", "v-half"):
        assert _json(capsys, name, *size)["work"] == pytest.approx([3 * (1 + 4), 3 * (2 + 4)])
    assert _json(capsys, "1f1b", *size)["makespan"] > _json(capsys, "1f1b", *size, "--time", "comm=0")["makespan"]


def test_files_and_summary(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    svg, png, trace, program = (tmp_path / name for name in ("a.svg", "a.png", "a.trace", "a.json"))
    files = ("--svg", str(svg), "--png", str(png), "--trace", str(trace), "--program", str(program))
    code, out, err = _run(capsys, "gis", "--ranks", "4", "--microbatches", "5", "--width", "80", *files)
    assert (code, err) == (0, [])
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert any(event["name"] == "F4@7" for event in json.loads(trace.read_text())["traceEvents"])
    read = Program.from_json(program.read_text())
    check_program(read)
    assert read.hash in out and len(read.ranks) == 4 and read.microbatches == 5
    assert "interleaved with split backward" in out
    rows = [line for line in out.splitlines() if line.startswith("rank ")]
    assert len(rows) == 4 and all(len(row) <= 80 for row in rows)


def test_one_rank_and_one_microbatch(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("gpipe", "1f1b", "gis", "zb-h2", "zb-v", "dualpipev"):
        found = _json(capsys, name, "--ranks", "1", "--microbatches", "1")
        assert found["makespan"] == 3 and found["idle"] == [0]
    assert _json(capsys, "1f1b", "--ranks", "4", "--microbatches", "1")["makespan"] == 12


_SIZE = ("--ranks", "4", "--microbatches", "8")
_MISTAKES: list[tuple[tuple[str, ...], list[str]]] = [
    (("1f1", *_SIZE), ["NAME: ", "'1f1'", "did you mean 1f1b?"]),
    (("1f1b", "--ranks", "4"), ["--microbatches"]),
    (("1f1b", "--ranks", "0", "--microbatches", "8"), ["--ranks: ", "at least 1", "0"]),
    (("1f1b", "--ranks", "four", "--microbatches", "8"), ["--ranks", "four"]),
    (("1f1b", "--ranks", "4", "--microbatches", "-1"), ["--microbatches: ", "at least 1", "-1"]),
    (("1f1b", *_SIZE, "--chunks", "2"), ["--chunks: ", "1", "2"]),
    (("gis", *_SIZE, "--chunks", "0"), ["--chunks: ", "0"]),
    (("gis", *_SIZE, "--group", "1"), ["--group: ", "1", "2 to 4"]),
    (("interleaved", *_SIZE, "--group", "3"), ["--group: ", "3", "at least 4"]),
    (("1f1b", *_SIZE, "--group", "4"), ["--group: ", "1f1b", "4"]),
    (("zb-h1", *_SIZE, "--vocab", "balanced"), ["--vocab: ", "zb-h1", "1f1b"]),
    (("1f1b", *_SIZE, "--vocab", "both"), ["--vocab", "both", "balanced"]),
    (("1f1b", *_SIZE, "--vocab", "balanced", "--vocab-barriers", "3"), ["--vocab-barriers: ", "3", "1 or 2"]),
    (("1f1b", *_SIZE, "--time", "F"), ["--time: ", "K=V", "'F'"]),
    (("1f1b", *_SIZE, "--time", "f=1"), ["--time f: ", "did you mean F?"]),
    (("1f1b", *_SIZE, "--time", "F=soon"), ["--time F: ", "number", "soon"]),
    (("1f1b", *_SIZE, "--time", "W=-1"), ["--time W: ", "at least 0", "-1"]),
    (("1f1b", *_SIZE, "--time", "comm=inf"), ["--time comm: ", "inf"]),
    (("1f1b", *_SIZE, "--times-file", "/no/times.json"), ["--times-file: ", "no such file", "/no/times.json"]),
    (("1f1b", *_SIZE, "--times-file", "{tmp}/bad.json"), ["--times-file: ", "not JSON"]),
    (("1f1b", *_SIZE, "--times-file", "{tmp}/list.json"), ["--times-file: ", "object"]),
    (("1f1b", *_SIZE, "--times-file", "{tmp}/short.json"), ["F", "2 values", "--ranks is 4"]),
    (("1f1b", *_SIZE, "--times-file", "{tmp}/scalar.json"), ["comm", "number", "[1]"]),
    (("1f1b", *_SIZE, "--svg", "{tmp}/no/a.svg"), ["/no/a.svg: ", "cannot be written"]),
    (("1f1b", *_SIZE, "--program", "{tmp}"), ["cannot be written"]),
    (("1f1b", *_SIZE, "--width", "0"), ["--width: ", "at least 1"]),
    (("1f1b", *_SIZE, "--colour"), ["unknown argument --colour"]),
]


@pytest.mark.parametrize(("argv", "fragments"), _MISTAKES, ids=[" ".join(m[0]) for m in _MISTAKES])
def test_a_mistake_is_one_line(
    argv: tuple[str, ...], fragments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "short.json").write_text('{"F": [1, 2]}')
    (tmp_path / "scalar.json").write_text('{"comm": [1]}')
    code, out, err = _run(capsys, *(word.replace("{tmp}", str(tmp_path)) for word in argv))
    assert (code, out, len(err)) == (2, "", 1), err
    assert err[0].startswith("error: ")
    for fragment in fragments:
        assert fragment in err[0]


def test_all_mistakes_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = _run(capsys, "1f1b", *_SIZE, *("--time", "f=1", "--time", "B=x", "--time", "S=-1"))
    assert code == 2
    assert [line.split(": ")[1] for line in err] == ["--time f", "--time B", "--time S"]


def test_it_starts_without_torch() -> None:
    code = (
        "import sys; from pentad.launch.cli import main;"
        "done = main('schedule gis --ranks 4 --microbatches 4 --vocab balanced'.split());"
        "sys.exit(done or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
