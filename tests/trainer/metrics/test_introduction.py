"""The lines before a run's first step name every kind of parallelism that it uses, and no other."""

from dataclasses import replace

from pentad.configs import load, resolve
from pentad.trainer.data.dataset import Dataset, Split
from pentad.trainer.data.sampler import Sampler, make_pattern
from pentad.trainer.metrics.introduction import introduction
from pentad.trainer.metrics.peak import Peak
from tests.jobs import DENSE


def _lines(job: str, *given: str, apart: str = "") -> list[str]:
    cfg = resolve(load(job, list(given)))
    train = Split((), Sampler((4000,), (40,), make_pattern([1.0]), 0), cfg.train.seq_len, 257, False)
    held = replace(train, sampler=replace(train.sampler, evaluate=True))
    data = Dataset(train, held, None, 11_000_000, 731, "", ("stdlib",))
    return introduction(cfg, data, Peak(0.0361, "measured"), device="cpu", apart=apart)


def test_every_kind_of_parallelism_is_named() -> None:
    assert _lines("demo") == [
        "demo: mixtral, 9.6 M parameters, fp32 on cpu",
        "layout: tp 2 × pp 2 × cp 2 (ring) × dp 1 (zero1) = 8 ranks, 2 microbatches of 4 × 256 tokens each",
        "pipeline: gis, 4 stages of 1, 1, 1, 1 layers, vocabulary balanced",
        "experts: 8, 2 per token, in 4 of 4 layers; etp 1 × ep 4 × edp 1, all_to_all",
        "data: stdlib, 11.0 M tokens",
        "training on 3,960 sequences of 731 documents, 800 drawn: 0.202 epochs",
        "held out: 40 sequences, an evaluation takes 32 of them in 4 steps",
        "peak of a device: 0.0361 TFLOP/s (measured)",
    ]


def test_what_there_is_none_of_has_no_line() -> None:
    assert [line.split(":")[0] for line in _lines(DENSE)] == [
        *("demo", "layout", "data", "training on 3,960 sequences of 731 documents, 1,920 drawn", "held out"),
        "peak of a device",
    ]
    assert "cp" not in _lines(DENSE)[1]


def test_slow_links_are_named_with_the_reason() -> None:
    links = [line for line in _lines(DENSE, apart="they stand on 2 hosts") if line.startswith("links")]
    assert links == ["links: gloo, slower than out of each other's memory: they stand on 2 hosts"]
