"""Checkpoints of nodes beside those that all ranks see: the newest that all ranks together can read is gone on from."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pentad.configs import to_yaml
from pentad.configs.errors import UserError
from pentad.configs.schema import CheckpointConfig, Config, LocalCheckpointConfig
from pentad.launch.cli import main
from pentad.parallel.global_tensor import GlobalTensor
from pentad.trainer.checkpoint.check import checkpoint_problems
from pentad.trainer.checkpoint.checkpointer import Checkpointer, read_full, verify
from pentad.trainer.checkpoint.index import read_contents
from pentad.trainer.checkpoint.retention import Retention
from pentad.trainer.checkpoint.tiers.local import NodeFolders, run_number
from pentad.trainer.checkpoint.tiers.tiers import Tiers, open_tiers
from pentad.trainer.job.outputs import Outputs
from pentad.trainer.trainer import Trainer
from tests.distributed import host_tree, run_distributed
from tests.trainer.checkpoint.layouts import global_values, pieces, same
from tests.trainer.checkpoint.test_resume import Curve, StopAt, text_job
from tests.training import open_training

RUN, OTHER = "0" * 32, "1" * 32
HOSTS = ("a", "a", "b", "b")


def _tiers(folder: Path, rank: int, hosts: tuple[str, ...], events: list[dict[str, Any]], run: str = RUN) -> Tiers:
    nodes = NodeFolders(run, hosts)

    def made(directory: Path, keep: int, nodes: NodeFolders | None) -> Checkpointer:
        return Checkpointer(
            directory,
            group=host_tree() if dist.is_initialized() else None,
            rank=rank,
            world=len(hosts),
            keep=Retention(keep),
            asynchronous=False,
            on_event=events.append,
            nodes=nodes,
        )

    return Tiers(made(folder / "shared", 0, None), made(nodes.folder(folder / "local", rank), 2, nodes))


def _found(tiers: Tiers, needed: Mapping[str, GlobalTensor]) -> str:
    """Tier and step of the newest, whose values are loaded and are those of its step."""
    path = tiers.find_resume("latest", lambda: needed)
    assert path is not None
    state = tiers.of(path).load(path, needed)
    assert path.name == f"step-{state['step']:08d}"
    return f"{'shared' if tiers.of(path) is tiers.shared else 'local'} {state['step']}"


def _flip(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def _of_another_save(path: Path) -> None:
    """As if the node had the part of another branch of the run: whole, and of this step."""
    state = json.loads((path / "state.json").read_text())
    shutil.rmtree(path)
    nodes, values = NodeFolders(state["local"]["run"], ("b",)), pieces("zero1", 1, 2, 4, global_values(30))
    saver = Checkpointer(
        path.parent,
        group=None,
        rank=0,
        world=1,
        keep=Retention(),
        asynchronous=False,
        on_event=lambda _: None,
        nodes=nodes,
    )
    saver.save(30, {name: GlobalTensor.of(value.local.clone()) for name, value in values.items()}, {})
    saver.wait()


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "nothing": (lambda path: None, "local 30", ""),
    "a bit": (_flip, "local 20", "b: rank-0000"),
    "a node is lost": (lambda path: shutil.rmtree(path.parent), "shared 10", "b has no part of it"),
    "a part is lost": (lambda path: shutil.rmtree(path), "local 20", "b has no part of it"),
    "half a part": (lambda path: (path / "manifest.json").unlink(), "local 20", "b: manifest.json is missing"),
    "another save": (_of_another_save, "local 20", "different saves of this step"),
}


def _scenarios(rank: int, world: int, folder: Path) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    events: list[dict[str, Any]] = []
    tiers, found = _tiers(folder, rank, HOSTS, events), {}

    def mine(step: int) -> dict[str, GlobalTensor]:
        return pieces("zero1", 1, rank, world, global_values(step))

    def alone(change: Callable[[], object]) -> None:
        dist.barrier()
        if rank == 0:
            change()
        dist.barrier()

    tiers.shared.save(10, mine(10), {"tokens": 10})
    assert tiers.local is not None
    for step in (12, 20, 30):
        tiers.local.save(step, mine(step), {"tokens": step})
        tiers.local.wait()
    alone(lambda: shutil.copytree(folder / "local", folder / "kept"))
    for name, (damage, _, _) in DAMAGE.items():
        alone(lambda damage=damage: damage(folder / "local" / RUN / "b" / "step-00000030"))
        events.clear()
        needed = pieces("zero1", 1, rank, world, None)
        chosen = _found(tiers, needed)
        assert same(needed, mine(int(chosen.split()[1]))), name
        found[name] = chosen, list(events)
        alone(lambda: shutil.rmtree(folder / "local") or shutil.copytree(folder / "kept", folder / "local"))
    # A rank needs what its node does not have: all of it, each node has a half.
    events.clear()
    whole = pieces("ddp", 1, rank, world, None)
    found["other layout"] = _found(tiers, whole), list(events)
    assert same(whole, pieces("ddp", 1, rank, world, global_values(10)))
    # Each node has all of it.
    tiers.local.save(40, pieces("ddp", 2, rank, world, global_values(40)), {"tokens": 40})
    found["each node has all"] = _found(tiers, whole), []
    assert same(whole, pieces("ddp", 1, rank, world, global_values(40)))
    events.clear()
    found["other run"] = _found(_tiers(folder, rank, HOSTS, events, OTHER), mine(0)), list(events)
    alone(lambda: os.rename(folder / "local" / RUN, folder / "local" / OTHER))
    found["foreign"] = _found(_tiers(folder, rank, HOSTS, events, OTHER), mine(0)), list(events)
    alone(lambda: os.rename(folder / "local" / OTHER, folder / "local" / RUN))
    tiers.local.retire()
    alone(lambda: None)
    return found


@pytest.mark.distributed
def test_the_newest_that_all_nodes_have_is_gone_on_from(tmp_path: Path) -> None:
    found = run_distributed(_scenarios, 4, tmp_path)[0]
    for name, (_, chosen, reason) in DAMAGE.items():
        assert found[name][0] == chosen, name
        said = [event["reason"] for event in found[name][1] if event["event"] != "checkpoint_saved"]
        assert bool(said) == bool(reason) and all(reason in text for text in said if "30" in text), (name, said)
        assert not reason or any(reason in text for text in said), (name, said)
    assert found["other layout"][0] == "shared 10"
    assert [event["path"][-2:] for event in found["other layout"][1]] == ["30", "20"]
    assert "not what this layout needs here" in found["other layout"][1][0]["reason"]
    assert found["each node has all"][0] == "local 40"
    assert found["other run"] == ("shared 10", []), "it lies elsewhere"
    assert found["foreign"][0] == "shared 10" and "of another run" in found["foreign"][1][0]["reason"]
    assert list((tmp_path / "local").iterdir()) == [], "nothing is left where nothing is wanted"


@pytest.mark.distributed
def test_a_node_holds_each_element_of_its_ranks_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_distributed(_saved, 4, tmp_path)
    for host, ranks in (("a", (0, 1)), ("b", (2, 3))):
        path = tmp_path / "local" / RUN / host / "step-00000010"
        assert verify(path) == []
        assert main(["checkpoint", "verify", str(path)]) == 0
        assert "each element once" in (said := capsys.readouterr().out) and "the part of one of 2 nodes" in said
        assert main(["checkpoint", "reshard", str(path), str(tmp_path / "x"), "--layout", "dp=2"]) == 2
        assert "is the part of one of 2 nodes (a, b)" in capsys.readouterr().err
        stored = read_contents(path).tensors
        for name, value in global_values(10).items():
            held = torch.zeros(value.shape, dtype=torch.bool)
            for rank in ranks:
                for box in pieces("zero1", 1, rank, 4, None)[name].boxes if name in _names(rank) else ():
                    held[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))] = True
            boxes = stored[name].boxes if name in stored else ()
            assert sum(math.prod(box.sizes) for box in boxes) == int(held.sum())


def _names(rank: int) -> set[str]:
    return set(pieces("zero1", 1, rank, 4, None))


def _saved(rank: int, world: int, folder: Path) -> None:
    local = _tiers(folder, rank, HOSTS, []).local
    assert local is not None
    local.save(10, pieces("zero1", 1, rank, world, global_values(10)), {})
    local.wait()


def _job(folder: Path, steps: int = 20) -> Config:
    cfg = text_job(folder)
    local = LocalCheckpointConfig(dir=str(folder / "memory"), every=2)
    save = CheckpointConfig(every=5, dir=str(folder / "checkpoints"), asynchronous=False, local=local)
    return replace(
        cfg, runs_dir=str(folder), name="run", train=replace(cfg.train, steps=steps, global_batch=2), checkpoint=save
    )


class _Died(Exception):
    pass


class _DiesAt(StopAt):
    @property
    def requested(self) -> bool:  # type: ignore[override]
        if self._trainer.step + 1 >= self._until:
            raise _Died
        return False


def _train(cfg: Config, dies_at: int | None = None) -> tuple[Curve, Path | None]:
    """Trains one rank from the newest checkpoint to the end, or until it dies in a step."""
    curve = Curve()
    session = open_training(0, cfg)
    tiers = open_tiers(cfg, session.mesh, curve.events.append)
    trainer = Trainer(session, tiers.shared, run_dir=Path(cfg.runs_dir) / "run", local=tiers.local)
    found = tiers.find_resume("latest", trainer.tensors)
    try:
        if found is not None:
            trainer.restore(found)
        stop = StopAt(trainer, 99) if dies_at is None else _DiesAt(trainer, dies_at)
        trainer.train(Outputs(curve, curve), stop)  # type: ignore[arg-type]
    except _Died:
        pass
    finally:
        tiers.close()
        session.close()
    return curve, found


def test_a_run_that_died_goes_on_from_its_node_and_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    straight, apart = tmp_path / "straight", tmp_path / "apart"
    for folder in (straight, apart):
        folder.mkdir()
    reference = {row[0]: row for row in _train(_job(straight, 12))[0].rows}
    assert not any((straight / "memory").iterdir()), "the shared one is newer"
    cfg = _job(apart, 12)
    rows: list[tuple[int, float, float]] = []
    for dies_at, start in ((9, None), (12, "step-00000008"), (None, "step-00000010")):
        curve, found = _train(cfg, dies_at)
        assert (found.name if found is not None else None) == start
        assert found is None or found.is_relative_to(apart / ("memory" if dies_at else "checkpoints"))
        rows += curve.rows
    assert all(row == reference[row[0]] for row in rows) and rows[-1][0] == 12
    assert not any((apart / "memory").iterdir())
    saved = [e for e in curve.events if e["event"] == "checkpoint_saved"]
    assert [(e["step"], e.get("tier")) for e in saved] == [(12, None)]


def test_a_folder_of_somebody_else_is_neither_believed_nor_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[dict[str, Any]] = []
    tiers = _tiers(tmp_path, 0, ("h",), events)
    assert tiers.local is not None
    values = {"model/a": GlobalTensor.of(torch.ones(3))}
    tiers.shared.save(1, values, {})
    tiers.local.save(2, values, {})
    assert _found(tiers, values) == "local 2"
    assert (tmp_path / "local" / RUN).stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    events.clear()
    assert _found(tiers, values) == "shared 1"
    assert "is another user's" in capsys.readouterr().err
    tiers.local.save(3, values, {})
    assert [(e["event"], e["tier"]) for e in events] == [("checkpoint_failed", "local")]
    assert "another user's" in events[0]["reason"] and list(read_full(tmp_path / "shared" / "step-00000001")[0])
    monkeypatch.undo()
    shutil.rmtree(tiers.local.directory)
    tiers.local.directory.symlink_to(tmp_path / "shared")
    assert _found(tiers, values) == "shared 1" and "or a link" in capsys.readouterr().err


def test_check_leaves_to_the_ranks_what_they_alone_can_see(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = _job(tmp_path)
    cfg = replace(cfg, checkpoint=replace(cfg.checkpoint, resume="latest"))
    _train(cfg, 9)
    shared = tmp_path / "checkpoints" / "step-00000005"
    assert checkpoint_problems(cfg) == []
    (tmp_path / "run" / "config.resolved.yaml").write_text(to_yaml(cfg))
    assert main(["checkpoint", "list", str(tmp_path / "run")]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in shown if line[-1] in ("(latest)", "here)")] == ["5", "8"]
    (shared / "manifest.json").unlink()
    assert checkpoint_problems(cfg) == []
    assert _train(cfg, 10)[1] == next((tmp_path / "memory").glob("*/*/step-00000008"))
    shutil.rmtree(tmp_path / "memory")
    (problem,) = checkpoint_problems(cfg)
    assert "all 1 checkpoints" in problem.message
    with pytest.raises(UserError, match="all 1 checkpoints"):
        _train(cfg)


def test_only_damaged_ones_of_nodes_are_no_reason_not_to_begin(tmp_path: Path) -> None:
    tiers = _tiers(tmp_path, 0, ("h",), [])
    assert tiers.local is not None and tiers.find_resume("latest", dict) is None
    values = {"model/a": GlobalTensor.of(torch.ones(3))}
    tiers.local.save(2, values, {})
    _flip(tiers.local.directory / "step-00000002")
    assert tiers.find_resume("latest", lambda: values) is None
    tiers.shared.save(1, values, {})
    _flip(tmp_path / "shared" / "step-00000001")
    with pytest.raises(UserError, match="all 1 checkpoints"):
        tiers.find_resume("latest", lambda: values)


def test_the_number_of_a_run_stays_and_is_no_other_ones(tmp_path: Path) -> None:
    file = tmp_path / "run" / "run.id"
    assert run_number(file, makes=False) is None
    number = run_number(file)
    assert number is not None and run_number(file) == number != run_number(tmp_path / "other" / "run.id")
    file.write_text("../../etc\n")
    with pytest.raises(UserError, match="holds no run's number"):
        run_number(file)
