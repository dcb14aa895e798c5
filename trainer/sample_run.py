"""Text from a checkpoint in the layout of its run: one rank of it, whose job is a file beside its configuration."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import torch

from ..configs.schema import Config
from ..parallel.comm.mesh import Mesh
from .checkpoint.checkpointer import Checkpointer
from .checkpoint.hugging_face import load_initial
from .optim.optimizer import make_optimizer
from .processes.start import Start
from .programs import training_program
from .run import meet
from .run_folder import checkpoint_folder
from .setup import Ranks, buckets_per_rank, make_model
from .step import Stepper
from .text.prompts import make_coder
from .text.samples import Sampler
from .text.tokenizer_files import of_checkpoint

REQUEST = "request.json"
"""What is wanted: prompts and count."""
ANSWER = "answer.json"
"""What rank 0 leaves: prompt, text and tokens of each."""


def sample(cfg: Config, start: Start) -> int:
    """Continues the prompts of the request with the likeliest tokens; a job for `trainer.__main__.main`.

    Args:
        cfg: the run's, with `checkpoint.init` for the checkpoint and a runs_dir that is thrown away.
        start: how the rank was started.
    """
    with ExitStack() as open_things:
        try:
            mesh, device = meet(cfg, start, Ranks.from_environment(start.env), open_things)
            _answer(cfg, mesh, device, Path(start.config).parent)
        except Exception as error:
            start.report(error, cfg)
            raise
    return 0


def _answer(cfg: Config, mesh: Mesh, device: torch.device, folder: Path) -> None:
    request = json.loads((folder / REQUEST).read_text())
    parts = make_model(cfg, mesh, device)
    checkpointer = Checkpointer(
        checkpoint_folder(cfg),
        group=mesh.checkpoint_group,
        rank=mesh.rank,
        world=mesh.degrees.world,
        keep=0,
        asynchronous=False,
        on_event=lambda _: None,
        abort=mesh.abort,
    )
    init = Path(cfg.checkpoint.init or "")
    load_initial(init, parts, checkpointer, notice=lambda _: None)
    microbatches = cfg.train.global_batch // (cfg.train.micro_batch * mesh.axis("dp").size)
    program = training_program(cfg, parts.pipeline, microbatches, buckets_per_rank(parts.replicas, mesh))
    # Its states are never made: nothing is trained.
    stepper = Stepper(cfg, parts, make_optimizer(cfg.optim, device), mesh, program)
    try:
        tokenizer = of_checkpoint(init)
        coder = make_coder(tokenizer, str(init))
        found = Sampler(cfg, mesh, parts.pipeline, stepper, coder, tokenizer.stops)(
            request["prompts"], request["count"]
        )
    finally:
        stepper.close()
        checkpointer.close()
    if mesh.is_first:
        answers = [{"prompt": one.prompt, "text": one.text, "tokens": list(one.tokens)} for one in found]
        (folder / ANSWER).write_text(json.dumps(answers))
