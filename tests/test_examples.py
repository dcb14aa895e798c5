"""The examples do what their page says: its commands are run, as they stand there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
DRIVER = "import sys; from pentad.launch.cli import main; sys.exit(main())"

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples in it."""
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def shown(heading: str) -> tuple[list[str], list[str]]:
    """The commands of a section of the page, and the lines of output that it shows."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    blocks = re.findall(r"```(\w*)\n(.*?)```", section, re.DOTALL)
    commands, output = ("".join(text for kind, text in blocks if kind == wanted) for wanted in ("bash", ""))
    return commands.splitlines(), output.splitlines()


def run(work: Path, command: str) -> str:
    """A command of the page; tokens are cached in the folder of the test."""
    program, verb, *rest = shlex.split(command)
    assert program == "pentad"
    cache = ["data.cache=cache"] if verb in ("train", "check") else []
    arguments = [sys.executable, "-c", DRIVER, verb, *rest, *cache]
    done = subprocess.run(arguments, cwd=work, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(work: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (work / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def same_loss(work: Path, name: str, output: list[str]) -> None:
    """The losses that the page shows are those of the run, but for what another machine's arithmetic rounds."""
    (line,) = [line for line in output if line.startswith(f"runs/{name}:")]
    first, last = map(float, re.findall(r"loss ([\d.]+) → ([\d.]+)", line)[0])
    found = [row["loss"] for row in rows(work, name)]
    assert f": {len(found)} steps" in line
    # The text is the running Python's own, so that another version learns from other text.
    assert found[0] == pytest.approx(first, rel=0.02) and found[-1] == pytest.approx(last, rel=0.2)


def test_a_model(work: Path) -> None:
    (check, train), output = shown("A model of one's own")
    printed = run(work, check)
    for count in re.findall(r"\d+,\d{3}", PAGE.partition("`check` prints")[2].partition("the run ends")[0]):
        assert count in printed, count
    run(work, train)
    same_loss(work, "own-model", output)
    assert all(row["moe"] for row in rows(work, "own-model"))


def test_a_schedule(work: Path) -> None:
    (schedule, by_name, by_file), output = shown("A schedule of one's own")
    printed = run(work, schedule)
    assert [line for line in output[:3] if line not in printed.splitlines()] == []
    other = run(work, schedule.replace("schedule pairs", "schedule 1f1b").partition(" --svg")[0])
    assert "of which idle 7" in other and "2 activations on rank 0" in other
    assert (work / "pairs.svg").read_text().startswith("<svg")
    assert output[3] in run(work, by_name).splitlines()
    same_loss(work, "own-schedule", output)
    run(work, by_file)
    named, filed = ([row["loss"] for row in rows(work, name)] for name in ("own-schedule", "own-program"))
    assert named == filed
    for name in ("own-schedule", "own-program"):
        program = json.loads((work / "runs" / name / "program.json").read_text())
        done = [op.split("@")[0] for op in program["ranks"][1] if re.match(r"F|BW", op)]
        assert done[:8] == ["F0", "F1", "BW0", "BW1", "F2", "F3", "BW2", "BW3"]


def test_a_metric(work: Path) -> None:
    (train,), output = shown("A metric of one's own")
    printed = run(work, train)
    assert output[0].split()[:3] == ["step/total", "loss", "mean"] and output[0] in printed.splitlines()
    found = rows(work, "own-metric")
    top = bottom = 0.0
    for row in found:
        top, bottom = 0.9 * top + 0.1 * row["loss"], 0.9 * bottom + 0.1
        assert row["loss_mean"] == pytest.approx(top / bottom, rel=1e-9)
        assert row["cpu_s"] > 0
    lines = [line.split()[:3] for line in printed.splitlines() if line.split()[:1] == ["10/10"]]
    assert lines == [["10/10", f"{found[9]['loss']:.4f}", f"{found[9]['loss_mean']:.4f}"]]
