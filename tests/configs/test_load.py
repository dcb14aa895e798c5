"""Order of the layers, polymorphic sections, conversions, derived values and the way back to YAML."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pentad.configs import UserError, given_yaml, load, to_yaml
from pentad.configs.reading.interpolation import escape
from pentad.configs.schema import AdamWConfig, BlendData, CosineSchedule, JsonlData, SgdConfig, StdlibData, WsdSchedule

TINY = ["model.layers=2", "model.hidden=64", "model.heads=4", "model.ffn=128"]


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def test_later_layers_win(tmp_path: Path) -> None:
    job = write(
        tmp_path,
        "model: {preset: qwen2.5_0.5b, layers: 3, norm_eps: 0.5}\nhardware: {preset: h100_sxm}\ntrain: {steps: 7}\n",
    )
    config = load(job, ["model.layers=5", "train.seed=9"])
    assert config.model.layers == 5  # overrides before the file
    assert config.model.norm_eps == 0.5  # the file before the preset
    assert config.model.hidden == 896  # the preset before the defaults
    assert config.model.qkv_bias and config.model.rope.theta == 1e6  # the family before the schema
    assert config.model.rope.beta_fast == 32.0  # the schema
    assert (config.train.steps, config.train.seed) == (7, 9)
    assert config.hardware.peak_tflops == 989.5


def test_presets_can_be_chosen_by_override_and_family_defaults_follow(tmp_path: Path) -> None:
    job = write(tmp_path, "model: {preset: llama3_8b}\n")
    assert load(job, ["model.preset=gpt2"]).model.position == "learned"
    custom = load(None, [*TINY, "model.family=gpt2"]).model
    assert (custom.norm, custom.activation, custom.tied, custom.max_positions) == ("layer", "gelu_tanh", True, 512)


@pytest.mark.parametrize(("dtype", "peak"), [("bf16", 989.5), ("fp32", 66.9), ("fp64", 66.9)])
def test_hardware_preset_gives_the_peak_of_the_dtype(dtype: str, peak: float) -> None:
    assert load("demo", ["hardware.preset=h200", f"train.dtype={dtype}"]).hardware.peak_tflops == peak


def test_no_peak_is_taken_for_a_dtype_that_the_hardware_preset_does_not_list() -> None:
    assert load("demo", ["hardware.preset=b200", "train.dtype=fp64"]).hardware.peak_tflops is None


def test_polymorphic_sections_take_the_class_of_their_name(tmp_path: Path) -> None:
    default = load(None, TINY)
    assert type(default.optim) is AdamWConfig
    assert type(default.optim.schedule) is CosineSchedule
    assert type(default.data) is StdlibData

    text = tmp_path / "a.jsonl"
    text.write_text('{"body": "x"}\n')
    job = write(
        tmp_path,
        "optim: {name: sgd, momentum: 0.5, schedule: {name: wsd, decay_steps: 3}}\n"
        f"data: {{name: jsonl, field: body, paths: [{text}]}}\n",
    )
    config = load(job, TINY)
    assert config.optim == SgdConfig(momentum=0.5, schedule=WsdSchedule(decay_steps=3))
    assert isinstance(config.data, JsonlData)
    assert (config.data.field, config.data.paths) == ("body", (str(text),))


def test_choosing_another_class_drops_the_keys_of_the_replaced_one(tmp_path: Path) -> None:
    job = write(tmp_path, "optim: {name: adamw, beta1: 0.8, lr: 0.5, schedule: {name: wsd, decay_steps: 3}}\n")
    config = load(job, [*TINY, "optim.name=sgd", "optim.schedule.name=constant"])
    assert isinstance(config.optim, SgdConfig) and config.optim.lr == 0.5
    with pytest.raises(UserError, match=r"optim\.beta1: is a key of optim\.name=adamw, but optim\.name is sgd"):
        load(None, [*TINY, "optim.name=sgd", "optim.beta1=0.8"])


def test_numbers_and_text_are_taken_as_they_were_meant(tmp_path: Path) -> None:
    job = write(tmp_path, "name: 1e9\nmodel: {layers: 4.0}\ntrain: {steps: 1e3}\nlog: {wandb_project: on}\n")
    config = load(job, ["model.hidden=64", "model.heads=4", "model.ffn=1.28e2", "optim.lr=1", "log.profile=[1e1, 2]"])
    assert (config.model.layers, config.train.steps, config.model.ffn) == (4, 1000, 128)
    assert all(type(v) is int for v in (config.model.layers, config.train.steps, *config.log.profile))
    assert (config.name, config.log.wandb_project) == ("1e9", "on")
    assert type(config.optim.lr) is float


def test_a_single_value_stands_for_a_list_of_one(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("x")
    config = load(None, [*TINY, "data.name=text", f"data.paths={text}"])
    assert getattr(config.data, "paths", None) == (str(text),)


def test_blend_weights_from_the_file_and_the_command_line(tmp_path: Path) -> None:
    for name in ("a.1", "b"):
        for suffix in (".bin", ".idx"):
            (tmp_path / (name + suffix)).touch()
    a, b = tmp_path / "a.1", tmp_path / "b"
    job = write(tmp_path, f"data:\n  name: blend\n  weights:\n    {a}: 1\n    {b}: 2\n")
    config = load(job, [*TINY, "model.vocab=512", f"data.weights={{{b}: 0.5}}"])
    assert isinstance(config.data, BlendData)
    assert config.data.weights == {str(a): 1.0, str(b): 0.5}


def test_interpolation_is_resolved_and_type_checked() -> None:
    config = load(None, [*TINY, "train.global_batch=6", "train.micro_batch=${train.global_batch}"])
    assert config.train.micro_batch == 6


def test_derived_values() -> None:
    config = load(None, [*TINY, "parallel.tp=2", "train.seq_len=96", "train.global_batch=8"], world_size=8)
    assert config.parallel.dp == 4
    assert (config.model.kv_heads, config.model.head_dim, config.model.max_positions) == (4, 16, 96)
    assert config.model.vocab == 320  # 257 byte tokens, padded to a multiple of 64
    assert config.checkpoint.dir == "runs/run/checkpoints"
    assert load(None, [*TINY, "parallel.tp=2"]).parallel.dp == 1
    yarn = load(None, [*TINY, "model.rope.scaling=yarn", "model.rope.factor=4"]).model.rope
    assert yarn.attention_factor == pytest.approx(1.1386294361119891)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], ("1f1b", 1, None)),
        (["chunks=1"], ("1f1b", 1, None)),
        (["chunks=3"], ("gis", 3, 4)),
        (["schedule=gis"], ("gis", 2, 4)),
        (["schedule=gis", "group=3"], ("gis", 2, 3)),
        (["schedule=interleaved", "chunks=4"], ("interleaved", 4, 4)),
        (["schedule=gis", "chunks=1"], ("gis", 1, 4)),
        (["schedule=zb-h2"], ("zb-h2", 1, None)),
        (["schedule=dualpipev"], ("dualpipev", 2, None)),
    ],
)
def test_derived_pipeline(given: list[str], expected: tuple[str, int, int | None]) -> None:
    pipeline = load(None, [*TINY, "parallel.pp=4", *(f"parallel.pipeline.{g}" for g in given)]).parallel.pipeline
    assert (pipeline.schedule, pipeline.chunks, pipeline.group) == expected


def test_layers_of_the_stages_are_auto_or_counts() -> None:
    def layers(*overrides: str) -> object:
        return load(None, [*TINY, "parallel.pp=2", *overrides]).parallel.pipeline.layers

    assert layers() == layers("parallel.pipeline.layers=auto") == "auto"
    assert layers("parallel.pipeline.layers=[0, 2.0]") == (0, 2)
    vee = ["parallel.pipeline.schedule=v-half", "parallel.pipeline.layers=[1, 0, 0, 1]"]
    assert layers(*vee) == (1, 0, 0, 1)


def test_vocabulary_is_that_of_the_tokenizer_file(tmp_path: Path) -> None:
    content = {"model": {"vocab": {"a": 0, "b": 99}}, "added_tokens": [{"id": 130, "content": "</s>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    config = load(None, [*TINY, f"data.tokenizer.path={tmp_path / 'tokenizer.json'}"])
    assert config.model.vocab == 192  # 131 ids, padded to a multiple of 64


def check_round_trip(folder: Path, text: str, expected: object) -> None:
    assert load(write(folder, text)) == expected


def test_resolved_yaml_loads_to_the_same_configuration(tmp_path: Path) -> None:
    for overrides in (
        ["name=1e9", "model.preset=llama3_8b", "hardware.preset=h100_sxm", "optim.lr=1e-5"],
        ["model.preset=mistral_7b", "model.window=null", "optim.name=sgd", "optim.schedule.name=linear"],
        [*TINY, "parallel.pp=2", "parallel.pipeline.chunks=2", "parallel.pipeline.vocab_barriers=2"],
        [*TINY, "parallel.pp=2", "parallel.pipeline.layers=[2, 0]", "memory.recompute=full"],
        [*TINY, "runs_dir='on'", r"log.wandb_project=\${escaped}", "log.profile=[1, 2]"],
    ):
        config = load(None, overrides)
        check_round_trip(tmp_path, to_yaml(config), config)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    project=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])),
    lr=st.floats(0, 1e3),
    seed=st.integers(0, 2**62),
    profile=st.lists(st.integers(1, 1000), max_size=3),
)
def test_round_trip_of_any_value(tmp_path: Path, project: str, lr: float, seed: int, profile: list[int]) -> None:
    quoted = json.dumps(escape(project), ensure_ascii=False)
    overrides = [f"log.wandb_project={quoted}", f"optim.lr={lr}", f"train.seed={seed}", f"log.profile={profile}"]
    config = load(None, [*TINY, *overrides])
    assert config.log.wandb_project == project
    assert (config.optim.lr, config.train.seed, config.log.profile) == (lr, seed, tuple(profile))
    check_round_trip(tmp_path, to_yaml(config), config)


def test_given_yaml_is_the_file_or_its_merge_with_the_overrides(tmp_path: Path) -> None:
    text = "# my job\noptim: {name: adamw, beta1: 0.8}\nmodel: {preset: gpt2}\n"
    job = write(tmp_path, text)
    assert given_yaml(job) == text
    overrides = ["optim.name=sgd", "train.steps=1e2", "name=on"]
    expected = load(job, overrides)
    merged = given_yaml(job, overrides)
    assert "train.steps=1e2" in merged and "hidden" not in merged
    assert load(write(tmp_path, merged)) == expected
    alone = given_yaml(None, [*TINY])
    assert load(write(tmp_path, alone)) == load(None, TINY)


def test_loading_imports_no_torch() -> None:
    code = "import sys, pentad.configs as c; c.load('demo'); c.document(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
