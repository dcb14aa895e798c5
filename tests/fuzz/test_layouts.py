"""Seeded cases of the layout fuzzer, and what it finds when a layout trains something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.fuzz import compare
from tests.fuzz.cases import Case, draw_case
from tests.fuzz.compare import Trained, beyond, differences, undetermined, unexplained
from tests.fuzz.corpora import make_corpora
from tests.fuzz.run import Outcome, run_case
from tests.fuzz.tally import Tally, line_of

FAST = [8, 12, 30, 31]
SEEDS = range(40)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    make_corpora(folder / "corpora")
    return folder


def _trains_alike(seed: int, work: Path) -> None:
    case = draw_case(seed, work / "corpora" / "case")
    outcome = run_case(case, work / "case")
    assert outcome.reason is None, f"{outcome.reason}\npython -m tests.fuzz_layouts --seed {seed}"


@pytest.mark.sample(2)
@pytest.mark.distributed
@pytest.mark.parametrize("seed", FAST)
def test_a_random_job_trains_alike_under_random_layouts(seed: int, work: Path) -> None:
    _trains_alike(seed, work)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", SEEDS)
def test_many_random_jobs_train_alike_under_random_layouts(seed: int, work: Path) -> None:
    _trains_alike(seed, work)


def test_a_seed_alone_gives_the_case(work: Path) -> None:
    one, again, other = (draw_case(seed, work / "corpora" / "case") for seed in (5, 5, 6))
    assert (one.yaml(), one.first, one.second, one.origin) == (again.yaml(), again.first, again.second, again.origin)
    assert one.yaml() != other.yaml()


def _trained(loss: float = 2.0, weight: float = 1.0) -> Trained:
    tensors = {"model/head.weight": torch.tensor([weight, 2.0], dtype=torch.float64)}
    return Trained({"loss of step 1": loss, "grad_norm of step 1": 3.0}, {"dropped of step 1": [0.0, None]}, tensors)


@pytest.mark.parametrize(
    "changed",
    [
        lambda: _trained(loss=2.0 * (1 + 1e-10)),
        lambda: _trained(weight=1.0 + 1e-10),
        lambda: _trained(loss=float("nan")),
        lambda: Trained(_trained().curve, {"dropped of step 1": [0.0, 0.0]}, _trained().tensors),
        lambda: Trained({"loss of step 1": 2.0}, _trained().rows, _trained().tensors),
        lambda: Trained(_trained().curve, _trained().rows, {}),
    ],
)
def test_a_difference_beyond_rounding_is_found(changed: Callable[[], Trained]) -> None:
    same = differences(_trained(), _trained(), "fp64", None)
    assert not beyond(same)
    assert unexplained(differences(changed(), _trained(), "fp64", None), [same])


def test_a_difference_that_the_last_place_makes_too_is_explained_up_to_ten_times() -> None:
    for place in (1e-9, 4e-12):  # in itself beyond the tolerance and within it
        nudged = [differences(_trained(2.0 * (1 + place), 1 + place), _trained(), "fp64", None)]
        for factor, left in ((9, 0), (11, 2)):
            mine = _trained(2.0 * (1 + factor * place), 1 + factor * place)
            assert len(unexplained(differences(mine, _trained(), "fp64", None), nudged)) == left


def test_biases_of_keys_are_left_out_only_where_no_score_depends_on_them(work: Path) -> None:
    def names(**changes: object) -> bool:
        keys = {f"model.{key}": value for key, value in changes.items()}
        case = draw_case(5, work / "corpora" / "case", {**_GPT2, **keys})
        free = undetermined(case.alone.config.model)
        return free is not None and bool(free.fullmatch("optim/exp_avg/layers.0.attention.k.bias"))

    assert names(position="learned")
    assert not names(position="rope")
    assert not names(position="learned", sinks=True)
    assert not names(position="learned", qk_norm=True)


_GPT2 = {
    "model.family": "gpt2",
    "model.qkv_bias": True,
    "model.qk_norm": False,
    "model.qk_norm_whole": False,
    "model.sinks": False,
    "model.mla.kv_rank": 0,
    "model.kv_heads": None,
    "model.head_dim": 8,
}


def test_a_tally_goes_on_where_it_stopped_and_counts_the_last_run_of_a_seed(work: Path, tmp_path: Path) -> None:
    case = draw_case(5, work / "corpora" / "case")
    tally = Tally(tmp_path / "tally.jsonl")
    assert tally.next_seed == 0
    tally.add(line_of(case, Outcome("the first run differs", 1.0, 0.0)))
    again = Tally(tmp_path / "tally.jsonl")
    assert again.next_seed == 6
    assert "1 cases, 1 failures" in again.summary() and "seed 5 failed: the first run differs" in again.summary()
    again.add(line_of(case, Outcome(None, 1.0, 0.0)))
    assert "1 cases, 0 failures" in Tally(tmp_path / "tally.jsonl").summary()
    assert case.family in again.summary()


@pytest.mark.distributed
def test_a_layout_that_trains_something_else_fails_its_case(work: Path) -> None:
    case = draw_case(FAST[0], work / "corpora" / "case")
    whole = compare.read_run

    def other(folder: Path, since: int, until: int) -> Trained:
        trained = whole(folder, since, until)
        if folder.parent.name != "first":
            return trained
        curve = {what: value * (1 + 1e-6 * ("norm" in what)) for what, value in trained.curve.items()}
        return Trained(curve, trained.rows, trained.tensors)

    with mock.patch("tests.fuzz.run.read_run", other):
        outcome = run_case(case, work / "case")
    assert outcome.reason is not None and outcome.reason.startswith("the first run differs: grad_norm of step")


def _axes(cases: list[Case]) -> set[str]:
    found = set[str]()
    for case in cases:
        for column, values in line_of(case, Outcome(None, 0.0, 0.0)).of.items():
            found |= {f"{column} {value}" for value in values}
    return found


@pytest.mark.slow
def test_few_cases_meet_what_matters_most(work: Path) -> None:
    met = _axes([draw_case(seed, work / "corpora" / "case") for seed in SEEDS])
    axes = {f"axis {axis}" for axis in ("tp", "pp", "cp", "dp", "ep", "etp")}
    shardings = {f"sharding {name}" for name in ("ddp", "zero1", "zero2", "fsdp", "hsdp", "fsdp2")}
    rest = {"world 8", "stages with empty ones", "evaluation on", "start hf", "start upcycled", "router sinkhorn"}
    assert axes | shardings | rest <= met
