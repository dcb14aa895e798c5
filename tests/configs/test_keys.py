"""The reference of keys is complete and names every class of the polymorphic sections."""

from __future__ import annotations

import dataclasses

import pytest

from pentad.configs import KeyDoc, UserError, document, render
from pentad.configs.fields import SELECTORS, flatten_schema
from pentad.configs.tables.schedules import SCHEDULES


def test_every_key_has_a_text_a_type_and_a_default() -> None:
    docs = document()
    for doc in docs:
        assert doc.doc.endswith("."), f"{doc.key} is not documented"
        assert all(dataclasses.astuple(doc)[:4]), doc
    documented = {d.key for d in docs}
    for section, (registry, _) in SELECTORS.items():
        for cls in registry.values():
            values, _ = flatten_schema({section: cls})
            assert set(values) <= documented


def test_types_and_defaults() -> None:
    docs = {d.key: d for d in document()}
    assert docs["train.steps"].type == "int" and docs["train.steps"].default == "1000"
    assert docs["model.layers"].default == "required"
    assert docs["model.window"] == KeyDoc(
        "model.window",
        "int | None",
        "null",
        "Sliding attention window in tokens, the query's own included; none: full causal attention.",
        "",
    )
    assert docs["model.tied"].default == "false"
    assert docs["log.profile"].default == "[]"
    assert docs["parallel.pipeline.layers"].default == "auto"
    assert "'dualpipev'" in docs["parallel.pipeline.schedule"].type


def test_names_of_a_table_are_listed_with_what_they_stand_for() -> None:
    (doc,) = document("parallel.pipeline.schedule")
    assert dict(doc.names) == {name: schedule.text for name, schedule in SCHEDULES.items()}
    lines = render([doc]).splitlines()
    assert len(lines) == 2 + len(SCHEDULES) and lines[2].split(maxsplit=1) == ["gpipe", SCHEDULES["gpipe"].text]


def test_polymorphic_sections_list_every_class() -> None:
    docs = document("optim")
    assert {(d.key, d.when) for d in docs} >= {
        ("optim.lr", ""),
        ("optim.beta1", "optim.name=adamw"),
        ("optim.momentum", "optim.name=sgd"),
        ("optim.schedule.decay_steps", "optim.schedule.name=wsd"),
    }
    minimum = {d.when: d.default for d in docs if d.key == "optim.schedule.min_ratio"}
    assert minimum["optim.schedule.name=cosine"] == "0.1" and minimum["optim.schedule.name=wsd"] == "0.0"
    assert [d.key for d in docs].count("optim.lr") == 1
    text = render(docs)
    assert "with optim.name=sgd:" in text and "optim.lr  float  = 0.0003" in text


def test_sections_and_single_keys() -> None:
    assert [d.key for d in document("train.seed")] == ["train.seed"]
    keys = ("every", "steps", "prompts", "prompt_tokens")
    assert {d.key for d in document("eval")} == {f"eval.{key}" for key in keys}
    with pytest.raises(UserError, match=r"traim: no such section or key; did you mean train\?"):
        document("traim")


def test_the_names_of_a_section_are_listed_with_what_they_stand_for() -> None:
    for section, (registry, _) in SELECTORS.items():
        (doc,) = (d for d in document(f"{section}.name") if d.key == f"{section}.name")
        assert [name for name, _ in doc.names] == list(registry) and all(text for _, text in doc.names)
    assert "jsonl    JSON lines, one document a line" in render(document("data.name"))
