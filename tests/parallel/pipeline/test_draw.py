"""Pictures say what the timeline says, and a run's record becomes a timeline again."""

from __future__ import annotations

import os
import re
import time
import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from pentad.configs.errors import UserError
from pentad.parallel.pipeline.draw import chrome_trace, png, svg, terminal
from pentad.parallel.pipeline.draw.figures import causes, figures
from pentad.parallel.pipeline.draw.layout import picture, ticks
from pentad.parallel.pipeline.draw.style import INK, Polyline, Rect, on, shade
from pentad.parallel.pipeline.lower import lower
from pentad.parallel.pipeline.needs import KINDS, Kinds
from pentad.parallel.pipeline.offload import offload
from pentad.parallel.pipeline.program import Op, Program, update
from pentad.parallel.pipeline.recorded import WAIT, actual
from pentad.parallel.pipeline.schedules import generate
from pentad.parallel.pipeline.simulate import Timeline, simulate
from pentad.parallel.pipeline.times import Times
from pentad.parallel.pipeline.vocabulary import balanced
from pentad.parallel.record.files import RingFile, collect, write_index
from pentad.parallel.record.reader import read
from pentad.parallel.record.ring import Recorder

SVG = "{http://www.w3.org/2000/svg}"


def _timeline(name: str, ranks: int, microbatches: int, chunks: int = 1, **times: float) -> Timeline:
    forward, backward, weight = ((times.get(kind, 1.0) / chunks,) for kind in ("forward", "backward", "weight"))
    program = generate(name, ranks=ranks, microbatches=microbatches, chunks=chunks)
    return simulate(program, Times(forward=forward, backward=backward, weight=weight, hop=times.get("hop", 0.0)))


def _balanced() -> Timeline:
    times = Times(head=(0.3,), head_grad=(0.2,), embed=(0.05,), embed_grad=(0.05,))
    return simulate(balanced("1f1b", ranks=4, microbatches=8, times=times), times)


def _boxes(text: str) -> dict[str, list[tuple[float, float, float]]]:
    """x, y and width of the boxes of each token of a picture."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for path in ET.fromstring(text).iter(f"{SVG}path"):
        tip = path.find(f"{SVG}title")
        if tip is not None and tip.text:
            x, y, width = map(float, re.match(r"M(\S+) (\S+)h([\d.]+)v", path.attrib["d"]).groups())  # type: ignore[union-attr]
            found.setdefault(tip.text.split()[0], []).append((x, y, width))
    return found


def _words(text: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(text).iter(f"{SVG}text")]


# What the numbers say


@pytest.mark.parametrize("ranks, microbatches", [(2, 4), (4, 8), (4, 2), (1, 3)])
def test_figures_of_1f1b(ranks: int, microbatches: int) -> None:
    timeline = _timeline("1f1b", ranks, microbatches)
    stated = figures(timeline)
    assert stated.end == 3 * (microbatches + ranks - 1)
    assert stated.bubble == pytest.approx((ranks - 1) / (microbatches + ranks - 1))
    assert stated.peak == tuple(min(ranks - rank, microbatches) for rank in range(ranks))
    assert stated.idle[-1] == 0


def test_figures_of_chunks_and_split_backward() -> None:
    stated = figures(_timeline("gis", 4, 8, 2))
    assert stated.peak == (4.0, 3.5, 3.0, 2.5)
    assert (stated.end, stated.bubble) == (27, pytest.approx(3 / 27))


def test_the_curves_of_activations_step_where_the_timeline_does() -> None:
    timeline = _timeline("1f1b", 2, 2)
    drawn = picture(timeline)
    curves = [shape.points for shape in drawn.shapes if isinstance(shape, Polyline) and shape.fill]
    assert len(curves) == 2
    left, right = curves[0][0][0], curves[0][-1][0]
    scale = (right - left) / timeline.makespan
    times = [round((x - left) / scale, 6) for x, _ in curves[0]]
    base = curves[0][0][1]
    unit = base - curves[0][1][1]
    levels = [round((base - y) / unit, 6) for _, y in curves[0]]
    steps = list(dict.fromkeys(zip(times, levels, strict=True)))
    assert steps == [(0, 0), (0, 1), (1, 1), (1, 2), (6, 2), (6, 1), (9, 1), (9, 0)]


def test_an_evaluation_can_be_drawn() -> None:
    program = Program(2, (0,), ((Op(Kinds.FORWARD, 0, 0), Op(Kinds.FORWARD, 1, 0)),))
    timeline = simulate(program, Times())
    assert figures(timeline).peak == (1,)
    assert set(_boxes(svg(timeline))) == {"F0@0", "F1@0"}


def test_a_wait_is_explained_by_what_ended_last() -> None:
    timeline = _timeline("1f1b", 2, 2)
    found = [(str(source.op), str(target.op)) for source, target in causes(timeline, 1e-9)]
    assert found == [("BW0@1", "BW0@0"), ("BW1@1", "BW1@0"), ("F0@0", "F0@1")]


# The picture


@pytest.mark.parametrize(
    "timeline",
    [
        _timeline("1f1b", 4, 8),
        _timeline("gis", 4, 8, 2, forward=1.3, hop=0.1),
        _timeline("v-half", 4, 12, 2),
        _balanced(),
    ],
    ids=["1f1b", "gis", "v-half", "balanced"],
)
def test_every_operation_stands_at_its_time_in_its_lane(timeline: Timeline) -> None:
    found = _boxes(svg(timeline))
    first = timeline.program.ranks[0][0]
    left = min(x for boxes in found.values() for x, _, _ in boxes)
    expected: dict[str, list[tuple[int, float, float]]] = {}
    for rank, (ops, spans) in enumerate(zip(timeline.program.ranks, timeline.spans, strict=True)):
        for op, (start, end) in zip(ops, spans, strict=True):
            if op.kind.computes:
                expected.setdefault(str(op), []).append((rank, start, end))
    assert found.keys() == expected.keys()
    # One scale for all boxes, from the last box to end.
    right = max(x + w for boxes in found.values() for x, _, w in boxes)
    scale = (right - left) / timeline.makespan
    tops = sorted({y for boxes in found.values() for _, y, _ in boxes})
    assert len(tops) == len(timeline.program.ranks) and str(first) in found
    for token, boxes in found.items():
        for (x, y, width), (rank, start, end) in zip(sorted(boxes, key=lambda b: b[1]), expected[token], strict=True):
            assert y == tops[rank]
            assert x == pytest.approx(left + start * scale, abs=1.0)
            assert width == pytest.approx((end - start) * scale, abs=1.1)


def test_the_numbers_of_microbatches_and_totals_are_written() -> None:
    words = _words(svg(_timeline("1f1b", 4, 8), title="One & <two>", unit="ms"))
    assert words[0] == "One & <two>"
    assert "makespan 33 ms" in words[1] and "bubble 27.3%" in words[1] and "peak 4 microbatches" in words[1]
    # Twice on each of four ranks, once per axis tick or table entry of that value.
    assert words.count("7") == 8
    assert {"rank 0", "rank 3", "F forward", "BW backward", "idle", "27.3%", "0.0%"} <= set(words)


def test_planned_stands_above_actual_on_one_axis() -> None:
    plan = _timeline("1f1b", 2, 4)
    real = Timeline(plan.program, tuple(tuple((1.5 * s, 1.5 * e) for s, e in rank) for rank in plan.spans))
    text = svg(plan, actual=real)
    found = _boxes(text)
    (x_plan, y_plan, w_plan), (x_real, y_real, w_real) = sorted(found["BW3@0"], key=lambda box: box[1])
    assert y_plan < y_real < min(y for _, y, _ in found["F0@1"])
    assert w_real == pytest.approx(1.5 * w_plan, abs=1.0)
    left = min(x for boxes in found.values() for x, _, _ in boxes)
    assert x_real - left == pytest.approx(1.5 * (x_plan - left), abs=1.0)
    words = _words(text)
    assert words.count("plan") == words.count("real") == 2
    assert "planned 15  ·  actual 22.5 (+50.0%)" in words[1]


def test_the_stated_bubbles_of_plan_and_step_are_of_one_rank() -> None:
    plan = _timeline("1f1b", 2, 4)  # the longest rank is 0
    # In the real step rank 1 takes longest, because its last pass came late.
    last = plan.spans[1][-1]
    spans = (plan.spans[0], (*plan.spans[1][:-1], (last[0] + 20, last[1] + 20)))
    words = _words(svg(plan, actual=Timeline(plan.program, spans)))
    idle = figures(plan).idle[0]
    assert f"bubble {idle:.1%} → {idle:.1%} on rank 0" in words[1]


def test_the_update_is_drawn_and_not_counted() -> None:
    program = Program(1, (0,), ((Op(Kinds.FORWARD, 0, 0), Op(Kinds.BACKWARD, 0, 0), *update(1)),))
    spans = ((0.0, 1.0), (1.0, 3.0), (3.0, 3.5), (3.5, 3.6), (3.6, 4.0), (4.0, 4.0))
    timeline = Timeline(program, (spans,))
    assert figures(timeline).end == 3.0 and figures(timeline).bubble == 0
    assert "OPT0" in _boxes(svg(timeline)) and "update" in _words(svg(timeline))


def test_colours() -> None:
    hues = [kind.hue for kind in KINDS.values() if kind.hue]
    assert len(set(hues)) == len(hues) == 14
    shades = [shade(Kinds.FORWARD, chunk, 8) for chunk in range(8)]
    assert len(set(shades)) == 8
    assert shade(Kinds.HEAD, 0, 8) == Kinds.HEAD.hue
    for fill in [*hues, *shades]:
        assert _contrast(fill, on(fill)) >= 3.4, fill
    assert on("#ffffff") == INK and on("#000000") == "#ffffff"


def test_copies_are_drawn_while_they_run_under_the_lanes_of_their_ranks() -> None:
    times = Times(offload=(0.25,), reload=(0.25,))
    program = generate("1f1b", ranks=2, microbatches=4)
    done = offload(lower(program, times=times), [(0, 0), (0, 1)], times)
    shapes = picture(simulate(done, times)).shapes
    hues = {Kinds.OFFLOAD.hue, Kinds.RELOAD.hue}
    strips = [each for each in shapes if isinstance(each, Rect) and each.fill in hues and each.h == 3.0]
    lanes = [each for each in shapes if isinstance(each, Rect) and each.fill == Kinds.FORWARD.hue and each.h > 12]
    assert len(strips) == 4 and all(strip.w == pytest.approx(lanes[0].w / 4, rel=0.1) for strip in strips)
    first = [lane for lane in lanes if lane.y == min(each.y for each in lanes)]
    assert all(strip.y > first[0].y + first[0].h for strip in strips)
    assert "OFF to the host" in svg(simulate(done, times)) and "RLD to the device" in svg(simulate(done, times))
    times = replace(times, store=(0.25,), fetch=(0.25,))
    drawn = svg(simulate(offload(lower(program, times=times), [(0, 0), (0, 1)], times, stored=[(0, 1)]), times))
    assert "STO to the disk" in drawn and "GET from the disk" in drawn


def _contrast(a: str, b: str) -> float:
    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(
    "name, ranks, microbatches, chunks", [("1f1b", 2, 4, 1), ("zb-h2", 8, 32, 1), ("gis", 16, 64, 2)]
)
def test_everything_stays_inside_and_the_file_small(name: str, ranks: int, microbatches: int, chunks: int) -> None:
    timeline = _timeline(name, ranks, microbatches, chunks)
    text = svg(timeline)
    assert len(text) < (200_000 if ranks <= 8 else 600_000)
    root = ET.fromstring(text)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    assert 700 < width < 2300 and height < 1200
    drawn = picture(timeline)
    background, *others = [shape for shape in drawn.shapes if isinstance(shape, Rect)]
    # An explicit background: the page behind may be dark.
    assert (background.w, background.h, background.fill) == (drawn.width, drawn.height, "#ffffff")
    assert all(min(r.x, r.y) >= 0 and r.x + r.w <= width and r.y + r.h <= height for r in others)


def test_ticks_are_round() -> None:
    assert ticks(33, 7) == [0, 5, 10, 15, 20, 25, 30]
    assert ticks(0.004, 4) == pytest.approx([0, 0.001, 0.002, 0.003, 0.004])
    assert ticks(20, 10) == pytest.approx(range(0, 21, 2))


def test_png_has_the_size_of_the_svg(tmp_path: Path) -> None:
    timeline = _balanced()
    png(timeline, tmp_path / "picture.png", zoom=1.0, unit="ms")
    data = (tmp_path / "picture.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    root = ET.fromstring(svg(timeline, unit="ms"))
    for at, name in ((16, "width"), (20, "height")):
        assert int.from_bytes(data[at : at + 4], "big") == pytest.approx(float(root.attrib[name]), abs=1)


# Characters


def test_terminal() -> None:
    assert terminal(_timeline("1f1b", 2, 3), width=44).splitlines() == [
        "2 ranks × 3 microbatches   makespan 12   bubble 25.0%   peak 2 microbatches",
        "rank 0  F0 F1 ······B0    F2 B1    ···B2",
        "rank 1  ···F0 B0    F1 B1    F2 B2    ······",
        "        └──────────────┴──────────────┴──────",
        "        0              5              10",
        "        F forward   B backward   · idle",
    ]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_terminal_keeps_its_width_and_colours_say_the_same(width: int) -> None:
    timeline = _timeline("gis", 4, 8, 2)
    plain = terminal(timeline, width).splitlines()
    assert all(len(line) <= width for line in plain[1:5])
    coloured = terminal(timeline, width, colour=True)
    rows = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in coloured.splitlines()[1:5]]
    for row, with_letters in zip(rows, plain[1:5], strict=True):
        assert len(row.rstrip()) <= width
        idle = [column for column, c in enumerate(with_letters) if c == "·"]
        assert idle == [column for column, c in enumerate(row) if c == "·"]
    assert "48;2;47;114;180" in coloured  # the blue of forward passes


# Trace


def test_chrome_trace() -> None:
    timeline = _timeline("1f1b", 2, 2, hop=0.5)
    events = chrome_trace(timeline, unit="s")["traceEvents"]
    slices = {(e["pid"], e["name"]): e for e in events if e["ph"] == "X"}
    assert len(slices) == 8
    assert slices[1, "F0@1"]["ts"] == 1.5e6 and slices[1, "BW1@1"]["dur"] == 2e6
    assert slices[1, "F0@1"]["args"] == {"op": 0, "micro_batch": 0, "stage": 1, "chunk": 0}
    flows = {e["id"]: {} for e in events if e["ph"] == "s"}
    for event in events:
        if event["ph"] in "sf":
            flows[event["id"]][event["ph"]] = event
    # Two forwards down, two gradients up.
    assert len(flows) == 4
    assert sorted((flow["s"]["pid"], flow["f"]["pid"]) for flow in flows.values()) == [(0, 1), (0, 1), (1, 0), (1, 0)]
    for flow in flows.values():
        assert flow["f"]["ts"] - flow["s"]["ts"] >= 0.5e6
    held = [e["args"]["microbatches"] for e in events if e["ph"] == "C" and e["pid"] == 0]
    assert held == [1, 2, 1, 0]


def test_what_runs_beside_never_overlaps_in_a_row() -> None:
    times = Times(head=(0.3,), head_grad=(0.2,), embed=(0.05,), embed_grad=(0.05,), hop=0.4, collective=0.5)
    timeline = simulate(lower(balanced("1f1b", ranks=4, microbatches=8, times=times), times=times), times)
    rows: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in chrome_trace(timeline)["traceEvents"]:
        if event["ph"] == "X":
            rows.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    assert max(row for _, row in rows) > 1
    for spans in rows.values():
        assert all(end <= start + 1e-6 for (_, end), (start, _) in pairwise(sorted(spans)))


def test_chrome_trace_shows_tokens() -> None:
    receiver = (Op(Kinds.RECV_FORWARD, 0, 1, 0), Op(Kinds.FORWARD, 0, 1))
    program = Program(1, (0, 1), ((Op(Kinds.FORWARD, 0, 0), Op(Kinds.SEND_FORWARD, 0, 0)), receiver))
    events = chrome_trace(simulate(program, Times()))["traceEvents"]
    token = next(e for e in events if e["name"] == "SF0@0")
    assert (token["ph"], token["ts"], token["tid"]) == ("i", 1e3, 1)


# The record


def _record(
    path: Path,
    timeline: Timeline,
    rank: int,
    world_rank: int,
    world: int,
    origin: int,
    *,
    step: int = 7,
    waits: int = 0,
) -> Recorder:
    """A ring as the executor writes it: 1 ms per unit of time, every operation begins with `waits` ns of waiting."""
    recorder = Recorder(path, rank=world_rank, world=world, entries=256)
    recorder.step = step - 1
    recorder.exit(recorder.enter(recorder.intern("validation")))
    recorder.step = step
    _play(recorder, timeline, rank, origin, waits)
    return recorder


def _play(recorder: Recorder, timeline: Timeline, rank: int, origin: int, waits: int = 0) -> None:
    for position, (op, (start, end)) in enumerate(zip(timeline.program.ranks[rank], timeline.spans[rank], strict=True)):
        recorder.op, recorder.micro_batch = position, op.index
        first, last = origin + round(start * 1e6), origin + round(end * 1e6)
        ticket = recorder.enter(recorder.intern(op.kind.token))
        if waits:
            recorder.stamp(recorder.enter(recorder.intern(WAIT)), first - waits, first - waits // 2)
            recorder.stamp(recorder.enter(recorder.intern(WAIT)), first - waits // 2, first)
        recorder.stamp(recorder.enter(recorder.intern("all_reduce")), first, last)
        recorder.stamp(ticket, first - waits, last)
    recorder.op = -1


def test_a_recorded_step_is_the_timeline_that_ran(tmp_path: Path) -> None:
    timeline = _timeline("gis", 2, 4, 2, forward=1.2, hop=0.1)
    origin = time.monotonic_ns()
    for rank in range(2):
        _record(tmp_path / f"{rank}", timeline, rank, rank, 2, origin, waits=500)
    read_back = actual(timeline.program, [read(tmp_path / "1"), read(tmp_path / "0")], step=7)
    assert read_back.program is timeline.program
    for rank in range(2):
        for (start, end), (start_ms, end_ms) in zip(read_back.spans[rank], timeline.spans[rank], strict=True):
            assert (start, end) == pytest.approx((start_ms / 1e3, end_ms / 1e3), abs=2e-9)
    assert figures(read_back).bubble == pytest.approx(figures(timeline).bubble, abs=1e-5)


@pytest.fixture
def _rings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pentad.parallel.record.ring.ring_folders", lambda: (tmp_path,))


@pytest.mark.usefixtures("_rings")
def test_a_run_folder_with_replicas_and_an_evaluation(tmp_path: Path) -> None:
    timeline = _timeline("1f1b", 2, 3)
    slow = Timeline(timeline.program, tuple(tuple((2 * s, 2 * e) for s, e in rank) for rank in timeline.spans))
    forwards = Program(3, (0, 1), tuple(tuple(Op(Kinds.FORWARD, i, r) for i in range(3)) for r in range(2)))
    files = []
    for rank in range(2):
        for replica, one in enumerate((timeline, slow)):
            world_rank = 2 * rank + replica
            recorder = _record(tmp_path / f"pentad-run-{world_rank}.ring", one, rank, world_rank, 4, 10**12)
            _play(recorder, simulate(forwards, Times()), rank, 2 * 10**12)
            files.append(RingFile(world_rank, "elsewhere", str(recorder.path), os.getpid()))
    write_index(tmp_path, files)
    collect(tmp_path, files, host="elsewhere", remove=True)
    first, second = (actual(timeline.program, tmp_path, 7, replica=replica) for replica in range(2))
    assert first.makespan == pytest.approx(timeline.makespan / 1e3)
    assert second.makespan == pytest.approx(2 * timeline.makespan / 1e3)
    assert actual(forwards, tmp_path, 7).makespan == pytest.approx(4e-3)
    with pytest.raises(UserError, match="no pipeline 2: 4 ranks make 2 pipelines of 2"):
        actual(timeline.program, tmp_path, 7, replica=2)


@pytest.mark.usefixtures("_rings")
def test_hosts_are_brought_together_by_their_wall_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = _timeline("1f1b", 2, 2)
    files = []
    for rank, boot in enumerate((0, 5 * 10**9)):
        monkeypatch.setattr("pentad.parallel.record.ring._now", lambda boot=boot: 10**9 + boot)
        monkeypatch.setattr("pentad.parallel.record.ring.time.time_ns", lambda: 10**18)
        recorder = _record(tmp_path / f"pentad-run-{rank}.ring", timeline, rank, rank, 2, 10**9 + boot)
        files.append(RingFile(rank, f"host{rank}", str(recorder.path), os.getpid()))
    write_index(tmp_path, files)
    for rank in range(2):
        collect(tmp_path, files, host=f"host{rank}")
    assert actual(timeline.program, tmp_path, 7).makespan == pytest.approx(timeline.makespan / 1e3)


def test_a_record_that_does_not_hold_the_step(tmp_path: Path) -> None:
    timeline = _timeline("1f1b", 2, 2)
    rings = [read(_record(tmp_path / f"{rank}", timeline, rank, rank, 2, 10**12).path) for rank in range(2)]  # type: ignore[arg-type]
    with pytest.raises(UserError, match="step 9 is not in the record of rank 0; it holds steps 7 to 7"):
        actual(timeline.program, rings, 9)
    with pytest.raises(UserError, match="lacks rank 1 of 2"):
        actual(timeline.program, rings[:1], 7)
    with pytest.raises(UserError, match="a pipeline of 4"):
        actual(_timeline("1f1b", 4, 2).program, rings, 7)
    with pytest.raises(UserError, match="3 of 6 operations of the program are in the record"):
        actual(_timeline("1f1b", 2, 3).program, rings, 7)
    unfinished = _record(tmp_path / "open", timeline, 0, 0, 2, 10**12, step=6)
    unfinished.step, unfinished.op = 7, 0
    unfinished.enter(unfinished.intern("F"))
    with pytest.raises(UserError, match="rank 0: 1 of 4 operations"):
        actual(timeline.program, [read(tmp_path / "open"), rings[1]], 7)
