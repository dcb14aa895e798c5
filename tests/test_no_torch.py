"""What plans, checks and reads needs no torch, whose import takes seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pentad.configs

ROOMS = (
    "configs",
    "models.costs",
    "parallel.pipeline",
    "launch.supervise.guardian",
    "launch.supervise.watcher",
    "launch.verbs.diagnose",
    "parallel.record",
    "trainer.memory",
    "trainer.metrics.page",
    "trainer.pipeline.programs",
    "trainer.pipeline.real_step",
    "trainer.run_folder",
    "launch.verbs.checkpoint",
    "trainer.checkpoint.index",
    "trainer.checkpoint.listing",
    "trainer.checkpoint.manifest",
    "trainer.checkpoint.names",
    "trainer.checkpoint.verification",
    "trainer.data.indexed",
    "trainer.recovery.plan",
    "trainer.recovery.ways",
)
RUN_IT = {"parallel.pipeline.runtime", "parallel.pipeline.execute", "parallel.pipeline.saved"}
"""Modules of these rooms that move tensors."""
VERBS = (
    ["flops", "llama3_8b", "--seq-len", "4096"],
    ["flops", "deepseek_v3", "--seq-len", "4096", "--json"],
    ["check", "demo"],
    ["schedule", "gis", "--ranks", "4", "--microbatches", "8"],
    ["schedule", "1f1b", "--ranks", "4", "--microbatches", "8", "--vocab", "balanced", "--svg", "picture.svg"],
    ["show", "demo"],
    ["show", "--keys"],
)
SCRIPT = """
import importlib, sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise AssertionError(f"{name} is imported")

sys.meta_path.insert(0, NoTorch())
modules, verbs = eval(sys.argv[1]), eval(sys.argv[2])
for module in modules:
    importlib.import_module(module)
from pentad.launch.cli import main
for verb in verbs:
    assert main(verb) == 0, verb
"""


def _modules() -> list[str]:
    """The rooms' modules by name, from their files: nothing is imported here."""
    root = Path(pentad.configs.__file__).parent.parent
    found: list[str] = []
    for room in ROOMS:
        at = root.joinpath(*room.split("."))
        files = sorted(at.rglob("*.py")) if at.is_dir() else [at.with_suffix(".py")]
        names = [".".join(file.relative_to(root).with_suffix("").parts) for file in files]
        found += [name.removesuffix(".__init__") for name in names]
    return [f"pentad.{name}" for name in found if name not in RUN_IT]


def test_nothing_that_plans_checks_or_reads_imports_torch(tmp_path: Path) -> None:
    modules = _modules()
    assert len(modules) > 60
    command = [sys.executable, "-c", SCRIPT, repr(modules), repr(VERBS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "picture.svg").exists()
