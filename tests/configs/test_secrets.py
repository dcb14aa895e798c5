"""What comes from the environment is used by the run and written nowhere: every output has the interpolation."""

from __future__ import annotations

from pathlib import Path

import pytest

from pentad.configs import UserError, as_dict, given_yaml, hide, load, to_yaml

TINY = ["model.layers=2", "model.hidden=64", "model.heads=4", "model.ffn=128"]
SECRET = "hunter2-tHe-pAsSwOrD"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENTAD_TEST_SECRET", SECRET)
    monkeypatch.setenv("PENTAD_TEST_STEPS", "7")


@pytest.mark.parametrize(
    "overrides",
    [
        ["log.wandb_project=${oc.env:PENTAD_TEST_SECRET}"],
        ["log.wandb_project=a-${oc.env:PENTAD_TEST_SECRET}-b"],
        ["log.wandb_project=${oc.env:PENTAD_TEST_SECRET,default}"],
        ["data.cache=/tmp/${oc.env:PENTAD_TEST_SECRET}", "log.wandb_project=${data.cache}"],
        ["name=${oc.env:PENTAD_TEST_SECRET}"],
        ["runs_dir=/tmp/${oc.env:PENTAD_TEST_SECRET}"],
        ["log.wandb_project=${oc.decode:${oc.env:PENTAD_TEST_SECRET}}"],
        ["name=x", "log.wandb_project=${.../name}${oc.env:PENTAD_TEST_SECRET}"],
        ["train.steps=${oc.env:PENTAD_TEST_STEPS}", "log.wandb_project=${oc.env:PENTAD_TEST_SECRET}"],
    ],
)
def test_outputs_keep_the_interpolation_and_load_to_the_same(overrides: list[str], tmp_path: Path) -> None:
    if "/name" in overrides[-1]:
        overrides = ["name=x", "log.wandb_project=${name}${oc.env:PENTAD_TEST_SECRET}"]
    config = load(None, [*TINY, *overrides])
    assert SECRET in repr(config)  # the run has the value
    for text in (to_yaml(config), given_yaml(None, [*TINY, *overrides]), repr(as_dict(config))):
        assert SECRET not in text and "${" in text
        assert SECRET not in hide(config, f"no such file: /tmp/{SECRET}/x")
    for number, text in enumerate((to_yaml(config), given_yaml(None, [*TINY, *overrides]))):
        (tmp_path / f"{number}.yaml").write_text(text)
        assert load(tmp_path / f"{number}.yaml") == config


def test_numbers_from_outside_stay_as_written() -> None:
    config = load(None, [*TINY, "train.steps=${oc.env:PENTAD_TEST_STEPS}"])
    assert config.train.steps == 7
    assert as_dict(config)["train"]["steps"] == "${oc.env:PENTAD_TEST_STEPS}"


def test_sizes_from_outside_are_values_where_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENTAD_TEST_FAMILY", "qwen2")
    outside = ["model.layers=${oc.env:PENTAD_TEST_STEPS}", "model.family=${oc.env:PENTAD_TEST_FAMILY}"]
    config = load(None, [*TINY, *outside, "data.cache=${oc.env:PENTAD_TEST_SECRET}"])
    tree = as_dict(config, sizes=True)
    assert (tree["model"]["layers"], tree["model"]["family"]) == (7, "qwen2")
    assert tree["data"]["cache"] == "${oc.env:PENTAD_TEST_SECRET}"


def test_values_that_only_refer_to_others_are_shown_as_values() -> None:
    config = load(None, [*TINY, "train.global_batch=4", "train.micro_batch=${train.global_batch}"])
    assert as_dict(config)["train"]["micro_batch"] == 4 and "micro_batch: 4" in to_yaml(config)


@pytest.mark.parametrize(
    "override",
    [
        "data.paths=[/nowhere/${oc.env:PENTAD_TEST_SECRET}/a.txt]",
        "data.paths=/nowhere/${oc.env:PENTAD_TEST_SECRET}/*.txt",
        "data.tokenizer.path=${oc.env:PENTAD_TEST_SECRET}",
        "checkpoint.init=${oc.env:PENTAD_TEST_SECRET}",
        "train.steps=${oc.env:PENTAD_TEST_SECRET}",
        "train.dtype=${oc.env:PENTAD_TEST_SECRET}",
        "optim.name=${oc.env:PENTAD_TEST_SECRET}",
        "model.preset=${oc.env:PENTAD_TEST_SECRET}",
        "hardware.preset=${oc.env:PENTAD_TEST_SECRET}",
        "name=${oc.decode:'{${oc.env:PENTAD_TEST_SECRET}'}",
        "name=${nope:${oc.env:PENTAD_TEST_SECRET}}",
        "name=${oc.env:${oc.env:PENTAD_TEST_SECRET}}",
        "name=${oc.env:PENTAD_TEST_SECRET}/${oc.env:PENTAD_TEST_SECRET}",
        "train=${oc.env:PENTAD_TEST_SECRET}",
    ],
)
def test_messages_do_not_tell_the_value(override: str) -> None:
    with pytest.raises(UserError) as caught:
        load(None, [*TINY, "data.name=text", "data.paths=/nowhere", override])
    assert SECRET not in str(caught.value) and "${" in str(caught.value)


def test_an_escaped_interpolation_is_text() -> None:
    config = load(None, [*TINY, r"log.wandb_project=\${oc.env:PENTAD_TEST_SECRET}"])
    assert config.log.wandb_project == "${oc.env:PENTAD_TEST_SECRET}" and not config.origin.written
