"""The step: its program, its record, when reductions start, what it never does, and bf16 against fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pentad.parallel.pipeline.needs import KINDS, Kinds
from pentad.parallel.pipeline.program import Op, Program, update
from pentad.parallel.record import reader
from pentad.trainer.pipeline.programs import Pipeline, training_program
from tests.distributed import run_distributed
from tests.rows import without_copies
from tests.training import Run, curve, job


def _one_stage(microbatches: int, buckets: int) -> Program:
    cfg = job(global_batch=2 * microbatches)
    return training_program(cfg, Pipeline.of(cfg), microbatches, (buckets,))


def test_the_program_in_text_and_json():
    program = _one_stage(2, 1)
    tokens = ["F0@0", "BW0@0", "F1@0", "BW1@0", "RG0", "NORM", "OPT0", "AG0"]
    assert [str(op) for op in program.ranks[0]] == tokens
    assert program.ranks[0][4:] == update(1)
    assert Program.from_json(program.to_json()) == program
    assert program.hash == _one_stage(2, 1).hash != _one_stage(2, 2).hash
    assert Op.parse("BW13@2") == Op(Kinds.BACKWARD, 13, 2)
    assert Op.parse("RF3@1#4") == Op(Kinds.RECV_FORWARD, 3, 1, 4)
    for wrong in ("Q1", "", "F-1", "F1@", "F1#"):
        with pytest.raises(ValueError):
            Op.parse(wrong)


def _recorded(rank: int, world: int, path: str) -> list[dict]:
    """One step of two microbatches over tp 2 × dp 2, read back from the ring."""
    cfg = job(tp=2, dp=2, sharding="zero1", global_batch=8, micro_batch=2)
    run = Run(rank, cfg, record=Path(path) / f"{rank}.ring")
    run.step(0)
    run.step(1)
    run.parts.replicas.wait_gathers()
    ring = reader.read(Path(path) / f"{rank}.ring")
    rows = [
        {
            "kind": ring.name(e["kind"]),
            "axis": ring.name(e["axis"]),
            "step": int(e["step"]),
            "op": int(e["op"]),
            "seq": int(e["seq"]),
            "bytes": int(e["nbytes"]),
            "closed": bool(e["end"] >= e["start"] > 0),
        }
        for e in without_copies(ring)
    ]
    program = [str(op) for op in run.stepper.ops]
    run.close()
    return [{"program": program}, *rows]


@pytest.mark.distributed
def test_the_record_of_a_step(tmp_path):
    for header, *rows in run_distributed(_recorded, 4, str(tmp_path), group=False):
        program = header["program"]
        second = [r for r in rows if r["step"] == 1]
        spans = [r["kind"] for r in second if r["kind"] in KINDS]
        kinds = [Op.parse(token).kind.token for token in program]
        assert spans == kinds  # the program, in order
        assert all(r["closed"] for r in rows)
        # Four projections and norms a layer: each gathers or scatters the tokens of tp, never fewer, never more.
        forward = [r for r in second if r["axis"] == "tp" and r["op"] == program.index("F0@0")]
        assert sum(r["kind"] == "all_gather" for r in forward) == 2 * 2 + 1  # two per layer, one for the head
        assert sum(r["kind"] == "reduce_scatter" for r in forward) == 2 * 2 + 1  # two per layer, the embedding's
        tokens = 2 * 16 * 32 * 8  # microbatch, sequence, hidden, bytes of fp64
        assert {r["bytes"] for r in forward if r["kind"] == "all_gather"} == {tokens}
        # Gradients are reduced as soon as they are final: in the last backward pass, and not before it.
        reductions = [r["op"] for r in second if r["axis"] == "data" and r["kind"] == "reduce_scatter"]
        last = program.index("BW1@0")
        assert min(reductions) == last
        assert reductions.count(last) >= len(reductions) - 1  # the norms' bucket first sums over tp
        # Every axis counts its collectives without gaps.
        for axis in ("tp", "data"):
            numbers = [r["seq"] for r in rows if r["axis"] == axis]
            assert numbers == list(range(len(numbers)))


@pytest.mark.parametrize("checksums", [False, True])
def test_a_step_never_waits_for_the_device(monkeypatch, checksums: bool):
    run = Run(0, job(dtype="bf16", numerics={"checksums": checksums}))
    run.step(0)

    def forbidden(*_: object) -> None:
        raise AssertionError("a step asked the device for a number")

    batches = run.batches(1)
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy"):
            patch.setattr(torch.Tensor, name, forbidden)
        result = run.stepper.run(1, *batches, 1e-3)
    assert float(result.loss) > 0


@pytest.mark.parametrize("layers", [1, 3])
def test_a_step_writes_few_entries_into_its_record(layers: int):
    """One an operation, and one for each collective and wait inside: nothing for each layer or tensor."""
    run = Run(0, job(model={"layers": layers}))
    run.step(0)
    before = run.mesh.recorder.enter(0)
    run.step(1)
    entries = run.mesh.recorder.enter(0) - before - 1
    assert len(run.stepper.ops) <= entries <= 2 * len(run.stepper.ops)
    run.close()


@pytest.mark.parametrize("steps", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_bf16_follows_fp32(steps: int):
    """bf16 with fp32 masters, states and gradient sums stays within 1 % of fp32's smoothed loss."""
    settings = {"steps": steps, "model": {"hidden": 64, "head_dim": 16, "ffn": 128, "init_std": 0.05}}
    curves = {dtype: [row[0] for row in curve(0, 1, job(dtype=dtype, **settings))] for dtype in ("fp32", "bf16")}
    assert curves["fp32"][-1] < 0.6 * curves["fp32"][0]
    smooth = dict.fromkeys(curves, curves["fp32"][0])
    for step in range(steps):
        for dtype, losses in curves.items():
            smooth[dtype] += 0.1 * (losses[step] - smooth[dtype])
        assert smooth["bf16"] == pytest.approx(smooth["fp32"], rel=0.01)
    assert curves["bf16"] != curves["fp32"]
