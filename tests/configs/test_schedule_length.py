"""A trial of few steps shortens the schedule of the job that it tries; what contradicts itself is a mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from pentad.configs import UserError, given_yaml, load, to_yaml
from pentad.configs.schema import WsdSchedule

TINY = ["model.layers=2", "model.hidden=64", "model.heads=4", "model.ffn=128"]


def test_a_trial_of_a_preset_job_is_shortened() -> None:
    config = load("demo", ["train.steps=5"])
    assert (config.train.steps, config.optim.schedule.warmup_steps) == (5, 5)
    (note,) = config.origin.notes
    assert note.key == "optim.schedule.warmup_steps"
    assert "15" in note.message and "train.steps=5; taken as 5" in note.message
    assert not load("demo", ["train.steps=15"]).origin.notes


def test_warm_up_and_decay_shrink_together(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("optim: {schedule: {name: wsd, warmup_steps: 300, decay_steps: 900}}\ntrain: {steps: 5000}\n")
    assert load(job, TINY).optim.schedule == WsdSchedule(warmup_steps=300, decay_steps=900)
    for steps, sizes in ((100, (25, 75)), (3, (0, 3)), (1, (0, 1))):
        config = load(job, [*TINY, f"train.steps={steps}"])
        schedule = config.optim.schedule
        assert isinstance(schedule, WsdSchedule) and (schedule.warmup_steps, schedule.decay_steps) == sizes
        assert [n.key for n in config.origin.notes] == ["optim.schedule.warmup_steps", "optim.schedule.decay_steps"]
        for text in (to_yaml(config), given_yaml(job, [*TINY, f"train.steps={steps}"])):
            (tmp_path / "again.yaml").write_text(text)
            again = load(tmp_path / "again.yaml")
            assert again == config and not again.origin.notes


def test_the_default_decay_gives_way_to_the_steps() -> None:
    config = load(None, [*TINY, "optim.schedule.name=wsd", "train.steps=40"])
    assert config.optim.schedule == WsdSchedule(decay_steps=40)
    assert len(config.origin.notes) == 1


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.schedule.warmup_steps=50", "train.steps=40"],
        ["optim.schedule.warmup_steps=2000"],  # the default of train.steps is earlier than what was asked for
        ["optim.schedule.name=wsd", "optim.schedule.decay_steps=50", "train.steps=40"],
    ],
)
def test_a_schedule_beside_a_length_that_it_does_not_fit_is_a_mistake(overrides: list[str]) -> None:
    with pytest.raises(UserError, match=r"optim\.schedule\.(warmup|decay)_steps"):
        load(None, [*TINY, *overrides])


def test_a_later_warm_up_is_a_mistake(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("train: {steps: 40}\n")
    with pytest.raises(UserError, match=r"50 is more than train\.steps=40"):
        load(job, [*TINY, "optim.schedule.warmup_steps=50"])
