"""The console: a line's columns and width, colours, which steps it shows."""

from __future__ import annotations

import io
import math
import random
import re
from typing import Any

import pytest

from pentad.trainer.metrics.formats import duration
from pentad.trainer.metrics.metric import Column, Metric
from pentad.trainer.metrics.readings.progress import Pace
from pentad.trainer.metrics.report import Report
from pentad.trainer.metrics.sinks.console import ConsoleSink, console_header, console_line, fitting, use_color
from tests.trainer.metrics.reports import report


def header(total: int, of: Report | None = None) -> str:
    return console_header(fitting([s.metric for s in (of or report()).shown], total), total)


def line(of: Report, total: int, *, color: bool = False) -> str:
    return console_line(of, fitting([s.metric for s in of.shown], total), total, color=color)


EXTREMES = (
    0.0,
    5e-324,
    1.2345e-7,
    0.012345,
    0.99995,
    9.9999996,
    999.5,
    123456.789,
    9.99e15,
    1.8e308,
    math.inf,
    math.nan,
)
STRAGGLER = {"rank": 123456, "score": 0.01, "host": "a-very-long-node-name", "reason": "compute"}


def test_line_never_exceeds_120_columns() -> None:
    draw = random.Random(0)
    fields = ("loss", "grad_norm", "lr", "tokens_per_s", "tflops_per_device", "memory_gib", "data_pct", "mfu")
    for trial in range(3000):
        total = 10 ** draw.randrange(16)
        values: dict[str, Any] = {field: draw.choice(EXTREMES) for field in fields}
        values |= {"step": draw.randrange(total + 1), "eta_s": draw.choice((None, *EXTREMES))}
        values["step_time_s"] = max(draw.choice(EXTREMES[1:]), 1e-9)
        made = report(straggler=STRAGGLER, skipped=bool(trial % 2), **values)
        assert len(line(made, total)) == len(header(total)) + (5 if trial % 2 else 0) <= 120, line(made, total)
        assert "…" not in line(made, total)


def test_line_has_fixed_columns() -> None:
    assert " ".join(header(1000).split()) == "step/total loss gnorm lr tok/s MFU TFLOP/s mem data% step_s slowest eta"
    found = line(report(eta_s=3725), 1000)
    assert len(found) == len(header(1000))
    assert " ".join(found.split()) == "7/1000 2.5000 1.250 3.00e-04 400 20.00% 20.000 1.50G 5.0 2.000 - 1h02m"
    slow = report(straggler={"rank": 12, "host": "node3", "score": 1 / 1.08, "reason": "compute"})
    assert " r12@node3 +8% " in line(slow, 1000)


def test_what_is_not_known_is_not_zero() -> None:
    assert " n/a " in line(report(mfu=None), 10)
    bad = line(report(loss=math.nan, grad_norm=math.inf, skipped=True), 10)
    assert "nan" in bad and "inf" in bad and bad.endswith("SKIP")


def test_color_only_on_request() -> None:
    plain, colored = line(report(), 1000), line(report(), 1000, color=True)
    assert "\x1b" not in plain and "\x1b[" in colored
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored) == plain
    assert "\x1b[33m  2.5000\x1b" in colored and "\x1b[1;31m     nan\x1b" in line(report(loss=math.nan), 10, color=True)


class _Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert use_color(_Tty(), {}) and not use_color(io.StringIO(), {})
    assert not use_color(_Tty(), {"NO_COLOR": "1"}) and use_color(_Tty(), {"NO_COLOR": ""})
    monkeypatch.setenv("TERM", "xterm")
    for no_color, colored in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", no_color)
        stream = _Tty()
        ConsoleSink(10, stream=stream).log(report())
        assert ("\x1b[" in stream.getvalue()) == colored


def test_which_steps_are_shown() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(10, every=5, stream=stream)
    for step in range(3, 11):
        sink.log(report(step=step, skipped=step == 7, eta_s=61.0))
    sink.close()
    lines = stream.getvalue().splitlines()
    assert lines[0].split()[0] == "step/total" and "\x1b" not in stream.getvalue()
    assert [line.split()[0] for line in lines[1:]] == ["3/10", "5/10", "7/10", "10/10"]
    assert [line.endswith("SKIP") for line in lines[1:]] == [False, False, True, False]
    assert all("1m01s" in line for line in lines[1:])


def _column(title: str, width: int, order: float = 110) -> Metric:
    return Metric(title, "made up", column=Column(title, width, lambda value: f"{value:.3f}", order=order))


def test_own_columns_stand_in_their_order_as_long_as_there_is_room(capsys: pytest.CaptureFixture[str]) -> None:
    # 12 columns of pentad's own take 103 of 120 characters in a job of less than 100,000 steps, SKIP takes 5.
    first, second, narrow = _column("ppl", 6, order=15), _column("wide", 9), _column("c", 3, order=200)
    stream = io.StringIO()
    made = report(extra={first: 12.5, second: 1.0, narrow: 12345.0}, skipped=True)
    ConsoleSink(10, stream=stream).log(made)
    titles, shown = stream.getvalue().splitlines()
    assert titles.split()[:3] == ["step/total", "loss", "ppl"] and titles.split()[-2:] == ["eta", "c"]
    assert shown.split()[2] == "12.500" and len(shown) <= 120
    assert shown.endswith(" 12… SKIP"), "a number that is cut does not look like one"
    assert "'wide'" in capsys.readouterr().err and "wide" not in titles
    assert "ppl" not in header(10**8, made), "the more digits steps have, the less room there is"


def test_own_lines_stand_below() -> None:
    longer = Metric("top", "made up", line=lambda step, value: f"tokens after step {step}: {value}")
    stream = io.StringIO()
    sink = ConsoleSink(10, stream=stream)
    sink.log(report(extra={longer: "the, of"}))
    sink.log(report(extra={longer: None}))
    lines = stream.getvalue().splitlines()
    assert lines[2] == "tokens after step 7: the, of" and len(lines) == 4


def test_eta_leaves_out_the_first_three_steps() -> None:
    pace = Pace(10)
    times = [100.0, 100.0, 100.0, 2.0, 4.0]
    assert [pace.eta_s(i + 1, t) for i, t in enumerate(times)] == [None, None, None, 12.0, 15.0]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.6, "1m00s"), (187, "3m07s"), (7500, "2h05m"), (356400, "4d03h"), (1e7, "115d"), (1e12, ">9999d")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text and len(text) <= 6
