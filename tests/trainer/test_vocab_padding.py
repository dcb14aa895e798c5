"""A vocabulary that the ranks cannot share: padded at the start of a run, never predicted, cut at the export."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pentad.configs import UserError, load
from pentad.configs.schema import Config, ModelConfig
from pentad.models.hf.config_json import links
from pentad.models.hf.folder import load_hf, write_hf
from pentad.trainer.checkpoint.checkpointer import Checkpointer, read_full, write_full
from pentad.trainer.checkpoint.hugging_face import export_hf, import_hf, load_initial
from pentad.trainer.checkpoint.retention import Retention
from tests.distributed import run_distributed
from tests.training import TINY, Run, job


def random_folder(path: Path, model: ModelConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {name: shape for link in links(model) for name, shape in link.ours.items()}
    write_hf(
        path, model, {n: 0.3 * torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    )


def trained(rank: int, world: int, cfg: Config, init: Path) -> tuple[list[float], list[float]]:
    """Losses and gradient norms from the weights in `init`, and those of saved ones."""
    run = Run(rank, cfg)
    group: Any = run.mesh.host_group if world > 1 else None
    checkpointer = Checkpointer(
        init.parent / "run",
        group=group,
        rank=rank,
        world=world,
        keep=Retention(1),
        asynchronous=False,
        on_event=lambda _: None,
    )
    try:
        load_initial(init, run.parts, checkpointer)
        steps = [run.step(step) for step in range(4)]
        return [loss for loss, _, _ in steps], [norm for _, norm, _ in steps]
    finally:
        checkpointer.close()
        run.close()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "vocab", "kind", "tied"),
    [
        ({"tp": 2}, 64, "hf", True),
        ({"tp": 2}, 128, "checkpoint", False),  # the second rank has nothing but padding
        ({"tp": 2, "dp": 2, "sharding": "zero1"}, 64, "checkpoint", True),
        ({"pp": 2, "tp": 2, "pipeline": {"vocab": "balanced"}}, 128, "hf", False),
        ({"pp": 2, "pipeline": {"vocab": "balanced", "vocab_barriers": 2}}, 128, "checkpoint", True),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else str(value),
)
def test_padding_changes_nothing(layout: dict[str, Any], vocab: int, kind: str, tied: bool, tmp_path: Path) -> None:
    model = replace(TINY, vocab=61, tied=tied)
    random_folder(tmp_path / "hf", model)
    import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    expected = trained(0, 1, job(model={"vocab": 61, "tied": tied}), tmp_path / "hf")
    cfg = job(model={"vocab": vocab, "vocab_used": 61, "tied": tied}, **layout)
    world = cfg.parallel.ranks
    for found in run_distributed(trained, world, cfg, tmp_path / kind, group=False):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)


def test_padding_is_never_predicted_and_cut_by_the_export(tmp_path: Path) -> None:
    model = replace(TINY, vocab=61)
    random_folder(tmp_path / "hf", model)
    cfg = job(model={"vocab": 64, "vocab_used": 61})
    run = Run(0, cfg)
    checkpointer = Checkpointer(
        tmp_path / "run", group=None, rank=0, world=1, keep=Retention(1), asynchronous=False, on_event=lambda _: None
    )
    try:
        load_initial(tmp_path / "hf", run.parts, checkpointer)
        tokens = torch.arange(32).reshape(2, 16)
        with torch.no_grad():
            logits, expected = run.parts.model(tokens), load_hf(tmp_path / "hf", torch.float64)(tokens)
        assert logits.shape[-1] == 64 and not logits.softmax(-1)[..., 61:].any()
        torch.testing.assert_close(logits[..., :61], expected, rtol=1e-11, atol=1e-11)
        values = {f"model/{name}": p.detach().clone() for name, p in run.parts.model.named_parameters()}
    finally:
        checkpointer.close()
        run.close()
    write_full(tmp_path / "saved", values, {"step": 1, "model": asdict(cfg.model)})
    assert read_full(tmp_path / "saved")[0]["model/embed.weight"].shape == (64, 32)
    export_hf(tmp_path / "saved", tmp_path / "out")
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("hf", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def configured(*overrides: str) -> ModelConfig:
    return load(None, ["model.preset=gpt2", "data.name=stdlib", "train.seq_len=8", *overrides]).model


def test_the_first_advice_leads_to_a_run(tmp_path: Path) -> None:
    random_folder(tmp_path, replace(TINY, vocab=50257))
    with pytest.raises(
        UserError, match=r"model\.vocab: 50257 is not a multiple of parallel\.tp=2 .*set model\.vocab=50258"
    ):
        configured("parallel.tp=2")
    init = f"checkpoint.init={tmp_path}"
    assert configured("parallel.tp=2", "model.vocab=50258", init).used_vocab == 50257
    assert configured("parallel.tp=2", "model.vocab=50258").used_vocab == 50258
    assert configured(init).vocab_used is None
    import_hf(tmp_path, tmp_path / "checkpoint")
    assert configured("model.vocab=50304", f"checkpoint.init={tmp_path / 'checkpoint'}").used_vocab == 50257


def test_more_ids_in_use_than_the_vocabulary_has() -> None:
    with pytest.raises(
        UserError, match=r"model\.vocab_used: 50300 is more than model\.vocab=50257; set model\.vocab=50304"
    ):
        configured("model.vocab_used=50300")
