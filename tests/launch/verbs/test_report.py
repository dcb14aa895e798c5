"""`pentad report`: the page of a real run and of two, as the run wrote it and as a browser shows it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pentad.launch.cli import main
from pentad.parallel.record.ring import HEADER_BYTES
from tests.browser import browser
from tests.launch.verbs.conftest import STEPS
from tests.pages import read_page

CHARTS = {
    "loss", "grad_norm", "tokens_per_s", "mfu", "step_time_s", "lr", "waterfall-whole", "waterfall", "timeline",
    "stragglers", "memory_gib", "experts", "expert-load", "events",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(small_run: Path) -> Path:
    return small_run


@pytest.fixture(scope="module")
def killed(run: Path) -> Path:
    """The same run as if a rank had been killed in its 31st step, with its last line half written."""
    copy = run.with_name("killed")
    shutil.copytree(run, copy)
    lines = (copy / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_bytes(b"".join(lines[:30]) + lines[30][:50])
    told = {"time": 1.7e9, "event": "verdict", "kind": "killed", "ranks": [1], "line": "rank 1 was killed by SIGKILL"}
    start = (copy / "events.jsonl").read_bytes().splitlines(keepends=True)[0]
    (copy / "events.jsonl").write_bytes(start + json.dumps(told | {"details": ["  rank 0: waited"]}).encode() + b"\n")
    ring = next((copy / "record").glob("rank-00001*"))
    ring.write_bytes(ring.read_bytes()[: HEADER_BYTES + 9000])
    return copy


@pytest.mark.distributed
def test_the_page_that_a_run_leaves(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (found,) = read_page(run / "report.html").content["runs"]
    assert found["x"]["step"] == [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for key, line in found["lines"].items():
        assert line["mean"] == pytest.approx([row[key] for row in rows], rel=1e-5), key
    falls = [row["waterfall"] for row in rows if row["waterfall"]]
    for key, shares in found["waterfall"]["shares"].items():
        assert shares == pytest.approx([fall[key] for fall in falls], rel=1e-5, abs=1e-6), key
    windows = [row["straggler"] for row in rows if row["straggler"] and "slower" in row["straggler"]]
    assert found["stragglers"]["step"] == [window["step"] for window in windows] and len(windows) == 2
    assert found["experts"]["values"][0] == pytest.approx([row["moe"]["load_max"][0] for row in rows], abs=6e-4)
    assert [step for step, _ in found["held_out"]] == [20, 40]
    assert found["drawn_step"] == STEPS and found["facts"]["state"] == "ended"


@pytest.mark.distributed
def test_of_several_runs_and_of_a_chosen_step(
    run: Path, killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "both.html"
    assert main(["report", str(run), str(killed), "--out", str(out), "--step", "40"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    whole, cut = read_page(out).content["runs"]
    assert whole["drawn_step"] == 40 and (cut["drawn_step"], cut["steps"]) == (None, 30)
    assert "cut short" in cut["no_drawing"] and cut["facts"]["state"] == "ended by a fault"
    assert main(["report", str(run), "--out", str(out), "--step", "9999"]) == 2
    assert "--step: step 9999 is not whole in the record" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "RUN: there is no folder" in capsys.readouterr().err
    assert main(["report", str(run), "--out", str(tmp_path / "no" / "page.html")]) == 2
    assert "cannot be written: No such file or directory" in capsys.readouterr().err


def _shown(page: Any) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    script = "[...document.querySelectorAll('[data-chart]')].map(n => [n.dataset.chart, +n.dataset.points])"
    for chart, points in page.value(script):
        found.setdefault(chart, []).append(points)
    return found


@pytest.mark.distributed
def test_in_a_browser(run: Path, killed: Path, tmp_path: Path) -> None:
    both = tmp_path / "both.html"
    assert main(["report", str(run), str(killed), "--out", str(both)]) == 0
    with browser() as page:
        for file, width, dark in (
            (run / "report.html", 1280, False),
            (run / "report.html", 390, True),
            (both, 390, False),
        ):
            page.open(file, width, dark=dark)
            shown = _shown(page)
            assert shown.keys() == CHARTS | ({"verdict"} if file == both else set())
            assert all(points[0] > 0 for points in shown.values()), shown
            assert page.value("document.documentElement.scrollWidth <= innerWidth"), (file, width)
            lines = "[...document.querySelectorAll('path.line')].every(p => p.getBBox().width > 50)"
            assert page.value(lines), (file, width)
            spilt = "[...document.querySelectorAll('.card')].filter(c => c.getBoundingClientRect().right > innerWidth)"
            assert page.value(f"{spilt}.length") == 0
        colour = "[...document.querySelectorAll('.verdict .line')].map(n => [n.textContent, getComputedStyle(n).color])"
        assert page.value(colour) == [["rank 1 was killed by SIGKILL", "rgb(185, 28, 28)"]]
        top, chart = (f"document.querySelector('{each}').getBoundingClientRect().top" for each in (".verdict", ".card"))
        assert page.value(f"{top} < {chart}")
        assert page.value("document.querySelectorAll('svg.chart .mark.verdict').length") > 0
        page.value("document.querySelectorAll('.axis-choice button')[1].click()")
        page.value("document.querySelector('button.run').click()")
        assert _shown(page)["loss"] == [30]  # of the second run alone
        assert page.complaints == []
        assert all(address.startswith("file:") for address in page.requests)
