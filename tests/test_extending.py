"""Each recipe of docs/extending.md, followed: its code is taken from the page, and what it adds is used."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from pentad.configs import Config, UserError, document, load, preset_names, render, to_yaml
from pentad.configs.fields import add_class
from pentad.configs.schema_data import DATASETS
from pentad.configs.tables import imports
from pentad.configs.tables.context_methods import CONTEXT_METHODS, ContextMethod
from pentad.parallel.context.make import register
from pentad.trainer.data.documents import READERS, read_documents
from pentad.trainer.data.preflight import data_problems
from pentad.trainer.data.sources import register as register_source
from tests import same_training
from tests.trainer.checkpoint.test_resume import text_job
from tests.trainer.metrics.test_reporting import _train as train_job

ROOT = Path(__file__).parents[1]
ROOMS = ("configs", "parallel", "models", "trainer", "launch")
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def blocks(language: str, heading: str) -> list[str]:
    """The code of a section of the page."""
    (section,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def module(heading: str, name: str, folder: Path) -> ModuleType:
    """The module that a section shows, as a file of no package; imported once in a process."""
    (code,) = blocks("python", heading)
    if name not in sys.modules:
        file = folder / f"{name}.py"
        file.write_text(code, encoding="utf-8")
        return imports._import_file(file)
    return sys.modules[name]


def test_the_table_names_what_is_there() -> None:
    """Paths exist, and every section of the page is a row."""
    table = PAGE.partition("Every recipe")[0]
    paths = [p for p in re.findall(r"`((?:configs|parallel|models|trainer|launch)/[\w./*]*)`", PAGE)]
    assert len(paths) > 30 and [p for p in paths if "NAME" not in p and not list(ROOT.glob(p))] == []
    assert [p for p in re.findall(r"`(tests/[\w./]+)`", PAGE) if not (ROOT / p).exists()] == []
    headings = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    anchors = set(re.findall(r"\]\(#([\w-]+)\)", table))
    assert {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings if "import" not in h} == anchors


# A method of context parallelism --------------------------------------------------------------------------------


def _train_counted(rank: int, world: int, cfg: Config, masked: bool, folder: Path) -> same_training.Trained:
    """A rank that has imported the module with the method."""
    counted = module("A method of context parallelism", "own_context_method", folder / str(rank)).Counted
    before = counted.calls
    trained = same_training.train(rank, world, cfg, masked)
    assert counted.calls - before == cfg.model.layers * cfg.train.steps * 4 // (cfg.parallel.dp or 1)
    return trained


class _Counting:
    """`_train_counted` in a folder; picklable."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, rank: int, world: int, cfg: Config, masked: bool) -> same_training.Trained:
        (self.folder / str(rank)).mkdir(exist_ok=True)
        return _train_counted(rank, world, cfg, masked, self.folder)


@pytest.mark.distributed
@pytest.mark.parametrize("masked", [False, True])
def test_a_context_method_trains_like_one_process(masked: bool, tmp_path: Path) -> None:
    row = ContextMethod(name="counted", text="whose module the ranks import")
    register(row)(type("Made", (), {}))
    try:
        same_training.check(masked, cp=2, context={"method": "counted"}, steps=3, trains=_Counting(tmp_path))
    finally:
        del CONTEXT_METHODS["counted"]


def test_the_configuration_knows_a_context_method() -> None:
    def refused() -> str:
        with pytest.raises(UserError) as caught:
            load(None, ["model.hidden=64", "model.heads=4", "parallel.cp=2", "parallel.context.method=countd"])
        return str(caught.value)

    row = ContextMethod(name="counted", text="made up for a test")
    assert "counted" not in refused()
    register(row)(type("Made", (), {}))
    try:
        assert "did you mean counted?" in refused()
        assert row.text in render(document("parallel.context.method"))
        with pytest.raises(ValueError, match="there is a method counted"):
            register(row)(type("Made", (), {}))
    finally:
        del CONTEXT_METHODS["counted"]


# A data source --------------------------------------------------------------------------------------------------


@pytest.fixture
def parted(tmp_path: Path) -> Iterator[ModuleType]:
    """The source of the page, known to this process."""
    sys.modules.pop("own_source", None)
    yield module("A data source", "own_source", tmp_path)
    del DATASETS["parted"], READERS["parted"], sys.modules["own_source"]


def test_a_data_source_is_read_and_trained_on(parted: ModuleType, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    for name in "ab":
        lines = [f"the {n}th line of {name}\n{'===' if n % 10 == 9 else 'and another one'}" for n in range(400)]
        (notes / f"{name}.note").write_text("\n".join(lines))
    keys = ["data.name=parted", f"data.paths=[{notes}]", f"data.cache={tmp_path}", "data.field='==='"]
    cfg = load(None, [*keys, "model.hidden=32", "model.heads=4", "model.layers=1", "model.ffn=64", "train.seq_len=32"])
    assert type(cfg.data) is parted.PartedData and "name: parted" in to_yaml(cfg)
    found = list(read_documents(sorted(notes.iterdir()), "parted", "==="))
    assert len(found) == 2 * 40 and all(document.text.startswith("the ") for document in found)
    assert data_problems(cfg) == []
    job = text_job(tmp_path)
    rows = train_job(0, 1, replace(job, data=cfg.data, train=replace(job.train, steps=4)), tmp_path / "run")
    assert len(rows) == 4 and rows[-1]["loss"] < rows[0]["loss"]
    (meta,) = [json.loads(file.read_text()) for file in tmp_path.glob("*.meta.json")]
    assert meta["documents"] == len(found)


def test_the_configuration_knows_a_data_source(parted: ModuleType) -> None:
    shown = render(document("data"))
    assert "'parted'" in shown and "The line between two documents." in shown
    with pytest.raises(UserError, match=r"data\.name: expected one of .*, parted, got 'partd'; did you mean parted\?"):
        load(None, ["data.name=partd"])
    with pytest.raises(UserError, match=r"data\.separator"):
        load(None, ["data.name=parted", "data.paths=[x]", "data.separator=a"])
    with pytest.raises(ValueError, match="a kind of file parted"):
        register_source(lambda path, field: iter(()))(parted.PartedData)
    with pytest.raises(ValueError, match=r"data\.name=text is taken"):
        add_class("data", "text", parted.PartedData)


def test_who_goes_on_without_a_data_source_is_told(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"imports": ["own_source"]}))
    with pytest.raises(UserError, match=r"'parted' is not known; the run was started with --import own_source; give"):
        load(None, ["data.name=parted", f"checkpoint.init={tmp_path}"])


# A family -------------------------------------------------------------------------------------------------------


def test_the_family_of_the_page(tmp_path: Path) -> None:
    """tests/launch/test_own_family.py follows a whole one; the page's is loaded."""
    (code,) = blocks("python", "A model family")
    (tmp_path / "own.py").write_text(code)
    command = ["show", "--import", "own", "job.yaml"]
    (tmp_path / "job.yaml").write_text("model: {family: acorn, layers: 1, hidden: 32, heads: 4, ffn: 64}\n")
    code = f"from pentad.launch.cli import main; raise SystemExit(main({command}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "family: acorn" in done.stdout and "norm_eps: 0.001" in done.stdout and "theta: 500.0" in done.stdout


# What is added inside the package -------------------------------------------------------------------------------


def changed(folder: Path, diff: str) -> None:
    """Applies a change of the page to a copy: what a hunk takes away or keeps is in the file once."""
    head, _, body = diff.partition("\n")
    file = folder / head.removeprefix("+++ ")
    text = file.read_text(encoding="utf-8")
    for hunk in body.split("@@\n"):
        lines = hunk.splitlines()
        old = "\n".join(line[1:] for line in lines if line[:1] != "+")
        new = "\n".join(line[1:] for line in lines if line[:1] != "-")
        assert text.count(old) == 1, f"{file.name} has {text.count(old)} times: {old}"
        text = text.replace(old, new)
    file.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rooms with all changes of the page, as pentad.*."""
    folder = tmp_path_factory.mktemp("copy") / "pentad"
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    for diff in re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL):
        changed(folder, diff)
    for code in blocks("python", "A command"):
        (folder / code.partition("\n")[0].removeprefix("# ")).write_text(code, encoding="utf-8")
    return folder.parent


def run(copy: Path, code: str) -> str:
    """Runs code with the changed rooms; what it prints."""
    environment = {**os.environ, "PYTHONPATH": f"{copy}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    where = f"import pentad.configs; assert pentad.configs.__file__.startswith({str(copy)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", where + code], cwd=copy, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


CONFIGURED = """
from pentad.configs import document, load, render
from pentad.launch.cli import main
from pentad.trainer.optim.learning_rate import learning_rate

MODEL = ["model.layers=1", "model.hidden=64", "model.heads=4", "model.ffn=64"]

def rates(*keys):
    cfg = load(None, [*MODEL, "train.steps=9", "optim.lr=1", *keys])
    return [round(learning_rate(cfg.optim.schedule, cfg.optim.lr, step, 9), 12) for step in range(9)]

linear = ["optim.schedule.name=linear", "optim.schedule.warmup_steps=2"]
print([rates(*linear, "optim.schedule.hold_steps=2"), rates(*linear)])
print(rates("optim.schedule.name=inverse_sqrt", "optim.schedule.warmup_steps=3"))
print(render(document("optim.schedule.hold_steps")))
try:
    load(None, [*MODEL, "optim.schedule.hold_step=1"])
except Exception as error:
    print(error)
main(["presets", "--kind", "hardware"])
"""


def test_a_config_key_a_learning_rate_and_a_command(copy: Path) -> None:
    held, inverse, doc, text, wrong, *presets = run(copy, CONFIGURED).splitlines()
    assert json.loads(held) == [
        [0.5, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2],
        [0.5, 1, 1, *[pytest.approx(1 - n / 7, abs=1e-11) for n in range(1, 7)]],
    ]
    assert json.loads(inverse) == [
        pytest.approx(rate, abs=1e-11) for rate in (1 / 3, 2 / 3, 1, *((4 / n) ** 0.5 for n in range(4, 10)))
    ]
    assert doc.split() == ["optim.schedule.hold_steps", "int", "=", "0"] and "full rate" in text
    assert "did you mean optim.schedule.hold_steps" in wrong
    assert presets == preset_names("hardware")


TRAINED = """
import gc, json
from dataclasses import replace
import torch
from pentad.configs.schema import SignConfig
from pentad.parallel.pipeline.check import ProgramError, check_program
from pentad.parallel.pipeline.lower import lower
from pentad.parallel.pipeline.needs import Kinds
from pentad.parallel.pipeline.program import Op
from pentad.parallel.pipeline.schedules import generate
from pentad.parallel.pipeline.simulate import simulate
from pentad.parallel.pipeline.times import Times
from pentad.trainer.step import Stepper
from tests.training import Run, job

def collecting(program):
    def after(op):
        return (op, Op(Kinds.COLLECT, op.index, op.stage)) if op.kind is Kinds.BACKWARD else (op,)
    return replace(program, ranks=tuple(tuple(each for op in ops for each in after(op)) for ops in program.ranks))

plain = generate("1f1b", ranks=2, microbatches=3)
program = lower(collecting(plain))
check_program(program)
spans = [simulate(lower(p), Times(other={"GC": (0.5,)})).makespan for p in (plain, collecting(plain))]
first = [tuple(sorted(ops, key=lambda op: op.kind is not Kinds.COLLECT)) for ops in program.ranks]
early = replace(program, ranks=tuple(first))
try:
    check_program(early)
except ProgramError as error:
    refused = str(error)

def make(cfg, parts, optimizer, mesh, program):
    program = collecting(program)
    check_program(program)
    return Stepper(cfg, parts, optimizer, mesh, program)

collected, found = [], gc.collect
gc.collect = lambda *args: collected.append(args) or found(*args)
run = Run(0, replace(job(steps=2), optim=SignConfig(lr=0.01, weight_decay=0.0)), stepper=make)
before = [p.detach().clone() for p in run.parts.model.parameters()]
collected.clear()
losses = [run.step(step)[0] for step in range(2)]
gc.collect = found
moved = {round(float(x), 9) for a, b in zip(before, run.parts.model.parameters()) for x in (a - b).abs().unique()}
run.close()
print(json.dumps([spans, refused, collected, losses, sorted(moved)]))
"""


def test_an_operation_and_an_optimizer(copy: Path) -> None:
    spans, refused, collected, losses, moved = json.loads(run(copy, TRAINED))
    assert spans[0] < spans[1] <= spans[0] + 3 * 2 * 0.5
    assert "GC" in refused and "comes before" in refused
    assert collected == [[1]] * 2 * 4  # after each backward pass: two steps of four microbatches
    assert losses[1] < losses[0]
    # Two steps by the learning rate, there and back or on; the embedding's rows that never came up stay.
    assert set(moved) <= {0.0, 0.01, 0.02} and 0.02 in moved
