"""What offloads are planned with: the job's keys, or the slowest rank's measurement, the same on all ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pentad.configs import load
from pentad.configs.schema import Config, HardwareConfig
from pentad.launch.cli import main
from pentad.models.costs.times import Rates
from pentad.trainer.memory.copies import copies_of, hidden_share
from pentad.trainer.metrics.peak import Peak
from pentad.trainer.pipeline import rates
from pentad.trainer.pipeline.programs import Pipeline, training_program
from pentad.trainer.pipeline.rates import agreed_rates, copy_rate, product_rate
from tests.distributed import run_distributed
from tests.training import job, open_mesh

CPU = torch.device("cpu")


def _agreed(rank: int, world: int, cfg: Config) -> tuple[Rates, Rates, Rates]:
    rates.copy_rate = lambda device: (3 + rank) * 2**30  # type: ignore[assignment]
    mesh = open_mesh(rank, cfg)
    try:
        given = replace(cfg, hardware=HardwareConfig(peak_tflops=2.0, host_gib_s=5.0))
        half = replace(cfg, hardware=HardwareConfig(host_gib_s=4.0))
        return (
            agreed_rates(cfg, mesh, CPU, Peak(1.0 / (1 + rank), "")),
            agreed_rates(given, mesh, CPU, Peak(1.0, "")),
            agreed_rates(half, mesh, CPU, None),
        )
    finally:
        mesh.close()
        rates.copy_rate = copy_rate


@pytest.mark.distributed
def test_all_ranks_plan_with_the_slowest_ones_rates_or_the_jobs() -> None:
    found = run_distributed(_agreed, 2, job(pp=2), group=False)
    assert found[0] == found[1]
    measured, given, half = found[0]
    # Rounded to quarters of a doubling: 0.5 TFLOP/s and 3 GiB/s are within an eighth of one.
    assert measured.flops == pytest.approx(0.5e12, rel=0.1) and measured.host_bytes == pytest.approx(3 * 2**30, rel=0.1)
    assert (given.flops, given.host_bytes, given.source) == (2e12, 5 * 2**30, "hardware")
    assert half.host_bytes == pytest.approx(4 * 2**30, rel=0.1) and half.flops > 1e6


def test_a_measurement_is_a_speed() -> None:
    assert 1e7 < copy_rate(CPU) < 1e13 and 1e7 < product_rate(CPU, torch.float64) < 1e14


def test_what_is_not_known_is_assumed_and_said() -> None:
    assert Rates.of(HardwareConfig(peak_tflops=312.0, host_gib_s=29.8), "bf16").source == "hardware"
    said = Rates.of(HardwareConfig(peak_tflops=312.0), "bf16")
    assert said.flops == 312e12 and "hardware.host_gib_s assumed" in said.source
    assert "hardware.peak_tflops and hardware.host_gib_s assumed" in Rates.of(HardwareConfig(), "fp64").source


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["hardware.preset=h200"], "59.6 GiB/s each way beside 989.5 TFLOP/s (hardware)"),
        (["hardware.peak_tflops=100"], "(hardware.host_gib_s assumed, an H100's)"),
    ],
)
def test_check_says_what_it_plans_with(
    overrides: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    small = ["model.preset=llama3_8b", "train.seq_len=4096", "train.dtype=bf16", "parallel.pp=4"]
    assert main(["check", "demo", *small, "memory.offload_activations=all", *overrides]) == 0
    assert said in " ".join(capsys.readouterr().out.split())
    for rate, what in ((1000, "all that it keeps can be copied"), (0.01, "not even its input can be copied")):
        link = ["memory.offload_activations=all", "hardware.peak_tflops=400", f"hardware.host_gib_s={rate}"]
        assert main(["check", "demo", *small, *link]) == 0
        assert what in capsys.readouterr().out
    assert main(["check", "demo", *small, *overrides]) == 0
    assert "copies to the host" not in capsys.readouterr().out


def test_longer_sequences_hide_more_of_a_layer() -> None:
    """Compute grows with the square of the length, what is kept with the length."""
    rates, shares = Rates(400e12, 50e9, ""), []
    one = ["model.preset=llama3_8b", "train.micro_batch=1", "train.device=cuda"]
    for length in (8192, 16384, 32768, 65536, 131072, 262144):
        shares.append(hidden_share(load(None, [*one, f"train.seq_len={length}"]), rates))
    assert [each.share for each in shares] == sorted(each.share for each in shares)
    full = load(None, [*one, "train.seq_len=8192", "memory.recompute=full"])
    assert hidden_share(full, rates).bound == "none"  # its inputs alone
    assert shares[0].share < 0.5 and shares[-1].share == 1 and shares[-1].whole == ("input", "attention")


def test_copies_take_bytes_over_the_rate_in_forward_passes() -> None:
    """On a device of one FLOP a second, a unit is as many seconds as it has FLOPs."""
    cfg = job(pp=2, model={"layers": 4}, offload="all", group=1)
    pipeline = Pipeline.of(cfg)
    copies = copies_of(cfg, pipeline, Rates(1.0, 1.0, "", 2.0, 4.0))
    assert len(copies.kept) == 4 and min(copies.kept) > 0
    times = copies.beside(pipeline)
    assert times.offload == times.reload == tuple(each / pipeline.unit for each in copies.kept)
    assert times.store == tuple(each / 2.0 / pipeline.unit for each in copies.kept)
    assert times.fetch == tuple(each / 4.0 / pipeline.unit for each in copies.kept)
    assert replace(times, **dict.fromkeys(("offload", "reload", "store", "fetch"), (0.0,))) == pipeline.times
    # FLOPs of a forward pass of the layers of a rank, one in two ranks.
    tokens, c = cfg.train.micro_batch * cfg.train.seq_len, cfg.model
    assert c.kv_heads is not None and c.head_dim is not None
    matrices = c.hidden * (2 * c.hidden + 2 * c.kv_heads * c.head_dim) + 3 * c.hidden * c.ffn
    attention = 2 * tokens * cfg.train.seq_len * c.hidden
    assert pipeline.unit == pytest.approx(2 * (2 * tokens * matrices + attention), rel=1e-6)
    with pytest.raises(ValueError, match="what its copies take"):
        training_program(cfg, pipeline, 4, [1, 1])
